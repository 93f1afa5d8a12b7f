"""`mlserve deploy kubernetes` against a real control plane of Kubernetes 1.20: an API server with its store and controllers, kubectl, and a node in the test's hands.

The node does what a kubelet would tell: a pod of a good image has an address where a real server answers who it is, and is ready; those of bad images do
what bad images do. What the servers of a node can say by themselves, real pods and requests, is asked in `test_kubernetes_nodes.py`."""
import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import os
import subprocess
import threading
import time

import pytest
import yaml
from commands import last_json
from control_plane import BIN

from mlserve.cli import run_command
from mlserve.release.deploy.kubernetes import rolling
from mlserve.release.deploy.live.history import read_history, read_places
from mlserve.release.record import promote

GOOD, BAD = {"passed": True, "times": {"ready": 15}}, {"passed": True, "times": {"ready": 1}}  # 60 and 20 s to become ready
TARGET, NAMESPACE = "kubernetes-double", "mlserve-test"
LABELS = f"app.kubernetes.io/instance={TARGET},app.kubernetes.io/managed-by=mlserve"
STRATEGIC = {"content-type": "application/strategic-merge-patch+json"}


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


class Node(threading.Thread):
    "What a kubelet tells of its pods, by their images"
    NET = "198.18.7"

    def __init__(self, cluster):
        super().__init__(daemon=True)
        self.cluster, self.images, self.servers, self.told, self.going, self.next, self.paused = cluster, {}, {}, {}, True, 1, False
        self.seen = []  # every name, with its version
        subprocess.run(["ip", "route", "replace", "local", f"{self.NET}.0/24", "dev", "lo"], check=True)

    def who(self, pod):
        env = {e["name"]: e["value"] for e in pod["spec"]["containers"][0]["env"]}
        return env["MLSERVE_MODEL_VERSION"], env["MLSERVE_IMAGE"], env["MLSERVE_PACKAGE_DIGEST"]

    def status_of(self, pod, kind):
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        version, image, package = self.who(pod)
        waits = {"lost": ("ErrImagePull", f'failed to resolve reference "{image}": {image}: not found'), "barred": ("ImagePullBackOff", "Back-off pulling image"),
                 "unsecret": ("CreateContainerConfigError", 'secret "store" not found')}
        box = {"name": "model", "image": image, "imageID": "", "ready": False, "restartCount": 0}
        if kind == "unplaced":
            message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
            return {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]}
        if kind in waits:
            box["state"] = {"waiting": dict(zip(("reason", "message"), waits[kind], strict=True))}
        elif kind in ("crashes", "oom", "dies"):
            end = {"exitCode": {"crashes": 5, "oom": 137, "dies": 70}[kind], "reason": "OOMKilled" if kind == "oom" else "Error", "startedAt": now, "finishedAt": now}
            box |= {"restartCount": 1, "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": end}}
        else:
            box |= {"state": {"running": {"startedAt": now}}, "started": True}
        status = {"phase": "Running", "startTime": now, "containerStatuses": [box]}
        if kind in ("good", "other"):
            ip, name = f"{self.NET}.{self.next}", pod["metadata"]["name"]
            self.next = self.next % 250 + 1
            said = "99" if kind == "other" else version
            page = f'mlserve_info{{version="{said}",image="{image}",package="{package}"}} 1.0\n'.encode()
            self.servers[name] = served(lambda path: page if path == "/metrics" else None, (ip, 8080))
            box["ready"] = True
            status |= {"podIP": ip, "podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}]}
        return status

    def tick(self):
        pods = self.cluster.http.get("/api/v1/pods", params={"labelSelector": "app.kubernetes.io/managed-by=mlserve"}).json()["items"]
        names = {pod["metadata"]["name"] for pod in pods}
        for gone in set(self.servers) - names:
            self.servers.pop(gone).shutdown()
        for pod in pods:
            name, (version, image, _) = pod["metadata"]["name"], self.who(pod)
            kind = self.images.get(image.split("@")[1], "good")
            if self.told.get(name) == kind or "deletionTimestamp" in pod["metadata"]:
                continue
            if name not in self.told:
                self.seen.append((name, version))
            status = self.status_of(pod, kind)
            path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{name}/status"
            if self.cluster.http.patch(path, json={"status": status}, headers=STRATEGIC).status_code == 200:
                self.told[name] = kind

    def run(self):
        while self.going:
            if not self.paused:
                with contextlib.suppress(Exception):  # the server is being restarted
                    self.tick()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def registry():
    "A registry with images that are nothing but a manifest and labels; the digest of each by its name"
    blobs = {}

    def answer(path):
        return blobs.get(path.rsplit("/", 1)[1])
    server = served(answer)

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


SHAPES = {"whole": {"replicas": 3, "max_replicas": 3}, "scaled": {"replicas": 2, "max_replicas": 6}}


@pytest.fixture(scope="module")
def record(cluster, registry, double, tmp_path_factory):
    "Versions of `double` in a record of the tests' own, by name, a node that knows what becomes of each, and kubectl on the path"
    from mlserve.release.record import log_package, mark, record
    from mlserve.release.record.mlflow_store import client
    from mlserve.release.spec import ReleaseSpec
    home, node, versions = tmp_path_factory.mktemp("deploy"), Node(cluster), {}
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "test", "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
              "clusters": [{"name": "c", "cluster": {"server": cluster.url, "insecure-skip-tls-verify": True}}], "users": [{"name": "u", "user": {"token": "secret"}}]}
    (home / "config").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as monkey:
        for name, value in {"MLSERVE_STATE": str(home / "state"), "KUBECONFIG": str(home / "config"), "PATH": f"{BIN}:{os.environ['PATH']}", "DOCKER_HOST": "unix:///nowhere/docker.sock"}.items():
            monkey.setenv(name, value)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
            monkey.delenv(name, raising=False)
        planned = rolling.planned
        monkey.setattr(rolling, "planned", lambda *a, **kw: planned(*a, **{**kw, "confirm": lambda pair: None}))  # no release made these images

        def made(name, kind="good", finding=GOOD, model="double", package="", device="cpu", image="", shape="whole", **deploy):
            logged = log_package(double)
            spec = ReleaseSpec(name=model, notebook="double.ipynb", device=device, deploy={"port": 8081, "memory": "1g", "namespace": NAMESPACE, **SHAPES[shape], **deploy})
            client().set_tag(logged.run_id, "mlserve.spec", spec.model_dump_json())
            image = image or registry(f"{model}-{name}", package or logged.digest)
            node.images[image.split("@")[1]] = kind
            pair = record(model, dataclasses.replace(logged, digest=logged.digest), image, {"mlserve.device": device})
            if finding:
                mark(pair, device, finding)
            versions[name] = pair.version
        for name in ("one", "two"):
            made(name)
        made("three", shape="scaled")
        made("hangs", "hangs", BAD)
        for kind in ("lost", "barred", "unsecret", "crashes", "oom", "dies", "other", "unplaced"):
            made(kind, kind)
        repository = registry("nothing", "").split("@")[0]
        made("gone", image=f"{repository}@sha256:" + "1" * 64)
        made("wrong", package="sha256:" + "3" * 64)
        made("away", image="127.0.0.1:9/double@sha256:" + "2" * 64)
        made("unchecked", finding=None)
        made("elsewhere", namespace="mlserve-elsewhere")
        made("asks", cpus=0.5, context="prod")
        made("sums", model="sums")
        node.start()
        yield versions, node
        node.going = False
        node.join()
        subprocess.run(["ip", "route", "del", "local", f"{Node.NET}.0/24", "dev", "lo"], check=False)


