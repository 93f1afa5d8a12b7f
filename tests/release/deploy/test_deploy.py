"""Deploying for real: Docker Compose, haproxy and containers of one released image, under steady load; versions differ in a label."""
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path

import docker
import httpx
import pytest
from commands import ROOT, last_json, mlserve, run
from containers import WRONG
from load import Load
from servers import free_port, until

from mlserve.cli import run_command
from mlserve.release.deploy.live import replacement
from mlserve.release.deploy.live.engines import find_engine
from mlserve.release.deploy.live.proxy import slots_of
from mlserve.release.deploy.live.history import read_history
from mlserve.release.record import promote

GOOD, BAD = {"passed": True, "times": {"ready": 15}}, {"passed": True, "times": {"ready": 1}}  # 60 and 20 s to become ready
GONE, AWAY = "@sha256:" + "1" * 64, "127.0.0.1:9/double@sha256:" + "1" * 63
TARGET = "compose-double"
HTTP = httpx.Client(trust_env=False, timeout=30, limits=httpx.Limits(max_keepalive_connections=0))  # each one that is made reads all authorities


@pytest.fixture(scope="module")
def options():
    "What the versions decide of `[deploy]`, beside a port"
    return {"memory": "1g"}


@pytest.fixture(scope="module")
def record(environment, light_doubles, light_double, options):
    "Versions of `light_double` on a real tracking server, by name, with a port of their own"
    from mlserve.release.record import log_package, mark, record
    from mlserve.release.record.mlflow_store import client
    from mlserve.release.spec import ReleaseSpec
    images = light_doubles
    with pytest.MonkeyPatch.context() as monkey:
        for name, value in environment.items():
            monkey.setenv(name, value)
        monkey.delenv("MLFLOW_RUN_ID", raising=False)
        monkey.setattr(replacement, "planned", partial(replacement.planned, confirm=lambda pair: None))  # no release made these images
        port, versions = free_port(), {}

        logged = {}
        for device in ("cpu", "cuda"):
            logged[device] = log_package(light_double)
            spec = ReleaseSpec(name="double", notebook="double.ipynb", device=device, deploy={"port": port, **options})
            client().set_tag(logged[device].run_id, "mlserve.spec", spec.model_dump_json())

        def made(name, image, finding=GOOD, model="double", package="", device="cpu"):
            pair = record(model, dataclasses.replace(logged[device], digest=package or logged[device].digest), image, {"mlserve.device": device})
            if finding:
                mark(pair, device, finding)
            versions[name] = pair.version
        repository = images["one"].split("@")[0]
        for name, image, more in (("one", images["one"], {}), ("two", images["two"], {}), ("wrong", images["wrong"], dict(package=WRONG)), ("other", images["other"], {}),
                                  ("hangs", images["hangs"], dict(finding=BAD)), ("gone", repository + GONE, {}), ("unchecked", AWAY + "2", dict(finding=None)),
                                  ("away", AWAY + "1", {}), ("small", AWAY + "3", dict(finding=GOOD | {"memory": 2 * 2**30})), ("gpu", images["one"], dict(device="cuda")), ("sums", images["one"], dict(model="sums"))):
            made(name, image, **more)
        yield versions, port
        for container in docker.from_env().containers.list(all=True, filters={"label": "io.mlserve.target"}):
            container.remove(force=True)
        for network in docker.from_env().networks.list(names=[TARGET]):
            network.remove()


def answered(port, host="127.0.0.1"):
    "The version that answers"
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 0]}]}
    return HTTP.post(f"http://{host}:{port}/v2/models/double/infer", json=body).json()["model_version"]


def deploy(version, *more, model="double", engine="compose"):
    "The exit code of the command, what it printed and its last line"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(["deploy", engine, model, "--version", version, "--json", *more])
    return code, json.loads(out.getvalue()) if code == 0 else {}, last_json(err.getvalue()) if code else err.getvalue()


class Counted:
    "What the servers ran, read from their own metrics while they are there"

    def __init__(self, target=TARGET):
        self.target, self.counts, self.going, self.thread = target, {}, True, threading.Thread(target=self._watch)

    def _watch(self):
        client = docker.from_env()
        while self.going:
            for container in client.containers.list(filters={"label": [f"io.mlserve.target={self.target}", "com.docker.compose.service=model"]}, ignore_removed=True):
                with contextlib.suppress(Exception):  # not there yet, or no more
                    text = HTTP.get(f"http://127.0.0.1:{container.ports['8080/tcp'][0]['HostPort']}/metrics", timeout=5).text
                    self.counts[container.id] = float(re.search(r"^mlserve_request_seconds_count (\S+)", text, re.M)[1])
            time.sleep(0.3)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *a):
        time.sleep(1)
        self.going = False
        self.thread.join()


