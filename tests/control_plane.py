"""A control plane of Kubernetes for the tests: etcd, an API server and the controllers, from what `make kubernetes` builds; no kubelet, no containers."""
import contextlib
import subprocess
import time

import httpx
import pytest
import yaml
from commands import ROOT
from servers import free_port, until

BIN = ROOT / "state/kubernetes/bin"


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


@pytest.fixture(scope="session")
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