def deploy(version, *more, model="double", command=("deploy", "kubernetes")):
    "The exit code of the command, what it printed, its last line, or all that it told"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command([*command, model, "--version", version, "--json", *more])
    return code, json.loads(out.getvalue()) if code == 0 else {}, last_json(err.getvalue()) if code else err.getvalue()


def asked(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(words)
    return code, out.getvalue(), err.getvalue()


def objects(cluster, kinds="deployments,services,serviceaccounts,networkpolicies,poddisruptionbudgets,horizontalpodautoscalers,pods,replicasets", labels=LABELS, namespace=NAMESPACE):
    code, told = cluster.kubectl("get", kinds, "-n", namespace, "-l", labels, "-o", "json")
    assert code == 0, told
    return json.loads(told)["items"]


def pods(cluster):
    "Version and readiness of each"
    items = [p for p in objects(cluster, "pods") if "deletionTimestamp" not in p["metadata"]]
    return sorted((p["metadata"]["annotations"]["mlserve.io/version"], any(c["type"] == "Ready" and c["status"] == "True" for c in p["status"].get("conditions", []))) for p in items)


def clean(cluster, version, count=3):
    "One version is left, ready, and every object of the target says that it is of it"
    assert pods(cluster) == [(version, True)] * count
    for item in objects(cluster, "deployments,services,serviceaccounts,networkpolicies,poddisruptionbudgets,horizontalpodautoscalers"):
        assert item["metadata"]["annotations"]["mlserve.io/version"] == version, item["kind"]
    [work] = objects(cluster, "deployments")
    status = work["status"]
    assert status["updatedReplicas"] == status["replicas"] == status["availableReplicas"] == work["spec"]["replicas"] == count


BROKEN = [("wrong", 5, "image", "holds the package sha256:333"), ("gone", 5, "image", "does not have the image"), ("away", 6, "image", "did not answer"),
          ("lost", 5, "healthy", "says a node"), ("unsecret", 7, "healthy", 'secret "store" not found'), ("crashes", 5, "healthy", "ended with code 5"),
          ("oom", 3, "healthy", "killed for memory"), ("hangs", 3, "healthy", "not ready within 20 s"), ("other", 5, "identity", "says that it serves version 99")]


def test_L6_R9_versions_replace_each_other_and_each_bad_one_is_taken_back_by_its_cause(cluster, record, capsys):
    versions, node = record
    one, two = versions["one"], versions["two"]
    code, first, told = deploy(one)
    assert code == 0, told
    assert {k: first[k] for k in ("target", "url", "version")} == {"target": TARGET, "url": f"http://double.{NAMESPACE}.svc:8081", "version": one}
    assert set(first) == {"target", "url", "version", "image", "package", "steps"}
    assert [s["name"] for s in first["steps"]] == ["image", "rehearse", "apply", "healthy", "identity", "rollout", "record"]
    clean(cluster, one)
    code, result, told = deploy(two)
    assert code == 0, told
    assert "of 3 new pods ready" in told and f"to {NAMESPACE} in test" in told
    print({s["name"]: s["seconds"] for s in result["steps"]})
    clean(cluster, two)
    kept = sorted(p["metadata"]["uid"] for p in objects(cluster, "pods"))
    for name, expected, step, words in BROKEN:
        begun = time.monotonic()
        code, _, told = deploy(versions[name])
        assert (code, told["step"]) == (expected, step) and words in told["error"], (name, told)
        assert f"Version {two} keeps serving" in told["error"]
        clean(cluster, two)
        print(f"{name:<10} exit {code} at {step:<9} {time.monotonic() - begun:5.1f} s")
        if name != "other":
            assert sorted(p["metadata"]["uid"] for p in objects(cluster, "pods")) == kept, "those that served were never touched"
    promote("double", two, allow_older=True)
    assert run_command(["rollback", "double", "--target", TARGET]) == 0
    clean(cluster, one)
    assert asked(["releases", "double", "--json"])[0] == 0
    history = {e.version: (e.outcome, e.code) for e in read_history("double", TARGET)}
    assert history == {one: ("ok", 0), two: ("rolled back", 0), **{versions[n]: ("failed", c) for n, c, *_ in BROKEN}}
    assert [(p.target, p.engine, p.namespace) for p in read_places("double")] == [(TARGET, "kubernetes", NAMESPACE)]


def test_what_cannot_be_deployed_is_refused_before_anything_is_touched(cluster, record, monkeypatch):
    versions, node = record
    assert deploy(versions["one"])[0] == 0
    for manifest in ({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "sums", "namespace": NAMESPACE}, "spec": {"ports": [{"port": 1}]}},):
        assert cluster.apply([manifest])[0] == 0

    def everything():
        kinds = "namespaces,deployments,services,serviceaccounts,networkpolicies,poddisruptionbudgets,horizontalpodautoscalers,pods"
        items = json.loads(cluster.kubectl("get", kinds, "--all-namespaces", "-o", "json")[1])["items"]
        return {(i["kind"], i["metadata"].get("namespace"), i["metadata"]["name"]): i["metadata"]["resourceVersion"] for i in items if i["kind"] not in ("Endpoints",)}
    before = everything()

    def refused(version, code, sentence, *more, **kw):
        got, _, told = deploy(versions[version], *more, **kw)
        assert got == code and sentence in told["error"], told
        assert everything() == before
    refused("unchecked", 3, "its check has not passed on cpu")
    refused("sums", 4, f"The target {TARGET} runs the model double, not sums", "--target", TARGET, model="sums")
    refused("sums", 4, f"The namespace {NAMESPACE} has a Service sums that is of somebody else", model="sums")
    refused("elsewhere", 4, f"is in the namespace {NAMESPACE}; version {versions['elsewhere']} asks for mlserve-elsewhere")
    refused("asks", 7, "kubectl does not have the context 'prod', which [deploy] names; it has: test")
    refused("one", 8, "is not a name for a target", "--target", "$(touch x)")
    refused("two", 2, "kubernetes was asked for", "--share", "10%")
    with monkeypatch.context() as m:
        m.setenv("PATH", "/usr/sbin")
        refused("two", 7, "kubectl is not on this machine")
    with monkeypatch.context() as m:
        m.setenv("KUBECONFIG", "/nowhere/config")
        refused("two", 7, "kubectl does not have a current context")
    with rolling.alone(TARGET), monkeypatch.context() as m:
        m.setattr(rolling, "alone", lambda target, good=rolling.alone: good(target, 0.1))
        refused("two", 4, f"Another command deploys to {TARGET} just now")
    assert cluster.kubectl("delete", "service", "sums", "-n", NAMESPACE)[0] == 0