def clean(port, version, target=TARGET):
    "Nothing is left of what went before: one version, and every slot of the proxy open"
    engine = find_engine()
    assert answered(port) == version
    assert [(c.labels["io.mlserve.version"], c.status) for c in engine.containers(target)] == [(version, "running")]
    assert {slot.route for slot in slots_of(engine.proxy(target))} == {"open"}


def test_L6_R9_versions_replace_each_other_bad_ones_are_taken_back_and_no_request_is_lost_or_run_twice(record):
    versions, port = record
    one, two = versions["one"], versions["two"]
    code, first, told = deploy(one)
    assert code == 0, told
    assert (first["target"], first["url"], first["version"]) == (TARGET, f"http://127.0.0.1:{port}", one)
    assert [s["name"] for s in first["steps"]] == ["pull", "start", "healthy", "identity", "switch", "drain", "stop", "record"]
    with Counted() as counted, Load(port, 3, pause=0.05) as load:
        code, result, told = deploy(two)
        switched = time.monotonic()
        assert code == 0, told
        print({s["name"]: s["seconds"] for s in result["steps"]})
        for name, expected, step in (("wrong", 5, "healthy"), ("hangs", 3, "healthy"), ("gone", 5, "pull"), ("other", 5, "pull"), ("away", 6, "pull")):
            code, _, told = deploy(versions[name])
            assert (code, told["step"]) == (expected, step), told
            assert f"Version {two} keeps serving" in told["error"]
            clean(port, two)
        back = len(load.answers)
        assert run_command(["rollback", "double", "--target", TARGET]) == 0
        clean(port, one)
        code, _, told = deploy(two)
        assert code == 0, told
        time.sleep(0.5)
    clean(port, two)
    print(f"{len(load.answers)} requests, {back} of them before the rollback; the servers ran {sum(counted.counts.values()):.0f}")
    assert not load.failures and len(load.answers) > 100, load.failures[:3]
    assert {v for v, _ in load.answers.values()} == {one, two}
    middle = sorted(load.answers)[:back]
    assert {load.answers[n][0] for n in middle if load.answers[n][1] > switched} == {two}
    assert sum(counted.counts.values()) - 6 <= len(load.answers) <= sum(counted.counts.values()), "of the servers' requests six are those of `clean`"
    history = {e.version: (e.outcome, e.code) for e in read_history("double", TARGET)}
    assert history == {one: ("ok", 0), two: ("ok", 0), versions["wrong"]: ("failed", 5), versions["hangs"]: ("failed", 3),
                       versions["gone"]: ("failed", 5), versions["other"]: ("failed", 5), versions["away"]: ("failed", 6)}


