"""What we render, given to a real control plane of Kubernetes 1.20: an API server with its store and controllers, and nodes only in the test's hands.

The schemas of newer versions are asked elsewhere; here is what no schema has: the server's own rules, its defaults, and what the controllers do. 1.20 is
what can be built here; it lacks three things that we write, which are put into its words first. Pods become ready when the test says so."""
import contextlib
import json
import subprocess
import time

import httpx
import pytest
import yaml
from commands import ROOT
from plans import CASES, planned
from servers import free_port, until

from mlserve.release.deploy.rendering import to_text

BIN = ROOT / "state/kubernetes/bin"
VERSIONS = [version for version, engine in CASES if engine == "kubernetes"]


class Cluster:
    "Asks the server, as kubectl does and directly"

    def __init__(self, port):
        self.url = f"https://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, headers={"authorization": "Bearer secret"}, verify=False, trust_env=False, timeout=30)

    def kubectl(self, *words, given=""):
        "Exit code, and what it printed"
        done = subprocess.run([BIN / "kubectl", "--server", self.url, "--insecure-skip-tls-verify", "--token", "secret", *words], input=given, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr

    def apply(self, documents, *words):
        "Those of a file, or some of them"
        return self.kubectl("apply", *words, "-f", "-", given=yaml.safe_dump_all(documents))

    def empty(self, documents):
        "The namespace of a file, and no workload of another"
        namespace = next(d for d in documents if d["kind"] == "Namespace")
        assert self.apply([namespace])[0] == 0
        self.kubectl("delete", "deployments,horizontalpodautoscalers,poddisruptionbudgets", "--all", "--all-namespaces")
        until(lambda: not self.pods(), 30)

    def pods(self):
        "Those that are not on their way out"
        items = self.http.get("/api/v1/namespaces/mlserve/pods").json()["items"]
        return [pod for pod in items if "deletionTimestamp" not in pod["metadata"]]

    def ready(self, image):
        "What the kubelet of a node would say of the pods of an image"
        condition = {"type": "Ready", "status": "True", "lastTransitionTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        for pod in self.pods():
            if pod["spec"]["containers"][0]["image"] == image:
                self.http.patch(f"/api/v1/namespaces/mlserve/pods/{pod['metadata']['name']}/status", json={"status": {"phase": "Running", "conditions": [condition]}},
                                headers={"content-type": "application/strategic-merge-patch+json"}).raise_for_status()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "etcd, an API server and the controllers, on loopback ports of their own"
    assert (BIN / "kube-apiserver").exists(), "Run the tests by `make kubernetes`, which builds the control plane."
    home, store, peers, port = tmp_path_factory.mktemp("cluster"), free_port(), free_port(), free_port()
    at = "http://127.0.0.1:"
    subprocess.run(["openssl", "genrsa", "-out", home / "key", "2048"], check=True, capture_output=True)
    (home / "tokens").write_text("secret,admin,admin,system:masters\n")
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
              "clusters": [{"name": "c", "cluster": {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}}], "users": [{"name": "u", "user": {"token": "secret"}}]}
    (home / "config").write_text(yaml.safe_dump(config))
    commands = {
        "etcd": ["--data-dir", home / "etcd", "--listen-client-urls", f"{at}{store}", "--advertise-client-urls", f"{at}{store}", "--listen-peer-urls", f"{at}{peers}",
                 "--initial-advertise-peer-urls", f"{at}{peers}", "--initial-cluster", f"default={at}{peers}"],
        "kube-apiserver": ["--etcd-servers", f"{at}{store}", "--secure-port", str(port), "--bind-address", "127.0.0.1", "--cert-dir", home / "certs", "--token-auth-file", home / "tokens",
                           "--service-cluster-ip-range", "10.99.0.0/24", "--service-account-issuer", "https://kubernetes.default", "--service-account-key-file", home / "key",
                           "--service-account-signing-key-file", home / "key", "--authorization-mode", "RBAC"],
        "kube-controller-manager": ["--kubeconfig", home / "config", "--service-account-private-key-file", home / "key", "--secure-port", "0", "--port", "0", "--leader-elect=false"]}
    with contextlib.ExitStack() as stack:
        made = Cluster(port)
        for name, words in commands.items():
            log = stack.enter_context(open(home / f"{name}.log", "w"))
            process = subprocess.Popen([BIN / name, *words], stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            if name == "kube-apiserver":
                until(lambda: made.kubectl("get", "--raw", "/readyz")[0] == 0, 60)
        yield made
        made.http.close()


def rendered(version):
    return list(yaml.safe_load_all(to_text(planned(version, "kubernetes"))))


def of(documents, kind):
    return next(d for d in documents if d["kind"] == kind)


def in_older_words(documents):
    "What 1.20 does not know: two kinds were of beta versions, and of two fields nothing was known"
    for document in documents:
        if document["kind"] == "Deployment":
            for spread in document["spec"]["template"]["spec"]["topologySpreadConstraints"]:
                spread.pop("matchLabelKeys", None)
        if document["kind"] == "PodDisruptionBudget":
            document["apiVersion"] = "policy/v1beta1"
            document["spec"].pop("unhealthyPodEvictionPolicy")
        if document["kind"] == "HorizontalPodAutoscaler":
            document["apiVersion"] = "autoscaling/v2beta2"
    return documents


def within(sent, stored):
    "Whether all that was sent is stored as it was sent; numbers of memory and processors may be spelled otherwise"
    if isinstance(sent, dict):
        return [f"{key}.{w}" for key, value in sent.items() for w in (within(value, stored[key]) if key in stored else ["is gone"] if value else [])]
    if isinstance(sent, list):
        return [w for a, b in zip(sent, stored, strict=True) for w in within(a, b)]
    return [] if str(sent) == str(stored) else [f" was {sent}, is {stored}"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_server_takes_what_is_rendered_and_keeps_every_field(cluster, version):
    documents = in_older_words(rendered(version))
    cluster.empty(documents)
    code, told = cluster.apply(documents, "--dry-run=server")
    assert code == 0, told
    code, told = cluster.apply(documents)
    assert code == 0, told
    for document in documents:
        stored = json.loads(cluster.kubectl("get", "-o", "json", "-f", "-", given=yaml.safe_dump(document))[1])["items"][0]
        assert (stored["kind"], stored["apiVersion"]) == (document["kind"], document["apiVersion"])
        wrong = [w for w in within(document["spec"], stored["spec"]) if ".cpu" not in w and "memory" not in w] if "spec" in document else []
        assert not wrong, (document["kind"], wrong)


def test_what_this_old_server_does_not_know_is_told_by_name(cluster):
    documents = rendered("digits")
    assert cluster.apply([of(documents, "Namespace")])[0] == 0
    for kind, words in (("Deployment", 'unknown field "matchLabelKeys"'), ("PodDisruptionBudget", 'no matches for kind "PodDisruptionBudget" in version "policy/v1"'),
                        ("HorizontalPodAutoscaler", 'no matches for kind "HorizontalPodAutoscaler" in version "autoscaling/v2"')):
        found = [d for d in documents if d["kind"] == kind] or [d for d in rendered("registry") if d["kind"] == kind]
        code, told = cluster.apply(found, "--dry-run=server")
        assert code == 1 and words in told, told


def test_control_a_server_refuses_what_schemas_let_through(cluster):
    documents = in_older_words(rendered("digits"))
    assert cluster.apply([of(documents, "Namespace")])[0] == 0
    work = of(documents, "Deployment")
    container = work["spec"]["template"]["spec"]["containers"][0]
    container["resources"]["requests"] = {"memory": "99Gi", "cpu": "99"}
    container["startupProbe"]["successThreshold"] = 3
    work["spec"]["selector"]["matchLabels"] = {"app.kubernetes.io/name": "another"}
    code, told = cluster.apply([work], "--dry-run=server")
    assert code == 1 and all(words in told for words in ("must be less than or equal to", "must be 1", "`selector` does not match")), told


def test_a_bad_version_leaves_the_one_before_and_the_earlier_file_applied_again_brings_it_back(cluster):
    "Deployment with maxSurge 1 and maxUnavailable 0: an image that never becomes ready takes nothing away; `undo` is not needed"
    first = in_older_words(rendered("digits"))
    name, count = of(first, "Deployment")["metadata"]["name"], 3
    of(first, "Deployment")["spec"]["replicas"] = count
    first = [d for d in first if d["kind"] != "HorizontalPodAutoscaler"]
    good = of(first, "Deployment")["spec"]["template"]["spec"]["containers"][0]["image"]
    bad = good[:-64] + "b" * 64
    second = json.loads(json.dumps(first).replace(good, bad))

    def images():
        return sorted(p["spec"]["containers"][0]["image"] for p in cluster.pods())

    def rolled_out(seconds):
        return cluster.kubectl("rollout", "status", f"deployment/{name}", "-n", "mlserve", f"--timeout={seconds}s")
    cluster.empty(first)
    assert cluster.apply(first)[0] == 0
    until(lambda: images() == [good] * count, 30)
    cluster.ready(good)
    begun = time.monotonic()
    assert rolled_out(60)[0] == 0
    assert cluster.apply(second)[0] == 0
    until(lambda: bad in images(), 30)
    code, told = rolled_out(5)
    assert code == 1 and "timed out" in told
    assert images() == sorted([good] * count + [bad]), "one more beside all of the old"
    assert cluster.apply(first)[0] == 0
    cluster.ready(good)
    code, told = rolled_out(60)
    assert code == 0, told
    until(lambda: images() == [good] * count, 30)
    print(f"{time.monotonic() - begun:.1f} s from the first that was ready to the last of the bad ones gone")
    sets = json.loads(cluster.kubectl("get", "replicasets", "-n", "mlserve", "-o", "json")[1])["items"]
    assert sorted(s["spec"]["replicas"] for s in sets if s["spec"]["template"]["spec"]["containers"][0]["image"] in (good, bad)) == [0, count]
