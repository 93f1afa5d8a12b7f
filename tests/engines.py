"""Docker Engines in network namespaces of one machine: the nodes of a Swarm, each with an address, a registry and a folder of its own."""
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import docker
import yaml

CLONE_NEWNET = 0x40000000
DOCKERD = "hostname {name}; exec dockerd --data-root {folder}/data --exec-root {folder}/run --pidfile {folder}/docker.pid -H unix://{folder}/docker.sock " \
    "--bridge none --iptables=false --ip-forward=false --ip-masq=false --shutdown-timeout 5"


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Node:
    "An engine in a namespace of its own, with one end of a cable"

    def __init__(self, lan, number, folder, registry):
        self.lan, self.name, self.folder, self.registry = lan, f"node{number}", folder, registry
        self.space, self.cable, self.address = f"{lan}-{number}", f"{lan}v{number}", f"198.18.{os.getpid() % 250}.{number}"
        self.processes = []

    def _start(self, name, *command):
        with open(self.folder / f"{name}.log", "w") as log:
            words = ["nsenter", f"--net=/run/netns/{self.space}", "unshare", "--uts", *command]
            self.processes.append(subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True))

    def start(self):
        ip("netns", "add", self.space)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.space)
        ip("link", "set", self.cable, "master", self.lan, "up")
        ip("-n", self.space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self.space, "link", "set", device, "up")
        (self.folder / "registry.yml").write_text(yaml.safe_dump(
            {"version": 0.1, "log": {"level": "warn"}, "storage": {"filesystem": {"rootdirectory": str(self.registry[0])}}, "http": {"addr": self.registry[1]}}))
        self._start("registry", "docker-registry", "serve", str(self.folder / "registry.yml"))
        self._start("dockerd", "sh", "-c", DOCKERD.format(name=self.name, folder=self.folder))
        self.url, end = f"unix://{self.folder}/docker.sock", time.monotonic() + 120
        while True:
            with contextlib.suppress(docker.errors.DockerException):
                self.client = docker.DockerClient(self.url, timeout=120)
                return
            assert time.monotonic() < end, (self.folder / "dockerd.log").read_text()[-2000:]
            time.sleep(0.5)

    def link(self, state):
        "Cut its link, `down`, or mend it, `up`: as somebody who pulls the cable out of the switch"
        ip("link", "set", self.cable, state)

    def stop(self):
        for process in reversed(self.processes):  # the engine first
            for sign, patience in ((signal.SIGTERM, 60), (signal.SIGKILL, 10)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
                    break
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[1].startswith(f"{self.folder}/")]
        for place in reversed(mounted):
            subprocess.run(["umount", "-l", place])
        subprocess.run(["ip", "netns", "del", self.space])


@contextlib.contextmanager
def nodes_of_a_swarm(registry, count=3):
    "So many engines on one network, which this process can reach; the first manages a Swarm of all of them"
    lan = f"mls{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="mlserve-nodes-", ignore_cleanup_errors=True) as folder:
        nodes = []
        ip("link", "add", lan, "type", "bridge")
        try:
            ip("addr", "add", f"198.18.{os.getpid() % 250}.254/24", "dev", lan)
            ip("link", "set", lan, "up")
            for number in range(1, count + 1):
                own = Path(folder) / str(number)
                own.mkdir()
                nodes.append(Node(lan, number, own, registry))
                nodes[-1].start()
            first = nodes[0]
            first.client.swarm.init(advertise_addr=first.address, listen_addr=f"{first.address}:2377")
            first.client.swarm.reload()
            token = first.client.swarm.attrs["JoinTokens"]["Worker"]
            for node in nodes[1:]:
                node.client.swarm.join([f"{first.address}:2377"], token, listen_addr=f"{node.address}:2377", advertise_addr=node.address)
            yield nodes
        finally:
            for node in nodes:
                node.link("up")
            with contextlib.suppress(Exception):
                for service in nodes[0].client.services.list():
                    service.remove()
                end = time.monotonic() + 60
                while any(node.client.containers.list() for node in nodes) and time.monotonic() < end:
                    time.sleep(0.5)
                for node in reversed(nodes):
                    node.client.swarm.leave(force=True)
            for node in nodes:
                node.stop()
            subprocess.run(["ip", "link", "del", lan])


def metrics_in(pid):
    "The page of metrics of the server in a container, asked on its own loopback; its thread stays in that network"
    with open(f"/proc/{pid}/ns/net") as space:
        assert ctypes.CDLL(None, use_errno=True).setns(space.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    with socket.create_connection(("127.0.0.1", 8080), 5) as s:
        s.sendall(b"GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        return b"".join(iter(lambda: s.recv(65536), b"")).decode()


class Ran:
    "What the servers of a target ran on all nodes, read from their own metrics while they are there"

    def __init__(self, nodes, target):
        self.nodes, self.target, self.counts, self.going, self.first = nodes, target, {}, True, threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def look(self):
        for node in self.nodes:
            for container in node.client.containers.list(filters={"label": [f"io.mlserve.target={self.target}", "io.mlserve.model"]}, ignore_removed=True):
                with contextlib.suppress(OSError, TypeError):  # not there yet, or no more
                    self.counts[container.id] = float(re.search(r"^mlserve_request_seconds_count (\S+)", metrics_in(container.attrs["State"]["Pid"]), re.M)[1])

    def _watch(self):
        while self.going:
            with contextlib.suppress(docker.errors.APIError):
                self.look()
                self.first.set()
            time.sleep(0.5)

    def __enter__(self):
        self.thread.start()
        assert self.first.wait(30)
        self.before = sum(self.counts.values())
        return self

    def __exit__(self, *a):
        time.sleep(2)
        self.going = False
        self.thread.join()
        self.total = sum(self.counts.values()) - self.before
