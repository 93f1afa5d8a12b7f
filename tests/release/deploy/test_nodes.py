"""Pods that really run: what is rendered for Kubernetes, on two nodes of this machine, under steady load by clients that count."""
import contextlib
import dataclasses
import io
import json
import os
import shutil
import time
from collections import Counter

import pytest
import yaml
from cluster import BIN, in_older_words, of
from commands import ROOT, last_json, mlserve
from containers import WRONG
from emulators import counted_s3
from load import Load
from metrics_api import Watch, metrics_api
from nodes import GATEWAY, cluster_of, condition
from servers import until

from mlserve.cli import run_command
from mlserve.release.deploy.kubernetes import deploying

OPTIONS = {"cpus": 0.5, "memory": "512m", "replicas": 2, "max_replicas": 2}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, engine):
    with cluster_of(2, tmp_path_factory.mktemp("cluster"), engine) as made:
        yield made


@pytest.fixture(scope="module")
def versions(cluster, environment, release, doubles, double):
    "Versions of `double` on a real tracking server, by name; what the check of the example measured is theirs"
    from mlserve.release.record import log_package, mark, read_pair, record
    from mlserve.release.record.mlflow_store import client
    from mlserve.release.spec import ReleaseSpec
    with pytest.MonkeyPatch.context() as monkey:
        for name, value in {**environment, "KUBECONFIG": cluster.home / "config", "PATH": f"{BIN}:{os.environ['PATH']}"}.items():
            monkey.setenv(name, str(value))
        monkey.delenv("MLFLOW_RUN_ID", raising=False)
        planned = deploying.planned
        monkey.setattr(deploying, "planned", lambda *a, **kw: planned(*a, **kw, confirm=lambda pair: None))  # no release made these images
        found = read_pair("digits", release["version"]).checks["cpu"]
        finding, made = {name: found[name] for name in ("passed", "times")}, {}  # not the speed: the autoscaler's target is the default, which few clients exceed
        gone = doubles["one"].split("@")[0] + "@sha256:" + "1" * 64
        for name, image, package, more in (("one", doubles["one"], "", {}), ("two", doubles["two"], "", {}), ("wrong", doubles["wrong"], WRONG, {}), ("hangs", doubles["hangs"], "", {}),
                                           ("gone", gone, "", {}), ("scaled", doubles["one"], "", {"replicas": 1, "max_replicas": 3, "cpus": 0.1})):  # so slow that ten clients wait for it
            logged = log_package(double)
            spec = ReleaseSpec(name="double", notebook="double.ipynb", deploy=OPTIONS | more)
            client().set_tag(logged.run_id, "mlserve.spec", spec.model_dump_json())
            pair = record("double", dataclasses.replace(logged, digest=package or logged.digest), image, {"mlserve.device": "cpu"})
            mark(pair, "cpu", finding)
            made[name] = pair.version
        yield made


def command(*words):
    "Exit code, and the object that a command prints, or its last line"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(list(words))
    return code, json.loads(out.getvalue()) if code == 0 else last_json(err.getvalue())


def deploy(version, *more):
    return command("deploy", "kubernetes", "double", "--version", version, "--json", *more)


def running(cluster):
    "The versions of the pods that are ready"
    return sorted(pod["metadata"]["labels"]["app.kubernetes.io/version"] for pod in cluster.pods() if condition(pod, "Ready") == "True")


def everything(cluster):
    return cluster.http.get("/api/v1/namespaces/mlserve/pods").json()["items"]


def settled(cluster, *versions):
    "Every pod is of these versions, and nothing else is left"
    until(lambda: running(cluster) == sorted(versions) and len(everything(cluster)) == len(versions), 240)


def service(cluster):
    return cluster.got("service", "double", "-n", "mlserve")["spec"]["clusterIP"]


