"""Real server processes and raw sockets for the tests of the serving wing."""
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from mlserve.package.trial.process import free_port

FAKE = Path(__file__).parent / "fake_server.py"
HEALTH = b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\n\r\n"
PLANTED = {}  # a control sets FAKE_PLANT here: every server it starts has the bug
HASTE = [1]  # every wait of the tests is divided by it; a control, which waits for what never comes, waits less


def patience(seconds):
    "How long to wait for what should come sooner"
    return seconds / HASTE[0]


def until(what, seconds=20):
    "Wait until something holds"
    end = time.monotonic() + patience(seconds)
    while not what():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def status_of(pid, field, file="status"):
    "A number that the kernel keeps of a process, such as `VmRSS` in kB"
    with open(f"/proc/{pid}/{file}") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field + ":"))


def children(pid):
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Server:
    "A server process, until it is stopped; settings in capitals go to the fake, `under` is put before the command"

    def __init__(self, package, folder, wait=True, under=(), real=False, **settings):
        self.port, self.log = settings.pop("port", None) or free_port(), Path(folder) / f"server-{time.monotonic_ns()}.log"
        fake = PLANTED | {k: str(settings.pop(k)) for k in list(settings) if k.isupper()}
        env = {k: v for k, v in os.environ.items() if not k.startswith("MLSERVE_")} | fake
        settings = {"package": package, "host": "127.0.0.1", "port": self.port, "drain_delay": 0, "grace": 20} | settings
        env |= {f"MLSERVE_{k.upper()}": str(v) for k, v in settings.items()}
        program = ["-m", "mlserve.serving.server"] if real else [str(FAKE)]
        self.process = subprocess.Popen([*under, sys.executable, *program], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=open(self.log, "wb"))
        self.under, self.url = bool(under), f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=patience(30), trust_env=False, verify=False, limits=httpx.Limits(max_keepalive_connections=0))
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.__exit__()
                raise

    def wait_ready(self, seconds=60):
        end = time.monotonic() + max(patience(seconds), seconds / 2)  # a bug is planted to be met, behind the start
        while time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                if self.http.get("/v2/health/ready").status_code == 200:
                    return self
            assert self.process.poll() is None, self.events()
            time.sleep(0.05)
        raise AssertionError("not ready: " + self.events())

    def predict(self, *rows, **kw):
        return self.http.post("/predict", json={"inputs": [list(r) for r in rows]}, **kw)

    def metric(self, name):
        found = re.search(rf"^mlserve_{re.escape(name)} (\S+)$", self.http.get("/metrics").text, re.M)
        return float(found[1]) if found else 0.0

    def pid(self):
        "The process id of the server itself"
        return children(self.process.pid)[0] if self.under else self.process.pid

    def worker(self):
        "The process id of a worker; 0 when there is none at the moment"
        return (children(self.pid()) or [0])[0]

    def events(self):
        return self.log.read_text(errors="replace")

    def last(self):
        return json.loads(self.events().strip().splitlines()[-1])

    def stop(self, sig=signal.SIGTERM, seconds=40):
        if self.process.poll() is None:
            os.kill(self.pid(), sig)
        return self.process.wait(patience(seconds))

    def ended(self, seconds=30):
        "The exit code, when it ends by itself"
        return self.process.wait(patience(seconds))

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.http.close()
        if self.process.poll() is None:
            os.kill(self.pid(), signal.SIGTERM if HASTE[0] == 1 else signal.SIGKILL)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Wire:
    "A raw connection"

    def __init__(self, port, timeout=30, **options):
        self.socket = socket.socket()
        for name, value in options.items():
            self.socket.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        self.socket.settimeout(patience(timeout))
        self.socket.connect(("127.0.0.1", port))
        self.buffer = b""

    def send(self, *parts):
        for p in parts:
            self.socket.sendall(p)
        return self

    def fill(self):
        part = self.socket.recv(65536)
        self.buffer += part
        return part

    def answer(self):
        "One answer: (status, headers, body); None when the connection ended"
        while b"\r\n\r\n" not in self.buffer:
            try:
                if not self.fill():
                    return None
            except ConnectionResetError:
                return None
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
        headers = dict(l.lower().split(": ", 1) for l in lines)
        if status == 100:
            return status, headers, b""
        size = int(headers["content-length"])
        while len(self.buffer) < size:
            if not self.fill():
                break
        body, self.buffer = self.buffer[:size], self.buffer[size:]
        return status, headers, body

    def ended(self):
        "Whether the server says nothing more"
        with contextlib.suppress(ConnectionResetError):
            return not self.buffer and self.socket.recv(1) == b""
        return True

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.close()


def request(path="/predict", body=b'{"inputs": [[1, 0]]}', method="POST", **headers):
    "The bytes of a request"
    lines = {"host": "a", "content-type": "application/json", "content-length": str(len(body))} | headers
    return f"{method} {path} HTTP/1.1\r\n".encode() + b"".join(f"{k.replace('_', '-')}: {v}\r\n".encode() for k, v in lines.items()) + b"\r\n" + body


def error_of(answer):
    "The status of an answer that must have the one shape of a failure"
    status, headers, body = answer
    assert headers["content-type"] == "application/json" and list(json.loads(body)) == ["error"] and len(body) <= 1024, answer
    assert "x-request-id" in headers
    if status == 503:
        assert int(headers["retry-after"]) >= 1
    return status
