"""Deploying to a Swarm of three nodes under steady load: each node is an engine in a network namespace, the commands are those of users."""
import json
import os
import time
from pathlib import Path

import pytest
from commands import ROOT
from load import Load
from engines import Ran, nodes_of_a_swarm
from servers import free_port, until
from test_deploy import answered, deploy, record  # noqa: F401 (a fixture, and how a deployment is made and asked)

from mlserve.cli import run_command
from mlserve.release.deploy.live.engines import find_engine
from mlserve.release.deploy.live.proxy import slots_of
from mlserve.release.deploy.render import service
from mlserve.release.record import promote

TARGET = "swarm-double"
REGISTRY = Path(os.environ.get("MLSERVE_STATE", ROOT / "state")) / "registry"


TOLD = []  # what was measured, printed at the end


def told_of(*words):
    TOLD.append(" ".join(map(str, words)))


@pytest.fixture(scope="module")
def options():
    return {"memory": "1g", "cpus": 1, "replicas": 3}


@pytest.fixture(scope="module")
def nodes(record):  # noqa: F811
    "Three engines, which pull from the registry of the tests at its own address; the first is the one that is asked"
    with nodes_of_a_swarm((REGISTRY, os.environ["MLSERVE_REGISTRY"])) as nodes, pytest.MonkeyPatch.context() as monkey:
        monkey.setenv("DOCKER_HOST", nodes[0].url)
        yield nodes
    print("", *TOLD, sep="\n")


@pytest.fixture(scope="module")
def served(record, nodes):  # noqa: F811
    "Version one on all nodes: the versions by name, and the port"
    versions, port = record[0], free_port()
    begun = time.monotonic()
    code, first, told = deploy(versions["one"], "--port", str(port), engine="swarm")
    assert code == 0, told
    assert (first["target"], first["version"]) == (TARGET, versions["one"])
    told_of(f"first, with the pull of each node: {time.monotonic() - begun:.0f} s", steps_of(first))
    return versions, port


def steps_of(result):
    return {s["name"]: s["seconds"] for s in result["steps"]}


def places(nodes):
    "How many containers of the model run on each node, as its own engine says"
    asked = {"label": [f"io.mlserve.target={TARGET}", "io.mlserve.model"]}
    return [len(node.client.containers.list(filters=asked)) for node in nodes]


def state_of(capsys):
    "The target's row of `mlserve status`"
    capsys.readouterr()
    assert run_command(["status", "double", "--json"]) == 0
    return next(row for row in json.loads(capsys.readouterr().out) if row["target"] == TARGET)


def serves_well(nodes, port, version, count=3):
    "One version, all its containers, every slot of the proxy open"
    engine = find_engine()
    assert answered(port, nodes[0].address) == version
    assert [(c.version, c.health, c.route) for c in engine.running(TARGET)] == [(version, "healthy", "open")] * count
    assert {slot.route for slot in slots_of(engine.proxy(TARGET))} == {"open"}
    assert sum(places(nodes)) == count


def none_twice(ran, load, more):
    "The servers ran each request once, and those that `serves_well` sent"
    told_of(f"{len(load.answers)} requests answered, {len(load.failures)} failed; the servers ran {ran.total:.0f}, {more} of them not of the load")
    assert len(load.answers) - 10 <= ran.total - more <= len(load.answers) + len(load.failures)  # a look at a server may come too late for its last ones


def test_L6_R9_versions_replace_each_other_on_three_nodes_and_bad_ones_are_taken_back(served, nodes, capsys):
    versions, port = served
    one, two = versions["one"], versions["two"]
    serves_well(nodes, port, one)
    assert places(nodes) == [1, 1, 1]
    with Ran(nodes, TARGET) as ran, Load(port, 3, pause=0.05, host=nodes[0].address) as load:
        code, result, told = deploy(two, engine="swarm")
        switched = time.monotonic()
        assert code == 0, told
        told_of("update", steps_of(result))
        for name, expected, step in (("wrong", 5, "healthy"), ("hangs", 3, "healthy"), ("gone", 5, "pull")):
            begun = time.monotonic()
            code, _, told = deploy(versions[name], engine="swarm")
            assert (code, told["step"]) == (expected, step), told
            assert f"Version {two} keeps serving" in told["error"]
            told_of(f"{name}: taken back after {time.monotonic() - begun:.0f} s: {told['error'][:150]}")
            serves_well(nodes, port, two)
        back, begun = len(load.answers), time.monotonic()
        promote("double", two, allow_older=True)
        assert run_command(["rollback", "double", "--target", TARGET]) == 0
        told_of(f"rollback {time.monotonic() - begun:.0f} s")
        time.sleep(0.5)
    serves_well(nodes, port, one)
    none_twice(ran, load, 4)
    assert not load.failures and len(load.answers) > 100, load.failures[:3]
    middle = sorted(load.answers)[:back]
    assert {load.answers[n][0] for n in middle if load.answers[n][1] > switched} == {two}
    row = state_of(capsys)
    assert (row["version"], row["healthy"], row["finding"]) == (one, True, ""), row
    assert run_command(["logs", "double", "--target", TARGET]) == 0
    assert capsys.readouterr().out.count('"event"') >= 3


