"""Nodes of a cluster on this machine: a containerd, a kubelet and a kube-proxy each, in namespaces of their own, so that processes, mounts and links end with a node.

They are joined by a bridge, 10.98.0.0/24; the pods of node n have 10.98.n.0/24, which this machine reaches too. Nothing is forwarded to elsewhere. Needs root and
version 1 of control groups, as Kubernetes 1.20 does with this containerd."""
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import yaml
from cluster import BIN, control_plane
from faulty_proxy import Proxy
from servers import children, until

HERE, BRIDGE, GATEWAY = Path(__file__).parent, "mlserve0", "10.98.0.1"
GROUPS = [folder for folder in Path("/sys/fs/cgroup").glob("*") if folder.name != "unified" and not folder.is_symlink()]
CONTAINERD = """
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
disable_apparmor = true
disable_hugetlb_controller = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{home}/cni"
[plugins."io.containerd.grpc.v1.cri".registry.mirrors."{registry}"]
endpoint = ["http://{mirror}"]
"""
KUBELET = {"kind": "KubeletConfiguration", "apiVersion": "kubelet.config.k8s.io/v1beta1", "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
           "authorization": {"mode": "AlwaysAllow"}, "cgroupDriver": "cgroupfs", "failSwapOn": False, "imageGCHighThresholdPercent": 100,
           "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"}}
PROGRAMS = """
{bin}/kubelet --config kubelet.yaml --kubeconfig "{config}" --hostname-override {name} --node-ip {address} --root-dir /var/lib/kubelet --cert-dir pki \\
  --container-runtime remote --container-runtime-endpoint unix:///run/containerd/containerd.sock --volume-plugin-dir plugins >kubelet.log 2>&1 &
{bin}/kube-proxy --kubeconfig "{config}" --hostname-override {name} --proxy-mode iptables --conntrack-max-per-core 0 --conntrack-tcp-timeout-established 0 \\
  --conntrack-tcp-timeout-close-wait 0 --metrics-bind-address 127.0.0.1:10249 >kube-proxy.log 2>&1 &
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True)


class Node:
    "A node that runs until it is killed"

    def __init__(self, cluster, number, count, registry, mirror, pause):
        self.name, self.address, self.pods = f"node-{number}", f"10.98.0.{10 + number}", f"10.98.{number}.0/24"
        self.group, self.link = f"mlserve-node-{number}", f"mlserve{number}"
        self.home = home = cluster.home / self.name
        home.mkdir()
        for group in GROUPS:
            (group / self.group).mkdir()
        others = [n for n in range(1, count + 1) if n != number]
        (home / "routes").write_text("".join(f"10.98.{n}.0/24 10.98.0.{10 + n}\n" for n in others))
        (home / "containerd.toml").write_text(CONTAINERD.format(home=home, registry=registry, mirror=mirror, pause=pause))
        (home / "kubelet.yaml").write_text(yaml.safe_dump(KUBELET | {"cgroupRoot": f"/{self.group}"}))
        (home / "programs").write_text(PROGRAMS.format(bin=BIN, config=cluster.home / "config", name=self.name, address=self.address))
        bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "hairpinMode": True,
                  "ipam": {"type": "host-local", "subnet": self.pods, "routes": [{"dst": "0.0.0.0/0"}]}}
        (home / "cni").mkdir()
        (home / "cni/pods.conflist").write_text(json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]}))
        spaces = ["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        with open(home / "log", "w") as log:
            self.process = subprocess.Popen([*spaces, "bash", HERE / "node.sh", home, self.address, GATEWAY], stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def connect(self):
        "Plug it in; until then it waits"
        until(lambda: children(self.process.pid))
        [self.pid] = children(self.process.pid)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        ip("link", "set", self.link, "master", BRIDGE, "up")
        ip("route", "add", self.pods, "via", self.address)

    def enter(self):
        "From now on this thread is in the network of the node"
        with open(f"/proc/{self.pid}/ns/net") as space:
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), "setns")

    def logs(self):
        return {path.name: path.read_text(errors="replace") for path in self.home.glob("*log")}

    def kill(self):
        "All of its processes at once, and with them its mounts and links"
        for child in children(self.process.pid) if self.process.poll() is None else []:
            os.kill(child, signal.SIGKILL)
        self.process.wait()
        subprocess.run(["ip", "link", "del", self.link], stderr=subprocess.DEVNULL)  # the kernel takes its time with what was inside
        for group in GROUPS:
            for folder in sorted((group / self.group).rglob("*/"), key=lambda path: -len(path.parts)):
                removed(folder)
            removed(group / self.group)
        shutil.rmtree(self.home / "var", ignore_errors=True)


def removed(group):
    "A control group without processes; those that were killed leave it a moment later"
    def gone():
        with contextlib.suppress(OSError):
            group.rmdir()
        return not group.exists()
    until(gone)


@contextlib.contextmanager
def bridge():
    "What joins the nodes and this machine"
    assert not os.path.exists(f"/sys/class/net/{BRIDGE}"), f"another run has its nodes here; if it was killed: ip link del {BRIDGE}"
    ip("link", "add", BRIDGE, "type", "bridge")
    try:
        ip("addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        yield
    finally:
        ip("link", "del", BRIDGE)


def pause_image(engine, registry, folder):
    "The image of a pod's first process, by its digest"
    subprocess.run(["gcc", "-static", "-Os", "-o", folder / "pause", HERE / "pause.c"], check=True)
    subprocess.run(["tar", "-C", folder, "-cf", folder / "pause.tar", "pause"], check=True)
    repository = f"{registry}/mlserve/pause"
    engine.api.import_image_from_file(str(folder / "pause.tar"), repository, "1", changes=['ENTRYPOINT ["/pause"]'])
    digests = [line["aux"]["Digest"] for line in engine.images.push(repository, "1", stream=True, decode=True) if "Digest" in line.get("aux", {})]
    return f"{repository}@{digests[0]}"


@contextlib.contextmanager
def cluster_of(count, home, engine):
    "A control plane and so many nodes, all ready, and pods that are pulled through one gate: `pulls` counts its connections"
    registry = os.environ["MLSERVE_REGISTRY"]
    pause = pause_image(engine, registry, home)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bridge())
        cluster = stack.enter_context(control_plane(home, GATEWAY, without=()))
        cluster.pulls = stack.enter_context(Proxy(int(registry.rsplit(":", 1)[1]), listen=GATEWAY))
        cluster.nodes = []
        for number in range(1, count + 1):
            cluster.nodes.append(Node(cluster, number, count, registry, f"{GATEWAY}:{cluster.pulls.port}", pause))
            stack.callback(cluster.nodes[-1].kill)
            cluster.nodes[-1].connect()
        begun = time.monotonic()
        until(lambda: [condition(node, "Ready") for node in cluster.got("nodes")["items"]] == ["True"] * count, 120)
        print(f"{count} nodes ready after {time.monotonic() - begun:.1f} s")
        yield cluster


def condition(thing, kind):
    "What is said of a pod or a node"
    return next((c["status"] for c in thing["status"].get("conditions", []) if c["type"] == kind), "Unknown")