def cut(version, after, *more, delay=0.0):
    "Run the command in a process of its own, and kill it when it has told of a step, or somewhat later"
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(into, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(run_command(["deploy", "compose", "double", "--version", version, *more]))
    os.close(into)
    with open(out) as lines:
        for line in lines:
            if line.startswith(after):
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
                break
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


MOMENTS = ("pull", "start", "healthy", "identity", "switch", "drain")  # in the start, before it is healthy, before it is asked who it is, at the switch, in the drain, in the stop


def killed_once(versions, port, current, after, target=TARGET, delay=0.0):
    "Kill a replacement; one version serves, and the same command ends well. Which serves now, and whether the command lived when it was killed"
    wanted, more = versions["one"] if current == versions["two"] else versions["two"], ("--target", target)
    killed = cut(wanted, after, *more, delay=delay)
    time.sleep(1)  # what the proxy was told before it is done by it
    serving = {answered(port) for _ in range(8)}
    assert len(serving) == 1 and serving <= {current, wanted}, (after, serving)  # which of the two: the kill comes when this process gets its turn
    code, result, told = deploy(wanted, *more)
    assert code == 0, (after, told)
    clean(port, wanted, target)
    return wanted, killed


@pytest.mark.parametrize("moments", [("start", "switch", "drain"), pytest.param(("pull", "healthy", "identity"), marks=pytest.mark.matrix)], ids="-".join)
def test_R9_a_command_that_is_killed_leaves_one_version_and_the_same_command_ends_well(record, moments):
    "At six moments, of which three are of every day"
    versions, port = record
    current = versions["two"]
    assert deploy(current)[0] == 0
    with Load(port, 2, pause=0.05) as load:
        for after in moments:
            current, _ = killed_once(versions, port, current, after)
    assert not load.failures, load.failures[:3]


def replace_often(versions, port, target, count, note):
    "Replace one version by the other under load; after each step of this, what it came to is noted"
    assert deploy(versions["one"], "--target", target, "--port", str(port))[0] == 0
    still = []  # when nothing was replaced, and which version served
    with Counted(target) as counted, Load(port, 2, pause=0.05) as load:
        for number in range(count):
            wanted = versions["one" if number % 2 else "two"]
            code, result, told = deploy(wanted, "--target", target)
            note(code=code, told=told if code else "", steps={s["name"]: s["seconds"] for s in result.get("steps", ())})
            assert code == 0, told
            ended = time.monotonic()
            clean(port, wanted, target)
            time.sleep(0.3)
            still.append((ended, time.monotonic(), wanted))
            note(asked=len(load.answers), ran=sum(counted.counts.values()), failures=load.failures[:3])
    wrong = [(n, v) for begin, end, version in still for n, (v, sent) in load.answers.items() if begin < sent < end and v != version]
    note(replaced=count, asked=len(load.answers), failures=load.failures[:3], ran=sum(counted.counts.values()) - count, wrong=wrong[:3])


def kill_often(versions, port, target, count, note):
    "Kill replacements at each of the moments in turn, and up to two seconds later"
    current, dead = versions["one"], []
    assert deploy(current, "--target", target, "--port", str(port))[0] == 0
    with Load(port, 2, pause=0.05) as load:
        for number in range(count):
            after, delay = MOMENTS[number % len(MOMENTS)], number * 0.37 % 2
            current, killed = killed_once(versions, port, current, after, target, delay)
            dead.append(after if killed else "")
            note(after=after, delay=round(delay, 2), killed=killed, failures=load.failures[:3])
    note(killed=sum(map(bool, dead)), asked=len(load.answers), failures=load.failures[:3])


def at_once(what, versions, count, tmp_path, targets=2):
    "The same on several targets of one engine, each in a process of its own; the last note of each, and all of them"
    def act(number, share):
        with open(tmp_path / f"{number}.jsonl", "w", buffering=1) as file, open(tmp_path / f"{number}.log", "w") as log:
            os.dup2(log.fileno(), 2)
            what(versions, free_port(), f"{what.__name__.partition('_')[0]}-{number}", share, lambda **told: print(json.dumps({"target": number, "at": time.time(), **told}), file=file))
    shares = [count // targets + (number < count % targets) for number in range(targets)]
    children = [multiprocessing.get_context("fork").Process(target=act, args=each) for each in enumerate(shares)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * targets, [(tmp_path / f"{n}.log").read_text()[-2000:] for n in range(targets)]
    noted = [[json.loads(line) for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in range(targets)]
    return [notes[-1] for notes in noted], [note for notes in noted for note in notes]


@pytest.mark.soak
def test_L6_R9_200_replacements_lose_nothing_and_nothing_is_run_twice(record, tmp_path):
    last, noted = at_once(replace_often, record[0], 200, tmp_path)
    steps = [note["steps"] for note in noted if "steps" in note]
    middle = {name: sorted(step[name] for step in steps)[len(steps) // 2] for name in steps[0]}
    print(f"{sum(told['replaced'] for told in last)} replacements, {sum(told['asked'] for told in last)} requests, steps in the middle: {middle}")
    assert sum(told["replaced"] for told in last) == len(steps) == 200
    assert not any(told["failures"] or told["wrong"] for told in last), last
    assert all(told["ran"] <= told["asked"] <= told["ran"] + told["replaced"] for told in last), last  # a look at a server may come too late for its last ones


@pytest.mark.soak
def test_R9_36_commands_that_are_killed_leave_one_version_and_the_same_command_ends_well(record, tmp_path):
    last, noted = at_once(kill_often, record[0], 36, tmp_path)
    print(f"{sum(told['killed'] for told in last)} killed, {sum(told['asked'] for told in last)} requests")
    assert sum(told["killed"] for told in last) >= 30 and not any(told["failures"] for told in last), last


def test_a_canary_gets_its_share_and_goes_back_or_takes_all_and_no_request_is_lost(record, capsys):
    versions, port = record
    running, other = versions["two"], versions["one"]
    assert deploy(running)[0] == 0
    promote("double", running, allow_older=True)
    with Load(port, 3, pause=0.02) as load:
        code, result, told = deploy(other, "--share", "10%")
        assert code == 0, told
        assert [s["name"] for s in result["steps"]] == ["pull", "start", "healthy", "identity", "switch", "record"]
        begun = time.monotonic()
        code, _, told = deploy(versions["other"], "--share", "5")
        assert code == 4 and f"share the requests on the target {TARGET} already" in told["error"]
        code, _, told = deploy(versions["wrong"])
        assert (code, told["step"]) == (5, "healthy"), told
        while sum(sent > begun for _, sent in load.answers.values()) < 400:
            time.sleep(0.2)
        shared = [version for version, sent in load.answers.values() if sent > begun]
        part = shared.count(other) / len(shared)
        capsys.readouterr()
        assert run_command(["status", "double", "--json"]) == 0
        old, new = [row for row in json.loads(capsys.readouterr().out) if row["target"] == TARGET]
        assert run_command(["status", "double"]) == 0
        print(capsys.readouterr().out, f"share {part:.3f} of {len(shared)}")
        assert run_command(["rollback", "double", "--target", TARGET]) == 0
        clean(port, running)
        assert {e.version: e.outcome for e in read_history("double", TARGET)}[other] == "rolled back"
        assert deploy(other, "--share", "50%")[0] == 0
        code, result, told = deploy(other)
        assert code == 0, told
        assert [s["name"] for s in result["steps"]] == ["identity", "switch", "drain", "stop", "record"]
        time.sleep(0.5)
    clean(port, other)
    assert {slot.weight for slot in slots_of(find_engine().proxy(TARGET))} == {1}
    assert not load.failures, load.failures[:3]
    assert 0.08 < part < 0.12 and {*shared} == {running, other}
    assert (old["version"], old["share"], old["finding"], new["version"], new["share"]) == (running, 90, "", other, 10)
    assert new["finding"].startswith(f"Version {other} gets 10 % of the requests.") and old["requests"] > 5 * new["requests"] > 0
    assert [[row[key] for key in ("errors", "failures", "restarts")] for row in (old, new)] == [[0, 0, 0]] * 2 and old["p99_ms"] and new["p99_ms"]
    code, _, told = deploy(other, "--share", "10%")
    assert code == 4 and f"No other version serves on the target {TARGET}" in told["error"]
    code, _, told = deploy(other, "--share", "tenth")
    assert code == 2 and "'tenth' was given" in told["error"]


def test_what_cannot_be_deployed_is_refused_before_anything_is_touched(record, monkeypatch):
    versions, port = record
    before = sorted(c.id for c in find_engine().containers())
    assert before

    def refused(version, code, sentence, *more, **kw):
        got, _, told = deploy(versions[version], *more, **kw)
        assert got == code and sentence in told["error"], told
        assert sorted(c.id for c in find_engine().containers()) == before
    refused("unchecked", 3, "its check has not passed on cpu")
    refused("sums", 4, "The target compose-double runs the model double, not sums", "--target", TARGET, model="sums")
    refused("sums", 7, f"port {port} is taken by the target {TARGET}", model="sums")
    refused("gpu", 9, "The engine cannot give a GPU")
    refused("small", 7, "The limit of memory is 1g; the check measured 2048 MiB in use under load")
    refused("one", 8, "is not a name for a target", "--target", "$(touch x)")
    refused("one", 8, "is not a name for a model", model="dou{{ble")
    with monkeypatch.context() as m:
        m.setenv("MLSERVE_COMPOSE", "/nowhere/docker-compose")
        refused("one", 7, "Docker Compose from version 2.20 on is needed")
    with monkeypatch.context() as m:
        m.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
        code, _, told = deploy(versions["one"])
        assert code == 6 and "No Docker Engine answers" in told["error"]
    with replacement.alone(TARGET):
        monkeypatch.setattr(replacement, "alone", lambda target, good=replacement.alone: good(target, 0.1))
        refused("one", 4, "Another command deploys to compose-double just now")


def test_a_port_that_a_stranger_has_is_refused(record, monkeypatch):
    versions, port = record
    engine = find_engine()
    monkeypatch.setattr(type(engine), "containers", lambda *a, **k: [])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        plan = replacement.planned("compose", "double", versions["one"], os.environ["MLSERVE_PROXY_IMAGE"])
        options = plan.options.model_copy(update={"port": taken.getsockname()[1]})
        with pytest.raises(replacement.LocalResource, match="is taken: address already in use"):
            replacement.refuse_taken(engine, dataclasses.replace(plan, options=options))


def test_status_and_releases_say_what_runs_and_where_it_is_not_what_was_wanted(record, capsys):
    versions, port = record
    running = answered(port)
    other = versions["one"] if running == versions["two"] else versions["two"]
    promote("double", other, allow_older=True)
    capsys.readouterr()
    assert run_command(["status", "double", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert set(row) == {"target", "version", "image", "package", "healthy", "since", "finding"}
    assert (row["version"], row["healthy"]) == (running, True)
    assert row["finding"] == f"Version {running} runs, and production is version {other}. mlserve deploy compose double brings it here."
    promote("double", running, allow_older=True)
    capsys.readouterr()
    assert run_command(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["finding"] == ""
    assert run_command(["releases", "double", "--json"]) == 0
    rows = {r["version"]: r for r in json.loads(capsys.readouterr().out)}
    assert rows[running]["aliases"] == ["production"] and rows[running]["deployed"][TARGET]["outcome"] == "ok"
    assert rows[versions["hangs"]]["deployed"][TARGET]["outcome"] == "failed" and rows[versions["unchecked"]]["status"] == "recorded"
    assert run_command(["logs", "double"]) == 0
    assert '"event"' in capsys.readouterr().out


@pytest.mark.matrix
def test_the_lines_for_a_shell_release_promote_and_deploy(environment, engine, release, tmp_path):
    "As they stand on the page about pipelines, with the smallest notebook"
    page = (ROOT / "nbs/tutorials/release_from_your_ci.ipynb").read_text()
    [script] = re.findall(r"```bash\n(.*?)```", "".join("".join(c["source"]) for c in json.loads(page)["cells"]), re.S)
    port = free_port()
    (tmp_path / "mlserve.toml").write_text(f"[deploy]\nport = {port}\n")
    shutil.copy(ROOT / "tests/notebooks/good.ipynb", tmp_path)
    try:
        done = run("bash", "-c", script, "release.sh", "good.ipynb", env={**environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"http://127.0.0.1:{port}", done.stderr[-3000:]
        version = json.loads((tmp_path / "release.json").read_text())["version"]
        assert httpx.get(f"http://127.0.0.1:{port}/v2/models/good", trust_env=False).json()["versions"] == [version]
        assert mlserve("rollback", "good", "--target", "compose-good", env=environment).returncode == 4, "nothing ran there before"
    finally:
        for container in engine.containers.list(all=True, filters={"label": "io.mlserve.target=compose-good"}):
            container.remove(force=True)
        for network in engine.networks.list(names=["compose-good"]):
            network.remove()


@pytest.fixture
def swarm(engine):
    "A Swarm of the engine's own, on a loopback address that no other engine of this machine has"
    address = f"127.{os.getpid() // 250 % 250 + 1}.{os.getpid() % 250 + 1}.1"
    engine.swarm.init(advertise_addr=address, listen_addr=f"{address}:{free_port()}")
    yield
    for service in engine.services.list():
        service.remove()
    while engine.containers.list(filters={"label": "com.docker.swarm.service.id"}):
        time.sleep(0.3)
    engine.swarm.leave(force=True)


@pytest.mark.matrix
def test_L6_R9_on_a_swarm_versions_replace_each_other_and_a_bad_one_is_taken_back(record, swarm, capsys):
    "Beside the target of Compose, on a port of its own, which it keeps"
    versions, _ = record
    one, two, port, target = versions["one"], versions["two"], free_port(), "swarm-double"
    code, first, told = deploy(one, "--port", str(port), engine="swarm")
    assert code == 0, told
    assert (first["target"], first["url"], first["version"]) == (target, f"http://127.0.0.1:{port}", one)
    with Load(port, 3, pause=0.05) as load:
        code, result, told = deploy(two, engine="swarm")
        assert code == 0, told
        print({s["name"]: s["seconds"] for s in result["steps"]})
        for name, expected, step in (("wrong", 5, "healthy"), ("hangs", 3, "healthy"), ("gone", 5, "pull")):
            code, _, told = deploy(versions[name], engine="swarm")
            assert (code, told["step"]) == (expected, step), told
            assert f"Version {two} keeps serving" in told["error"]
            clean(port, two, target)
        promote("double", two, allow_older=True)
        assert run_command(["rollback", "double", "--target", target]) == 0
        time.sleep(0.5)
    clean(port, one, target)
    print(f"{len(load.answers)} requests")
    assert not load.failures and len(load.answers) > 100, load.failures[:3]
    assert {v for v, _ in load.answers.values()} == {one, two}
    capsys.readouterr()
    assert run_command(["status", "double", "--json"]) == 0
    row = next(row for row in json.loads(capsys.readouterr().out) if row["target"] == target)
    assert (row["version"], row["healthy"], row["finding"]) == (one, True, "")
    assert run_command(["logs", "double", "--target", target]) == 0
    assert '"event"' in capsys.readouterr().out
    code, _, told = deploy(one, "--target", target, "--port", str(port))
    assert code == 4 and f"The target {target} is on swarm, not on compose" in told["error"], told
    code, _, told = deploy(one, "--target", "beside", "--port", str(port), engine="swarm")
    assert code == 7 and f"port {port} is taken by the target {target}" in told["error"], told
    with socket.create_server(("0.0.0.0", 0)) as taken:
        refusals = (("one", 7, "is taken: address already in use", "beside", taken.getsockname()[1]), ("unchecked", 3, "its check has not passed on cpu", target, port),
                    ("sums", 4, f"The target {target} runs the model double, not sums", target, port), ("gpu", 9, "The engine cannot give a GPU", target, port),
                    ("small", 7, "The limit of memory is 1g; the check measured 2048 MiB in use under load", target, port),
                    ("one", 8, "is not a name for a target on swarm: up to 56", "b" * 57, port))
        for version, expected, sentence, where, asked in refusals:
            code, _, told = deploy(versions[version], "--target", where, "--port", str(asked), engine="swarm", model="sums" if version == "sums" else "double")
            assert code == expected and sentence in told["error"], told
            clean(port, one, target)
    assert not any(seen.labels["io.mlserve.target"] == "beside" for seen in find_engine().containers())


def test_a_target_on_a_swarm_has_a_name_that_swarm_takes_with_what_is_put_behind_it(engine, swarm):
    from mlserve.errors import Refused
    from mlserve.release.deploy.deployment import checked_target
    longest = checked_target("b" * 56, "swarm")

    def make(name):
        engine.services.create("none.test/none@sha256:" + "0" * 64, name=name, mode={"Replicated": {"Replicas": 0}})
    for behind in ("_model9", "_proxy"):
        make(longest + behind)
    engine.networks.create(longest + "_inside", "overlay").remove()
    with pytest.raises(docker.errors.APIError, match="63"):
        make(longest + "b_model9")
    with pytest.raises(Refused, match="up to 56"):
        checked_target(longest + "b", "swarm")


def test_L6_control_an_old_one_that_is_stopped_before_the_switch_loses_requests(record, monkeypatch):
    versions, port = record
    assert deploy(versions["one"])[0] == 0
    running = answered(port)
    with Load(port, 4, pause=0.02) as load:
        def stopped_too_early(self):
            "What comes before the switch takes as long as it takes to lose one: within its retries the proxy saves those that the switch is quick enough for"
            self.engine.withdraw([s.id for s in self.scene.old])
            until(lambda: load.failures, 30)
        monkeypatch.setattr(replacement.Replacement, "do_identity", stopped_too_early)
        deploy(versions["one"] if running == versions["two"] else versions["two"])
        time.sleep(0.5)
    assert load.failures


@pytest.mark.matrix
def test_R9_control_a_new_one_that_nobody_asks_takes_over(record, monkeypatch):
    "An image that is ready, and says that it is another version than the one that was recorded"
    versions, port = record
    from mlserve.release.deploy.render import service
    assert deploy(versions["one"])[0] == 0
    running, good = answered(port), service.environment_of
    wanted = versions["one"] if running == versions["two"] else versions["two"]
    monkeypatch.setattr(service, "environment_of", lambda deployment: good(deployment) | {"MLSERVE_MODEL_VERSION": "99"})
    code, _, told = deploy(wanted)
    assert (code, told["step"]) == (5, "identity") and "says that it serves version 99" in told["error"]
    assert answered(port) == running
    monkeypatch.setattr(replacement.Replacement, "do_identity", lambda self: None)
    assert deploy(wanted)[0] == 0 and answered(port) == "99"