def test_a_server_that_refuses_says_so_in_its_own_words_and_nothing_is_applied(cluster, record):
    "A quota, as a team has one: the rehearsal passes, since it counts only what is stored; the pods are refused"
    versions, node = record
    assert deploy(versions["one"])[0] == 0
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team", "namespace": NAMESPACE}, "spec": {"hard": {"limits.memory": "3Gi", "requests.cpu": "99"}}}
    assert cluster.apply([quota])[0] == 0
    until(lambda: json.loads(cluster.kubectl("get", "resourcequota", "team", "-n", NAMESPACE, "-o", "json")[1]).get("status", {}).get("used", {}).get("limits.memory") == "3Gi", 30)
    code, _, told = deploy(versions["two"])
    assert code == 7 and told["step"] == "healthy" and "exceeded quota" in told["error"] and f"Version {versions['one']} keeps serving" in told["error"], told
    clean(cluster, versions["one"])
    assert cluster.kubectl("delete", "resourcequota", "team", "-n", NAMESPACE)[0] == 0
    assert deploy(versions["two"])[0] == 0
    clean(cluster, versions["two"])


def test_only_what_is_of_the_target_is_touched(cluster, record):
    "A namespace that was there, and a second target of the same model in it"
    versions, node = record
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "mlserve-elsewhere", "labels": {"team": "vision"}}}
    other = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "double", "namespace": "mlserve-elsewhere"}}
    assert cluster.apply([namespace])[0] == cluster.apply([other])[0] == 0
    assert deploy(versions["one"])[0] == 0
    code, result, told = deploy(versions["two"], "--target", "beside", "--port", "8099")
    assert code == 0 and result["url"] == f"http://beside.{NAMESPACE}.svc:8099", told
    clean(cluster, versions["one"])
    found = objects(cluster, labels="app.kubernetes.io/instance=beside")
    assert {i["metadata"]["annotations"]["mlserve.io/version"] for i in found if i["kind"] != "ReplicaSet"} == {versions["two"]}
    code, _, told = deploy(versions["crashes"], "--target", "fresh")
    assert code == 5 and "keeps serving" not in told["error"], told
    until(lambda: not objects(cluster, labels="app.kubernetes.io/instance=fresh"), 30)
    code, out, err = asked(["status", "double", "--json"])
    rows = {r["target"]: r for r in json.loads(out)}
    assert code == 0 and {t: (r["version"], r["healthy"]) for t, r in rows.items()} == {TARGET: (versions["one"], True), "beside": (versions["two"], True)}, err
    assert cluster.kubectl("delete", "deployments,services,serviceaccounts,networkpolicies,poddisruptionbudgets,horizontalpodautoscalers", "-n", NAMESPACE, "-l", "app.kubernetes.io/instance=beside")[0] == 0
    code, result, told = deploy(versions["elsewhere"], "--target", "elsewhere")
    assert code == 0, told
    labels = json.loads(cluster.kubectl("get", "namespace", "mlserve-elsewhere", "-o", "json")[1])["metadata"]["labels"]
    assert labels.get("team") == "vision" and not any("pod-security" in key for key in labels), "left as it was"
    assert cluster.kubectl("delete", "namespace", "mlserve-elsewhere", "--wait=false")[0] == 0