@pytest.mark.timeout(3600)
def test_versions_replace_each_other_bad_ones_are_taken_back_and_no_request_is_lost_or_run_twice(cluster, versions):
    one, two, took = versions["one"], versions["two"], {}

    def timed(name, act, *words):
        begun = time.monotonic()
        code, told = act(*words)
        took[name] = round(time.monotonic() - begun, 1)
        return code, told
    with Watch(cluster) as watch:
        code, told = timed("the first", deploy, one)
        assert code == 0, (told, cluster.kubectl("get", "events", "-A")[1])
        with Load(8080, 4, pause=0.05, host=service(cluster), enter=cluster.nodes[0].enter, life=5) as load:
            time.sleep(3)
            for name, version in (("one to two", two), ("two to one", one), ("one to two again", two)):
                code, told = timed(name, deploy, version)
                assert code == 0, told
                settled(cluster, version, version)
                print(name, {step["name"]: step["seconds"] for step in told["steps"]})
            replaced = time.monotonic()
            for bad, expected, step in (("wrong", 5, "healthy"), ("hangs", 3, "healthy"), ("gone", 5, "image")):
                code, told = timed(bad, deploy, versions[bad])
                assert (code, told["step"]) == (expected, step) and f"Version {two} keeps serving" in told["error"], told
                settled(cluster, two, two)
            beside = time.monotonic()
            code, told = timed("a canary", deploy, one, "--share", "33%")
            assert code == 0, told
            shared = time.monotonic()
            time.sleep(20)
            ended = time.monotonic()
            code, told = timed("the canary taken back", command, "rollback", "double", "--target", "kubernetes-double", "--json")
            assert code == 0, told
            settled(cluster, two, two)
            code, told = timed("back to one", command, "rollback", "double", "--target", "kubernetes-double", "--to", one, "--json")
            assert code == 0 and told["version"] == one, told
            settled(cluster, one, one)
            last = time.monotonic()
            time.sleep(3)
        time.sleep(1)
    print(took, f"{len(load.answers)} requests, the pods ran {watch.answered():.0f}, {len(load.failures)} failed")
    assert not load.failures and len(load.answers) > 1000, load.failures[:3]

    def answered(begin, end):
        return Counter(version for version, sent in load.answers.values() if begin < sent < end)
    assert answered(0, ended + 3600).keys() == {one, two}
    assert answered(replaced, beside).keys() == {two} and answered(last, last + 3600).keys() == {one}
    share = answered(shared, ended)
    print(f"the canary got {share[one]} of {share.total()} requests")
    assert 0.2 < share[one] / share.total() < 0.47
    assert len(load.answers) == watch.answered(), "answered twice, or without an answer"


@pytest.mark.timeout(3600)
def test_control_pods_that_end_at_once_lose_requests(cluster, versions):
    "A server that does not serve on after SIGTERM is still asked, until every node knows that it is gone"
    code, told = deploy(versions["one"])
    assert code == 0, told
    work = cluster.got("deployment", "double", "-n", "mlserve")
    for variable in work["spec"]["template"]["spec"]["containers"][0]["env"]:
        if variable["name"] == "MLSERVE_DRAIN_DELAY":
            variable["value"] = "0"
    assert cluster.kubectl("replace", "-f", "-", given=json.dumps(work))[0] == 0
    words = ("rollout", "status", "deployment/double", "-n", "mlserve", "--timeout=240s")
    assert cluster.kubectl(*words)[0] == 0
    with Load(8080, 8, host=service(cluster), enter=cluster.nodes[0].enter, life=1) as load:
        for _ in range(3):
            assert cluster.kubectl("rollout", "restart", "deployment/double", "-n", "mlserve")[0] == 0
            assert cluster.kubectl(*words)[0] == 0
    print(f"without the delay {len(load.failures)} of {len(load.answers) + len(load.failures)} requests failed")
    assert load.failures


@pytest.mark.timeout(3600)
def test_the_autoscaler_goes_to_three_and_back_by_the_time_spent_in_requests(cluster, versions):
    scaled = versions["scaled"]
    with Watch(cluster) as watch, metrics_api(cluster, watch, GATEWAY):
        code, told = deploy(scaled)
        assert code == 0, told
        scaler = cluster.got("horizontalpodautoscalers.v2beta2.autoscaling", "double", "-n", "mlserve")
        target = float(scaler["spec"]["metrics"][0]["pods"]["target"]["averageValue"])
        until(lambda: running(cluster) == [scaled], 600)  # from the two of the version before
        clients, begun = round(3.5 * target), time.monotonic()
        with Load(8080, clients, host=service(cluster), enter=cluster.nodes[0].enter, life=50) as load:
            until(lambda: running(cluster) == [scaled] * 3, 300)
            three = time.monotonic()
            time.sleep(15)
        ended = time.monotonic()
        until(lambda: running(cluster) == [scaled], 900)
        one = time.monotonic()
        time.sleep(1)
    steps = [(round(when - begun), count) for (when, count), (_, before) in zip(watch.counts[1:], watch.counts) if count != before and when > begun]
    print(f"target {target:g}, {clients} clients: three pods after {three - begun:.0f} s, one again {one - ended:.0f} s after the last request; pods by second {steps}; "
          f"{len(load.answers)} requests, {len(load.failures)} failed, the pods ran {watch.answered():.0f}")
    assert not load.failures, load.failures[:3]
    assert len(load.answers) == watch.answered()