def test_L6_a_node_that_is_drained_loses_nothing(served, nodes, capsys):
    versions, port = served
    serves_well(nodes, port, versions["one"])
    manager = nodes[0].client
    node = manager.nodes.get(nodes[2].client.info()["Swarm"]["NodeID"])
    with Ran(nodes, TARGET) as ran, Load(port, 3, pause=0.05, host=nodes[0].address) as load:
        begun = time.monotonic()
        node.update({"Role": "worker", "Availability": "drain"})
        until(lambda: places(nodes)[2] == 0 and [c.health for c in find_engine().running(TARGET)] == ["healthy"] * 3, 120)
        told_of(f"drained: {places(nodes)} after {time.monotonic() - begun:.0f} s")
        time.sleep(2)
    none_twice(ran, load, 0)
    assert not load.failures and len(load.answers) > 100, load.failures[:3]
    row = state_of(capsys)
    assert (row["version"], row["healthy"], row["finding"]) == (versions["one"], True, ""), row
    node.reload()
    node.update({"Role": "worker", "Availability": "active"})


def test_L6_a_node_whose_link_is_cut_loses_what_was_under_way_there_and_no_more(served, nodes, capsys):
    versions, port = served
    one, two = versions["one"], versions["two"]
    assert deploy(two, engine="swarm")[0] == 0  # which is spread over all nodes again
    promote("double", two, allow_older=True)
    assert places(nodes) == [1, 1, 1]
    serves_well(nodes, port, two)
    with Ran(nodes, TARGET) as ran, Load(port, 3, pause=0.05, host=nodes[0].address) as load:
        time.sleep(3)
        cut = time.monotonic()
        nodes[1].link("down")
        until(lambda: sum(places([nodes[0], nodes[2]])) == 3, 180)
        until(lambda: [c.health for c in find_engine().running(TARGET)] == ["healthy"] * 3, 180)
        told_of(f"cut: {places(nodes)} after {time.monotonic() - cut:.0f} s, slowest answer {max(load.seconds):.1f} s, failed: {load.failures}")
        failed = len(load.failures)
        row = state_of(capsys)
        assert (row["version"], row["healthy"], row["finding"]) == (two, True, ""), row
        code, result, told = deploy(one, engine="swarm")  # also while the node is away
        assert code == 0, told
        told_of("update without the node", steps_of(result))
        assert len(load.failures) == failed, load.failures
        nodes[1].link("up")
        until(lambda: places(nodes) in ([2, 0, 1], [1, 0, 2]), 120)  # what was left on the node has ended
        time.sleep(2)
    none_twice(ran, load, 0)
    assert failed <= 3, load.failures
    serves_well(nodes, port, one)


def test_L6_control_a_connection_that_is_kept_to_a_node_that_is_gone_hangs(served, nodes, monkeypatch):
    versions, port = served
    kept, good = ("http-server-close", "srvtcpka"), service.haproxy_config

    def without(*plan):
        lines = good(*plan).replace(" tcp-ut 5s", "").splitlines()
        return "\n".join(line for line in lines if not any(word in line for word in kept)) + "\n"
    monkeypatch.setattr(service, "haproxy_config", without)
    assert deploy(versions["two"], engine="swarm")[0] == 0
    until(lambda: places(nodes)[1], 60)
    with Load(port, 6, pause=0.05, host=nodes[0].address) as load:
        time.sleep(3)
        nodes[1].link("down")
        time.sleep(12)
        nodes[1].link("up")
    told_of(f"control: slowest answer {max(load.seconds):.1f} s, {len(load.failures)} failed")
    assert load.failures or max(load.seconds) > 8