def cut(version, after, node, pause=False):
    "Run the command in a process of its own, and kill it when it has told of a step"
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(into, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(run_command(["deploy", "kubernetes", "double", "--version", version]))
    os.close(into)
    with open(out) as lines:
        for line in lines:
            if line.startswith(after):
                os.kill(child, 9)
                break
    _, how = os.waitpid(child, 0)
    assert os.WIFSIGNALED(how), f"it ended before it told of {after}"


@pytest.mark.parametrize("after", ["to ", "image", "rehearse", "apply", "  ", "healthy", "identity"])
def test_R9_a_command_that_is_killed_leaves_one_serving_and_the_same_command_ends_well(cluster, record, after):
    "At seven moments; the cluster goes on by itself meanwhile, or has done so already"
    versions, node = record
    assert deploy(versions["one"])[0] == 0
    cut(versions["two"], after, node)
    serving = {version for version, ready in pods(cluster) if ready}
    assert serving and serving <= {versions["one"], versions["two"]}
    code, _, told = deploy(versions["two"])
    assert code == 0, told
    clean(cluster, versions["two"])


@pytest.mark.parametrize("bad, code", [("crashes", 5), ("hangs", 3), ("other", 5)])
def test_R9_a_bad_version_whose_command_was_killed_is_taken_back_by_the_next_one(cluster, record, bad, code):
    "The wish in the cluster is that of a version that was never proven: what to go back to is found in the record"
    versions, node = record
    assert deploy(versions["one"])[0] == 0
    cut(versions[bad], "apply", node)
    until(lambda: any(version == versions[bad] for version, _ in pods(cluster)), 30)
    found, out, _ = asked(["status", "double", "--json"])
    [row] = [r for r in json.loads(out) if r["target"] == TARGET]
    assert found == 0 and (f"version {versions[bad]} was applied" in row["finding"] or row["version"] == versions[bad])
    if bad == "other":  # ready, so the cluster goes on to the end
        until(lambda: pods(cluster) == [(versions[bad], True)] * 3, 60)
    got, _, told = deploy(versions[bad])
    assert got == code and f"Version {versions['one']} keeps serving" in told["error"], told
    clean(cluster, versions["one"])
    cut(versions[bad], "apply", node)
    got, _, told = deploy(versions["two"])
    assert got == 0, told
    clean(cluster, versions["two"])


def test_R9_a_target_that_somebody_else_changes_meanwhile_is_theirs(cluster, record):
    versions, node = record
    assert deploy(versions["one"])[0] == 0
    node.images = {**node.images}
    result = {}
    thread = threading.Thread(target=lambda: result.update(told=deploy(versions["hangs"])))
    thread.start()
    until(lambda: any(version == versions["hangs"] for version, _ in pods(cluster)), 60)
    [work] = objects(cluster, "deployments")
    patch = {"metadata": {"annotations": {"mlserve.io/version": "77"}}}
    assert cluster.kubectl("patch", "deployment", work["metadata"]["name"], "-n", NAMESPACE, "--patch", json.dumps(patch))[0] == 0
    thread.join()
    code, _, told = result["told"]
    assert code == 4 and "Somebody else changed the target" in told["error"] and "version 77 was applied" in told["error"] and "keeps serving" not in told["error"], told
    [work] = objects(cluster, "deployments")
    assert work["metadata"]["annotations"]["mlserve.io/version"] == "77", "nothing was taken back"
    assert deploy(versions["two"])[0] == 0
    clean(cluster, versions["two"])


def test_an_autoscaled_target_keeps_its_number_of_pods_from_version_to_version(cluster, record):
    "The autoscaler has set five; a file that names no number would mean one"
    versions, node = record
    assert deploy(versions["three"])[0] == 0
    clean(cluster, versions["three"], 3)
    [work] = objects(cluster, "deployments")
    assert cluster.kubectl("scale", f"deployment/{work['metadata']['name']}", "--replicas=5", "-n", NAMESPACE)[0] == 0
    until(lambda: pods(cluster) == [(versions["three"], True)] * 5, 30)
    code, _, told = deploy(versions["crashes"])  # of three, without an autoscaler
    assert code == 5, told
    until(lambda: pods(cluster) == [(versions["three"], True)] * len(pods(cluster)), 30)
    assert {i["kind"] for i in objects(cluster)} >= {"HorizontalPodAutoscaler"}, "it came back with the file that has it"
    assert deploy(versions["one"])[0] == 0
    clean(cluster, versions["one"], 3)
    assert not objects(cluster, "horizontalpodautoscalers"), "the file of this version has none"


def test_status_and_logs_say_what_runs_in_the_cluster(cluster, record):
    versions, node = record
    one, two = versions["one"], versions["two"]
    assert deploy(one)[0] == 0
    promote("double", two, allow_older=True)
    code, out, err = asked(["status", "double", "--json"])
    [row] = [r for r in json.loads(out) if r["target"] == TARGET]
    assert code == 0 and set(row) == {"target", "version", "image", "package", "healthy", "since", "finding"}, err
    assert (row["version"], row["healthy"], row["finding"]) == (one, True, f"Version {one} runs, and production is version {two}. mlserve deploy kubernetes double brings it here.")
    promote("double", one, allow_older=True)
    code, out, _ = asked(["status", "double"])
    assert code == 0 and TARGET in out and "brings it here" not in out
    assert "No Docker Engine" not in err, "no target of this record is on one"
    code, _, err = asked(["logs", "double", "--target", TARGET])
    assert code == 2 and "printed anything" in err, "this node keeps no logs"