PLAN = """
[deploy]
replicas = 6
max_replicas = 6
cpus = 0.5
memory = "1g"
cache = "packages"
credentials = "store"
"""
FOLDER = [  # what an administrator makes: a folder of each node, which every pod there has as its cache
    {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "packages"}, "spec": {
        "capacity": {"storage": "20Gi"}, "accessModes": ["ReadWriteMany"], "storageClassName": "node", "hostPath": {"path": "/srv/mlserve", "type": "Directory"}}},
    {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "packages", "namespace": "mlserve"}, "spec": {
        "volumeName": "packages", "accessModes": ["ReadWriteMany"], "storageClassName": "node", "resources": {"requests": {"storage": "20Gi"}}}}]


@pytest.fixture(scope="module")
def large(cluster, environment, tmp_path_factory):
    "The rendered files of a release whose 64 MB of weights are in a store, and what the store was asked for"
    folder = tmp_path_factory.mktemp("large")
    shutil.copy(ROOT / "tests/notebooks/large.ipynb", folder)
    (folder / "mlserve.toml").write_text(PLAN)
    with counted_s3(GATEWAY) as (env, asked):
        done = mlserve("release", folder / "large.ipynb", "--delivery", "store", "--store", "s3://models/released", "--json", env=environment | env, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(done.stdout)
        done = mlserve("render", "kubernetes", "large", "--version", result["version"], env=environment)
        assert done.returncode == 0, done.stderr
        documents = in_older_words(list(yaml.safe_load_all(done.stdout)))
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store", "namespace": "mlserve"}, "stringData": env}
        for node in cluster.nodes:
            (node.home / "srv/mlserve").mkdir()
            os.chown(node.home / "srv/mlserve", 10001, 10001)
        code, told = cluster.apply([of(documents, "Namespace"), secret, *FOLDER])
        assert code == 0, told
        yield documents, asked


def started(cluster, documents, asked):
    "Seconds until all pods of a file are ready, and what each node's pods asked the store for"
    cluster.empty(documents)
    until(lambda: not everything(cluster), 240)
    asked.clear()
    begun = time.monotonic()
    code, told = cluster.apply(documents)
    assert code == 0, told
    code, told = cluster.kubectl("rollout", "status", "deployment/large", "-n", "mlserve", "--timeout=300s")
    assert code == 0, (told, cluster.kubectl("get", "pods,events", "-n", "mlserve")[1])
    seconds = time.monotonic() - begun
    nodes = {pod["status"]["podIP"]: pod["spec"]["nodeName"] for pod in cluster.pods()}
    return seconds, [(nodes[client], requests, size) for client, (requests, size) in asked.items() if size], Counter(nodes.values())


@pytest.mark.timeout(3600)
def test_the_pods_of_a_node_fetch_the_weights_once_and_without_a_shared_cache_each_does(cluster, large):
    documents, asked = large
    seconds, fetches, pods = started(cluster, documents, asked)
    print(f"one cache a node: {seconds:.0f} s until {dict(pods)} are ready; the store was asked by {fetches}")
    assert pods == {"node-1": 3, "node-2": 3}
    assert sorted(node for node, _, _ in fetches) == ["node-1", "node-2"], "one fetch for three pods"
    assert all(64_000_000 < size < 65_000_000 for _, _, size in fetches)
    again, fetches, _ = started(cluster, documents, asked)
    print(f"filled: {again:.0f} s, {fetches}")
    assert not fetches
    alone = json.loads(json.dumps(documents))
    for volume in of(alone, "Deployment")["spec"]["template"]["spec"]["volumes"]:
        if volume.pop("persistentVolumeClaim", None):
            volume["emptyDir"] = {}
    seconds, fetches, _ = started(cluster, alone, asked)
    print(f"a cache for each pod: {seconds:.0f} s, {fetches}")
    assert len(fetches) == 6
