"""A control plane of Kubernetes 1.20, and its words for what we render; what has no node in it needs nothing else."""
import contextlib
import json
import subprocess
import time

import httpx
import yaml
from commands import ROOT
from servers import free_port, until

from mlserve.release.deploy.kubernetes.dialect import for_server

BIN = ROOT / "state/kubernetes/bin"


class Cluster:
    "Asks the server, as kubectl does and directly"

    def __init__(self, url, home):
        self.url, self.home = url, home
        self.http = httpx.Client(base_url=url, headers={"authorization": "Bearer secret"}, verify=False, trust_env=False, timeout=30)

    def kubectl(self, *words, given=""):
        "Exit code, and what it printed"
        done = subprocess.run([BIN / "kubectl", "--kubeconfig", self.home / "config", *words], input=given, capture_output=True, text=True, timeout=900)
        return done.returncode, done.stdout + done.stderr

    def apply(self, documents, *words):
        "Those of a file, or some of them"
        return self.kubectl("apply", *words, "-f", "-", given=yaml.safe_dump_all(documents))

    def got(self, *words):
        "What `kubectl get` tells"
        code, told = self.kubectl("get", *words, "-o", "json")
        assert code == 0, told
        return json.loads(told)

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


def commands(home, address, port):
    "The programs of a control plane, and how each is told where the others are"
    store, peers, server = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}", f"https://{address}:{port}"
    subprocess.run(["openssl", "genrsa", "-out", home / "key", "2048"], check=True, capture_output=True)
    (home / "tokens").write_text("secret,admin,admin,system:masters\n")
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
              "clusters": [{"name": "c", "cluster": {"server": server, "insecure-skip-tls-verify": True}}], "users": [{"name": "u", "user": {"token": "secret"}}]}
    (home / "config").write_text(yaml.safe_dump(config))
    return {
        "etcd": ["--data-dir", home / "etcd", "--listen-client-urls", store, "--advertise-client-urls", store, "--listen-peer-urls", peers,
                 "--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"],
        "kube-apiserver": ["--etcd-servers", store, "--secure-port", str(port), "--bind-address", address, "--advertise-address", address, "--cert-dir", home / "certs",
                           "--token-auth-file", home / "tokens", "--service-cluster-ip-range", "10.99.0.0/24", "--service-account-issuer", "https://kubernetes.default",
                           "--service-account-key-file", home / "key", "--service-account-signing-key-file", home / "key", "--authorization-mode", "RBAC",
                           "--enable-aggregator-routing", "--kubelet-preferred-address-types", "InternalIP"],
        "kube-controller-manager": ["--kubeconfig", home / "config", "--service-account-private-key-file", home / "key", "--secure-port", "0", "--port", "0", "--leader-elect=false"],
        "kube-scheduler": ["--kubeconfig", home / "config", "--secure-port", "0", "--port", "0", "--leader-elect=false"]}


@contextlib.contextmanager
def control_plane(home, address="127.0.0.1", without=("kube-scheduler",)):
    "etcd, an API server and the controllers, on ports of their own; where there are nodes, a scheduler"
    assert (BIN / "kube-apiserver").exists(), "Run the tests by `make kubernetes`, which builds the control plane."
    port = free_port()
    with contextlib.ExitStack() as stack:
        made = Cluster(f"https://{address}:{port}", home)
        stack.callback(made.http.close)
        for name, words in commands(home, address, port).items():
            if name in without:
                continue
            log = stack.enter_context(open(home / f"{name}.log", "w"))
            process = subprocess.Popen([BIN / name, *words], stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            if name == "kube-apiserver":
                until(lambda: made.kubectl("get", "--raw", "/readyz")[0] == 0, 120)
        yield made


def of(documents, kind):
    return next(d for d in documents if d["kind"] == kind)


def in_older_words(documents):
    "As `mlserve deploy kubernetes` puts them for this server"
    return for_server(documents, 20)
