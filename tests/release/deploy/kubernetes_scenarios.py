"""What `mlserve deploy kubernetes` must do, asked of a world: a real control plane in `make kubernetes`, and a stand-in for kubectl in `make test`."""
import contextlib
import hashlib
import http.server
import io
import json
import os
import signal
import sys
import threading
import time

import pytest
import yaml
from commands import last_json
from servers import until

from mlserve.cli import run_command
from mlserve.release.deploy.kubernetes import deploying
from mlserve.release.deploy.kubernetes import kubectl as kubectl_room
from mlserve.release.deploy.live.history import read_history, read_places
from mlserve.release.record import promote

GOOD, BAD = {"passed": True, "times": {"ready": 15}}, {"passed": True, "times": {"ready": 1}}  # 60 and 20 s to become ready
TARGET, NAMESPACE = "kubernetes-double", "mlserve-test"
LABELS = f"app.kubernetes.io/instance={TARGET},app.kubernetes.io/managed-by=mlserve"
ALL = "deployments,services,serviceaccounts,networkpolicies,poddisruptionbudgets,horizontalpodautoscalers"
SHAPES = {"whole": {"replicas": 3, "max_replicas": 3}, "scaled": {"replicas": 2, "max_replicas": 6}}


def served(answer, address=("127.0.0.1", 0)):
    "A server that answers each path with what a function gives; None is 404"
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = answer(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("content-length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *a):
            pass
    server = http.server.ThreadingHTTPServer(address, Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@contextlib.contextmanager
def registry():
    "A registry with images that are nothing but a manifest and labels; makes the reference of one"
    blobs = {}
    server = served(lambda path: blobs.get(path.rsplit("/", 1)[1]))

    def put(value):
        data = json.dumps(value).encode()
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return digest, len(data)

    def image(name, package):
        config, size = put({"architecture": "amd64", "os": "linux", "config": {"Labels": {"io.mlserve.package": package, "test": name}}, "rootfs": {"type": "layers", "diff_ids": []}})
        kind = "application/vnd.oci.image.manifest.v1+json"
        digest, _ = put({"schemaVersion": 2, "mediaType": kind, "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": size}, "layers": []})
        return f"127.0.0.1:{server.server_port}/double@{digest}"
    yield image
    server.shutdown()


class World:
    "A cluster, by the kubectl of this environment, and versions in a record; `behave` says what becomes of the pods of an image"

    def __init__(self, behave):
        self.behave, self.versions = behave, {}

    def kubectl(self, *words, given=""):
        "What it printed"
        done = kubectl_room.run_kubectl(["kubectl", *words], given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def objects(self, kinds=ALL, labels=LABELS, namespace=NAMESPACE):
        return json.loads(self.kubectl("get", kinds, "-n", namespace, "-l", labels, "-o", "json"))["items"]

    def add(self, manifest):
        self.kubectl("apply", "-f", "-", given=yaml.safe_dump(manifest))

    def remove(self, items, namespace=NAMESPACE):
        for item in items:
            self.kubectl("delete", "-n", namespace, "--wait=false", f"{item['kind']}/{item['metadata']['name']}")

    def change(self, change):
        "What somebody else does to the Deployment of the target"
        [work] = self.objects("deployments")
        change(work)
        self.kubectl("replace", "-n", NAMESPACE, "-f", "-", given=json.dumps(work))

    def everything(self):
        "What is wanted of every object in the cluster, and the name of every pod"
        items = json.loads(self.kubectl("get", f"namespaces,pods,{ALL}", "--all-namespaces", "-o", "json"))["items"]
        return sorted(json.dumps([item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"], item["metadata"].get("labels"), item["kind"] != "Pod" and item.get("spec")]) for item in items)

    def uids(self):
        return sorted(pod["metadata"]["uid"] for pod in self.objects("pods"))

    def pods(self):
        "Version and readiness of each"
        items = [pod for pod in self.objects("pods") if "deletionTimestamp" not in pod["metadata"]]
        return sorted((pod["metadata"]["annotations"]["mlserve.io/version"], any(c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", []))) for pod in items)

    def until_pods(self, wanted):
        "Wait until these are there, and no others"
        end = time.monotonic() + 60
        while (found := self.pods()) != wanted:
            assert time.monotonic() < end, (found, [work["status"] for work in self.objects("deployments")])
            time.sleep(0.2)

    def clean(self, version, count=3):
        "One version is left, ready, and every object of the target says that it is of it"
        assert self.pods() == [(version, True)] * count
        for item in self.objects():
            assert item["metadata"]["annotations"]["mlserve.io/version"] == version, item["kind"]
        [work] = self.objects("deployments")
        status = work["status"]
        assert status["updatedReplicas"] == status["replicas"] == status["availableReplicas"] == work["spec"]["replicas"] == count

    def record(self, image_of, double):
        "Versions of `double`, by name"
        from mlserve.package import load_package
        from mlserve.release.record import log_package, mark, record
        from mlserve.release.record.mlflow_store import client
        from mlserve.release.spec import ReleaseSpec
        runs, digest = {}, load_package(double).digest

        def made(name, kind="good", finding=GOOD, model="double", package="", image="", shape="whole", **deploy):
            spec = ReleaseSpec(name=model, notebook="double.ipynb", deploy={"port": 8081, "memory": "1g", "namespace": NAMESPACE, **SHAPES[shape], **deploy}).model_dump_json()
            if spec not in runs:  # a run holds the spec
                runs[spec] = log_package(double)
                client().set_tag(runs[spec].run_id, "mlserve.spec", spec)
            image = image or image_of(f"{model}-{name}", package or digest)
            self.behave(image.split("@")[1], kind)
            pair = record(model, runs[spec], image, {"mlserve.device": "cpu"})
            if finding:
                mark(pair, "cpu", finding)
            self.versions[name] = pair.version
        for name in ("one", "two"):
            made(name)
        made("three", shape="scaled")
        made("hangs", "hangs", BAD)
        for kind in ("lost", "unsecret", "crashes", "oom", "other"):
            made(kind, kind)
        made("gone", image=image_of("nothing", "").split("@")[0] + "@sha256:" + "1" * 64)
        made("wrong", package="sha256:" + "3" * 64)
        made("away", image="127.0.0.1:9/double@sha256:" + "2" * 64)
        made("unchecked", finding=None)
        made("elsewhere", namespace="mlserve-elsewhere")
        made("asks", context="prod")
        made("sums", model="sums")
        for name in ("righted", "rightly"):
            made(name, namespace="mlserve-rights")


@contextlib.contextmanager
def environment(home, **more):
    "The variables of a user whose record lies in a folder, and who has no Docker Engine"
    with pytest.MonkeyPatch.context() as monkey:
        for name, value in {"MLSERVE_STATE": str(home / "state"), "DOCKER_HOST": "unix:///nowhere/docker.sock", **more}.items():
            monkey.setenv(name, str(value))
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
            monkey.delenv(name, raising=False)
        planned = deploying.planned
        monkey.setattr(deploying, "planned", lambda *a, **kw: planned(*a, **kw, confirm=lambda pair: None))  # no release made these images
        yield monkey


def deploy(version, *more, model="double"):
    "The exit code of the command, what it printed, its last line, or all that it told"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(["deploy", "kubernetes", model, "--version", version, "--json", *more])
    print(err.getvalue())
    return code, json.loads(out.getvalue()) if code == 0 else {}, last_json(err.getvalue()) if code else err.getvalue()


def asked(*words):
    "Exit code, stdout and stderr of a command"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(list(words))
    return code, out.getvalue(), err.getvalue()


def row_of(target=TARGET):
    "What status says of a target"
    code, out, err = asked("status", "double", "--json")
    assert code == 0, err
    return next(row for row in json.loads(out) if row["target"] == target)


BROKEN = [("wrong", 5, "image", "holds the package sha256:333"), ("gone", 5, "image", "does not have the image"), ("away", 6, "image", "did not answer"),
          ("lost", 5, "healthy", "says a node"), ("unsecret", 7, "healthy", 'secret "store" not found'), ("crashes", 5, "healthy", "ended with code 5"),
          ("oom", 3, "healthy", "killed for memory"), ("hangs", 3, "healthy", "not ready within 20 s"), ("other", 5, "identity", "says that it serves version 99")]


def test_L6_R9_versions_replace_each_other_and_each_bad_one_is_taken_back_by_its_cause(world):
    versions = world.versions
    one, two = versions["one"], versions["two"]
    code, first, told = deploy(one)
    assert code == 0, told
    assert {k: first[k] for k in ("target", "url", "version")} == {"target": TARGET, "url": f"http://double.{NAMESPACE}.svc:8081", "version": one}
    assert set(first) == {"target", "url", "version", "image", "package", "steps"}
    assert [s["name"] for s in first["steps"]] == ["image", "rehearse", "apply", "healthy", "identity", "rollout", "record"]
    world.clean(one)
    code, result, told = deploy(two)
    assert code == 0, told
    assert f"to {NAMESPACE} in test" in told, told
    print({s["name"]: s["seconds"] for s in result["steps"]})
    world.clean(two)
    kept = world.uids()
    for name, expected, step, words in BROKEN:
        begun = time.monotonic()
        code, _, told = deploy(versions[name])
        assert (code, told["step"]) == (expected, step) and words in told["error"], (name, told)
        assert f"Version {two} keeps serving" in told["error"]
        world.clean(two)
        print(f"{name:<10} exit {code} at {step:<9} {time.monotonic() - begun:5.1f} s")
        if name != "other":
            assert world.uids() == kept, "those that served were never touched"
    promote("double", two, allow_older=True)
    assert run_command(["rollback", "double", "--target", TARGET]) == 0
    world.clean(one)
    assert asked("releases", "double", "--json")[0] == 0
    history, wanted = {e.version: (e.outcome, e.code) for e in read_history("double", TARGET)}, {one: ("ok", 0), two: ("rolled back", 0), **{versions[n]: ("failed", c) for n, c, *_ in BROKEN}}
    assert {version: history[version] for version in wanted} == wanted
    assert (TARGET, "kubernetes", NAMESPACE) in [(p.target, p.engine, p.namespace) for p in read_places("double")]


def test_what_cannot_be_deployed_is_refused_before_anything_is_touched(world, monkeypatch):
    versions = world.versions
    assert deploy(versions["one"])[0] == 0
    stranger = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "sums", "namespace": NAMESPACE}, "spec": {"ports": [{"port": 1}]}}
    world.add(stranger)
    before = world.everything()

    def refused(version, code, sentence, *more, **kw):
        got, _, told = deploy(versions[version], *more, **kw)
        assert got == code and sentence in told["error"], told
        assert world.everything() == before
    refused("unchecked", 3, "its check has not passed on cpu")
    refused("sums", 4, f"The target {TARGET} runs the model double, not sums", "--target", TARGET, model="sums")
    refused("sums", 4, f"The namespace {NAMESPACE} has a Service sums that is of somebody else", model="sums")
    refused("elsewhere", 4, f"is in the namespace {NAMESPACE}; version {versions['elsewhere']} asks for mlserve-elsewhere")
    refused("asks", 7, "kubectl does not have the context 'prod', which [deploy] names; it has: test")
    refused("one", 8, "is not a name for a target", "--target", "$(touch x)")
    refused("two", 4, "Beside 3 pods, 1 more would get 25 % of the requests, not 10 %", "--share", "10%")
    refused("one", 4, f"No other version serves on the target {TARGET}", "--share", "25%")
    with deploying.alone(TARGET), monkeypatch.context() as m:
        m.setattr(deploying, "alone", lambda target, good=deploying.alone: good(target, 0.1))
        refused("two", 4, f"Another command deploys to {TARGET} just now")
    world.remove([stranger])


def test_only_what_is_of_the_target_is_touched(world):
    "A namespace that was there, and a second target of the same model in it"
    versions = world.versions
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "mlserve-elsewhere", "labels": {"team": "vision"}}}
    other = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "double", "namespace": "mlserve-elsewhere"}}
    world.add(namespace)
    world.add(other)
    assert deploy(versions["one"])[0] == 0
    code, result, told = deploy(versions["two"], "--target", "beside", "--port", "8099")
    assert code == 0 and result["url"] == f"http://beside.{NAMESPACE}.svc:8099", told
    world.clean(versions["one"])
    found = world.objects(labels="app.kubernetes.io/instance=beside")
    assert {i["metadata"]["annotations"]["mlserve.io/version"] for i in found} == {versions["two"]}
    code, _, told = deploy(versions["crashes"], "--target", "fresh")
    assert code == 5 and "keeps serving" not in told["error"], told
    until(lambda: not world.objects(labels="app.kubernetes.io/instance=fresh"), 30)
    code, out, err = asked("status", "double", "--json")
    rows = {r["target"]: r for r in json.loads(out)}
    assert code == 0 and {t: (r["version"], r["healthy"]) for t, r in rows.items()} == {TARGET: (versions["one"], True), "beside": (versions["two"], True)}, err
    world.remove(found)
    code, result, told = deploy(versions["elsewhere"], "--target", "elsewhere")
    assert code == 0, told
    labels = json.loads(world.kubectl("get", "namespace", "mlserve-elsewhere", "-o", "json"))["metadata"]["labels"]
    assert labels.get("team") == "vision" and not any("pod-security" in key for key in labels), "left as it was"
    world.remove(world.objects(labels="app.kubernetes.io/instance=elsewhere", namespace="mlserve-elsewhere"), "mlserve-elsewhere")


class Kills(io.TextIOBase):
    "A stderr that kills its process when a line begins like that"

    def __init__(self, after):
        self.after = after

    def write(self, text):
        if text.startswith(self.after):
            os.kill(os.getpid(), signal.SIGKILL)
        return len(text)


def cut(version, after):
    "Run the command in a process of its own, which is killed when it tells of a step"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr = Kills(after)
        os._exit(run_command(["deploy", "kubernetes", "double", "--version", version]))
    _, how = os.waitpid(child, 0)
    assert os.WIFSIGNALED(how), f"it ended before it told of {after}"


@pytest.mark.parametrize("after", ["to ", "image", "rehearse", "apply", "healthy", "identity", "rollout"])
def test_R9_a_command_that_is_killed_leaves_one_serving_and_the_same_command_ends_well(world, after):
    "At seven moments; the cluster goes on by itself meanwhile, or has done so already"
    versions = world.versions
    assert deploy(versions["one"])[0] == 0
    cut(versions["two"], after)
    serving = {version for version, ready in world.pods() if ready}
    assert serving and serving <= {versions["one"], versions["two"]}
    code, _, told = deploy(versions["two"])
    assert code == 0, told
    world.clean(versions["two"])


@pytest.mark.parametrize("bad, code", [("crashes", 5), ("hangs", 3), ("other", 5)])
def test_R9_a_bad_version_whose_command_was_killed_is_taken_back_by_the_next_one(world, bad, code):
    "The wish in the cluster is that of a version that was never proven: what to go back to is found in the record"
    versions = world.versions
    assert deploy(versions["one"])[0] == 0
    cut(versions[bad], "apply")
    until(lambda: any(version == versions[bad] for version, _ in world.pods()), 30)
    row = row_of()
    assert f"version {versions[bad]} was applied" in row["finding"] or row["version"] == versions[bad]
    if bad == "other":  # ready, so the cluster goes on to the end
        until(lambda: world.pods() == [(versions[bad], True)] * 3, 60)
    got, _, told = deploy(versions[bad])
    assert got == code and f"Version {versions['one']} keeps serving" in told["error"], told
    world.clean(versions["one"])
    cut(versions[bad], "apply")
    got, _, told = deploy(versions["two"])
    assert got == 0, told
    world.clean(versions["two"])


def test_R9_a_target_that_somebody_else_changes_meanwhile_is_theirs(world):
    versions = world.versions
    assert deploy(versions["one"])[0] == 0
    result = {}
    thread = threading.Thread(target=lambda: result.update(told=deploy(versions["hangs"])))
    thread.start()
    until(lambda: any(version == versions["hangs"] for version, _ in world.pods()), 60)
    world.change(lambda work: work["metadata"]["annotations"].update({"mlserve.io/version": "77"}))
    thread.join()
    code, _, told = result["told"]
    assert code == 4 and "Somebody else changed the target" in told["error"] and "version 77 was applied" in told["error"] and "keeps serving" not in told["error"], told
    [work] = world.objects("deployments")
    assert work["metadata"]["annotations"]["mlserve.io/version"] == "77", "nothing was taken back"
    assert deploy(versions["two"])[0] == 0
    world.clean(versions["two"])


def test_an_autoscaled_target_keeps_its_number_of_pods_from_version_to_version(world):
    "The autoscaler has set five; a file that names no number would mean one"
    versions = world.versions
    assert deploy(versions["one"])[0] == 0
    assert deploy(versions["three"])[0] == 0
    world.clean(versions["three"], 3)
    world.change(lambda work: work["spec"].update(replicas=5))
    world.until_pods([(versions["three"], True)] * 5)
    code, _, told = deploy(versions["crashes"])  # of three, without an autoscaler
    assert code == 5, told
    assert {version for version, _ in world.pods()} == {versions["three"]}
    assert {i["kind"] for i in world.objects()} >= {"HorizontalPodAutoscaler"}, "it came back with the file that has it"
    assert deploy(versions["one"])[0] == 0
    world.clean(versions["one"], 3)
    assert not world.objects("horizontalpodautoscalers"), "the file of this version has none"


def test_a_canary_gets_its_share_by_the_number_of_pods_and_goes_back_or_takes_all(world):
    versions = world.versions
    one, two = versions["one"], versions["two"]
    assert deploy(one)[0] == 0
    kept = world.uids()
    promote("double", one, allow_older=True)
    code, result, told = deploy(two, "--share", "25%")
    assert code == 0, told
    assert [s["name"] for s in result["steps"]] == ["image", "rehearse", "apply", "healthy", "identity", "rollout", "record"]
    assert world.pods() == [(one, True)] * 3 + [(two, True)] and set(kept) < set(world.uids()), "those that serve are not touched"
    old, new = [row for row in json.loads(asked("status", "double", "--json")[1]) if row["target"] == TARGET]
    assert (old["version"], old["share"], old["finding"], new["version"], new["share"], new["healthy"]) == (one, 75, "", two, 25, True)
    assert new["finding"].startswith(f"Version {two} gets 25 % of the requests. For all: mlserve promote double --version {two}; mlserve deploy kubernetes double.")
    assert {e.version: e.outcome for e in read_history("double", TARGET)}[two] == "canary"
    code, _, told = deploy(versions["crashes"], "--share", "25%")
    assert code == 4 and f"share the requests on the target {TARGET} already" in told["error"], told
    code, _, told = deploy(versions["crashes"])
    assert code == 5 and f"Version {one} keeps serving" in told["error"], told
    assert world.pods() == [(one, True)] * 3 + [(two, True)], "the canary stays beside what serves"
    assert run_command(["rollback", "double", "--target", TARGET]) == 0
    world.clean(one)
    assert world.uids() == kept and {e.version: e.outcome for e in read_history("double", TARGET)}[two] == "rolled back"
    code, _, told = deploy(versions["other"], "--share", "50%")
    assert (code, told["step"]) == (5, "identity") and f"Version {one} keeps serving" in told["error"], told
    world.clean(one)
    assert world.uids() == kept
    assert deploy(two, "--share", "50%")[0] == 0
    assert world.pods() == [(one, True)] * 3 + [(two, True)] * 3
    code, _, told = deploy(two)
    assert code == 0, told
    world.clean(two)
    assert {e.version: e.outcome for e in read_history("double", TARGET)}[two] == "ok"


def test_status_and_logs_say_what_runs_in_the_cluster(world):
    versions = world.versions
    one, two = versions["one"], versions["two"]
    assert deploy(one)[0] == 0
    promote("double", two, allow_older=True)
    row = row_of()
    assert set(row) == {"target", "version", "image", "package", "healthy", "since", "finding"}
    assert (row["version"], row["healthy"], row["finding"]) == (one, True, f"Version {one} runs, and production is version {two}. mlserve deploy kubernetes double brings it here.")
    promote("double", one, allow_older=True)
    code, out, err = asked("status", "double")
    assert code == 0 and TARGET in out and "brings it here" not in out
    assert "No Docker Engine" not in err, "no target of this record is on one"
