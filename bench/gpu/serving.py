"""A real server process, a client of raw sockets, and load from processes of their own."""
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from mlserve.client import Client
from mlserve.errors import RemoteUnavailable
from mlserve.package.trial.process import free_port
from mlserve.tensors import datatype_of

def body_of(kind, rows):
    "A V2 request whose tensors are binary, and so are those of its answer: headers and body"
    parts = [np.ascontiguousarray(a).tobytes() for a in rows.values()]
    inputs = [{"name": n, "shape": list(a.shape), "datatype": datatype_of(a), "parameters": {"binary_data_size": len(p)}}
              for (n, a), p in zip(rows.items(), parts, strict=True)]
    head = json.dumps({"inputs": inputs, "outputs": [{"name": kind.output, "parameters": {"binary_data": True}}]}).encode()
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    return f"/v2/models/{kind.name}/infer", headers, head + b"".join(parts)


def packed(path, headers, body):
    "The bytes of a request"
    lines = {"host": "a", "content-length": str(len(body))} | headers
    return f"POST {path} HTTP/1.1\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in lines.items()) + b"\r\n" + body


class Wire:
    "One connection, and what is asked on it"

    def __init__(self, port, timeout=60):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def ask(self, request):
        "One answer: status, headers, body"
        self.socket.sendall(request)
        while b"\r\n\r\n" not in self.buffer:
            self._fill()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        size = int(headers["content-length"])
        while len(self.buffer) < size:
            self._fill()
        body, self.buffer = self.buffer[:size], self.buffer[size:]
        return int(first.split(" ")[1]), headers, body

    def _fill(self):
        part = self.socket.recv(1 << 20)
        if not part:
            raise ConnectionError("the server closed the connection")
        self.buffer += part

    def seconds(self, request):
        "How long an answer took"
        start = time.perf_counter()
        status, _, body = self.ask(request)
        if status != 200:
            raise RuntimeError(f"status {status}: {body[:300]}")
        return time.perf_counter() - start


def tensor_of(answer):
    "The first output of a binary answer"
    status, headers, body = answer
    if status != 200:
        raise RuntimeError(f"status {status}: {body[:300]}")
    n = int(headers["inference-header-content-length"])
    out = json.loads(body[:n])["outputs"][0]
    return np.frombuffer(body[n:n + out["parameters"]["binary_data_size"]], np.float32).reshape(out["shape"])


class Server:
    "The real server as a process, with variables of its own"

    def __init__(self, r, path, env=None, **settings):
        self.port, self.log = free_port(), r.work / f"server-{time.monotonic_ns()}.log"
        told = {"package": path, "host": "127.0.0.1", "port": self.port, "drain_delay": 0, "device": r.device} | settings
        variables = os.environ | (env or {}) | {f"MLSERVE_{k.upper()}": str(v) for k, v in told.items()}
        self.began = time.perf_counter()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "mlserve.serving.server"], env=variables, stdin=subprocess.DEVNULL,
                                            stdout=subprocess.DEVNULL, stderr=log)
        self.client = Client(f"http://127.0.0.1:{self.port}")

    def events(self, name=None):
        "What it said, as JSON lines; those of one event where it is named"
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [e for e in found if name in (None, e.get("event"))]

    def ready(self, seconds=60):
        "Seconds until it was ready"
        try:
            self.client.wait_ready(seconds, alive=lambda: self.process.poll() is None)
        except RemoteUnavailable as e:
            raise RuntimeError(f"never ready: {e}; it said {self.log.read_text()[-1500:]}") from None
        return time.perf_counter() - self.began

    def ended(self, seconds=60):
        "The exit code and the last line, when it ends by itself; None and its state when it does not"
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None, {"error": "it did not end"}
        return code, (self.events() or [{"error": self.log.read_text()[-300:]}])[-1]

    def get(self, path):
        "A JSON or text body"
        import httpx
        found = httpx.get(f"http://127.0.0.1:{self.port}{path}", trust_env=False, timeout=10)
        return found.json() if "json" in found.headers["content-type"] else found.text

    def __enter__(self):
        return self

    def __exit__(self, *a):
        stop(self.process)


def private(pid):
    "MiB of a process and of those it started that belong to no file: what the limit of a container must hold"
    try:
        own = re.search(r"^RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return 0
    return (int(own[1]) / 1024 if own else 0) + sum(map(private, children))


def stop(process, seconds=20):
    "Ask a process to end, then make it"
    process.terminate()  # nothing, where it has ended
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def load(r, port, request, connections, seconds):
    "Requests a second with so many connections, from up to four processes"
    file = r.work / f"request-{time.monotonic_ns()}"
    file.write_bytes(request)
    processes = min(4, max(1, (os.cpu_count() or 2) // 3), connections)
    command = [sys.executable, str(Path(__file__).parent / "load.py"), str(port), str(file), str(connections // processes), str(seconds)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    found = [json.loads(p.communicate(timeout=seconds + 60)[0]) for p in running]
    return {"requests_a_second": sum(f["answers"] / f["seconds"] for f in found), "others": sum(f["others"] for f in found),
            "p50_ms": 1000 * float(np.median([f["p50"] for f in found])), "connections": processes * (connections // processes)}
