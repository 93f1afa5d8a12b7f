#!/usr/bin/env python3
"""Bodies of many megabytes: the server's processor and memory, beside a protocol that reads into memory it has reserved.

    large.py OUT [--before FOLDER] [--rounds 7]

FOLDER holds an earlier tree of this project, to be measured in the same run: `git worktree add FOLDER COMMIT`.
Prints a table; every round asks every server in turn, so that a load of the machine falls on all of them.
"""
import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

BUFFER = bytearray(2**20)
SIZES = (5_000_000, 40_000_000, 600_000)
PROTOCOL = """import asyncio, sys
import numpy as np, uvloop
class Reserved(asyncio.BufferedProtocol):
    def connection_made(self, t): self.t, self.head, self.body, self.at = t, bytearray(65536), None, 0
    def get_buffer(self, hint): return memoryview(self.head)[self.at:] if self.body is None else self.body[self.at:]
    def buffer_updated(self, n):
        self.at += n
        if self.body is None:
            end = self.head.find(b'\\r\\n\\r\\n', 0, self.at)
            if end < 0: return
            low = bytes(self.head[:end]).lower()
            size = int(low.split(b'\\r\\ncontent-length: ')[1].split(b'\\r')[0])
            rest = self.at - end - 4
            self.body = np.empty(size, np.uint8).data
            self.body[:rest] = self.head[end + 4:self.at]
            self.at = rest
        if self.at == len(self.body):
            self.body, self.at = None, 0
            self.t.write(b'HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\n\\r\\n{}')
async def main():
    server = await asyncio.get_running_loop().create_server(Reserved, '127.0.0.1', int(sys.argv[1]))
    await server.serve_forever()
uvloop.run(main())"""


def graph(nodes, inputs, outputs, constants=()):
    import onnx
    from onnx import helper as h
    made = [h.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (*inputs, *outputs)]
    model = h.make_model(h.make_graph(nodes, "g", made[:len(inputs)], made[len(inputs):], list(constants)),
                         opset_imports=[h.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def package(root, way, size):
    "One that takes a row of so many bytes and answers its first number, or the other way round"
    import onnx.numpy_helper as o
    from onnx import helper as h

    from mlserve.package import save_package
    n, place = size // 4, root / f"{way}{size}"
    if place.exists():
        return place
    if way == "in":
        data = graph([h.make_node("Slice", ["x", "from", "to", "axis"], ["y"])], [("x", ["rows", n])], [("y", ["rows", 1])],
                     [o.from_array(np.array([v], "i8"), name) for name, v in (("from", 0), ("to", 1), ("axis", 1))])
    else:
        data = graph([h.make_node("Shape", ["x"], ["s"]), h.make_node("Mul", ["s", "by"], ["t"]), h.make_node("Expand", ["x", "t"], ["y"])],
                     [("x", ["rows", 1])], [("y", ["rows", n])], [o.from_array(np.array([1, n], "i8"), "by")])
    file = root / f"{way}{size}.onnx"
    file.write_bytes(data)
    save_package(file, place, name="big", inputs={"x": np.ones((1, n if way == "in" else 1), "f4")})
    return place


def tree(pid):
    "A process and what it started"
    found = [pid]
    for p in found:
        try:
            for task in Path(f"/proc/{p}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            pass
    return found


def cpu(pid):
    "Nanoseconds on a processor, of all threads"
    total = 0
    for p in tree(pid):
        try:
            for task in Path(f"/proc/{p}/task").iterdir():
                total += int((task / "schedstat").read_text().split()[0])
        except OSError:
            pass
    return total


def pss(pid):
    "MB of memory of a process and what it started"
    total = 0
    for p in tree(pid):
        try:
            total += next(int(line.split()[1]) for line in open(f"/proc/{p}/smaps_rollup") if line.startswith("Pss:"))
        except (OSError, StopIteration):
            pass
    return total * 1024 / 1e6


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(self, command, env, path=None, folder=None):
        self.port, self.socket = free_port(), None
        command = [part.replace("{port}", str(self.port)) for part in command]
        env = {k: v.replace("{port}", str(self.port)) for k, v in env.items()}
        self.process = subprocess.Popen(command, env={**os.environ, **env}, cwd=folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 180
        while time.monotonic() < end:
            try:
                if path is None or self.ask(b"GET " + path + b" HTTP/1.1\r\nhost: a\r\n\r\n").startswith(b"HTTP/1.1 200"):
                    socket.create_connection(("127.0.0.1", self.port)).close()
                    return
            except OSError:
                pass
            self.socket = None
            time.sleep(0.2)
        raise SystemExit(f"{command} did not start")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    def ask(self, *parts):
        "One request on the connection that is kept: the first bytes of the answer"
        if self.socket is None:
            self.socket = socket.create_connection(("127.0.0.1", self.port))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as clients do: a part waits for no acknowledgement of the last one
        s = self.socket
        for part in parts:
            s.sendall(part)
        first, left = b"", None
        while left is None or left > 0:
            n = s.recv_into(BUFFER)
            if not n:
                raise ConnectionResetError
            if left is None:
                first += BUFFER[:n]
                end = first.find(b"\r\n\r\n")
                if end >= 0:
                    left = int(first[:end].lower().split(b"\r\ncontent-length: ")[1].split(b"\r")[0]) - len(first) + end + 4
            else:
                left -= n
        return first


def post(path, body, **headers):
    head = b"".join(b"%s: %s\r\n" % (k.replace("_", "-").encode(), v) for k, v in headers.items())
    return b"POST %s HTTP/1.1\r\nhost: a\r\n%scontent-length: %d\r\n\r\n" % (path, head, sum(map(len, body))), *body


def binary(x, wanted=True):
    entry = {"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": wanted}}).encode()
    return post(b"/v2/models/big/infer", [head, x.tobytes()], content_type=b"application/octet-stream",
                inference_header_content_length=b"%d" % len(head))


NUMBERS = 850_000


def text():
    "JSON with numbers of six digits, which take the most for each byte of text"
    x = np.round(np.random.default_rng(0).random((1, NUMBERS)), 6)
    o = {"inputs": [{"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}]}
    return post(b"/v2/models/big/infer", [json.dumps(o, separators=(",", ":")).encode()], content_type=b"application/json")


def peak(server, request):
    "MB above what the server has when it rests"
    server.ask(*request)
    time.sleep(0.5)
    rest, most, over = pss(server.process.pid), [0.0], threading.Event()

    def watch():
        while not over.is_set():
            most[0] = max(most[0], pss(server.process.pid))

    watching = threading.Thread(target=watch)
    watching.start()
    for _ in range(5):
        server.ask(*request)
    over.set()
    watching.join()
    return most[0] - rest


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("root", type=Path)
    ap.add_argument("--before")
    ap.add_argument("--rounds", type=int, default=7)
    a = ap.parse_args()
    a.root.mkdir(parents=True, exist_ok=True)
    trees = {"after": str(Path(__file__).resolve().parent.parent)} | ({"before": a.before} if a.before else {})
    for size in SIZES:
        measure(a, trees, size)
    request = text()
    size = len(request[-1]) / 1e6
    for t, folder in trees.items():
        with serving(a.root, "in", NUMBERS * 4, folder) as server:
            most = peak(server, request)
        print(f"| JSON in | {size:.1f} MB | {t} | peak {most:.0f} MB | {most / size:.1f} |", flush=True)


def serving(root, way, size, folder):
    env = {"MLSERVE_PACKAGE": str(package(root.resolve(), way, size)), "MLSERVE_HOST": "127.0.0.1", "MLSERVE_PORT": "{port}", "MLSERVE_PROVE_SECONDS": "3600", "MLSERVE_KEEP_ALIVE_SECONDS": "3600", "MLSERVE_DEVICE": "cpu", "MLSERVE_THREADS": "1"}
    return Server([sys.executable, "-m", "mlserve.serving.server"], env, b"/v2/health/ready", folder)


def measure(a, trees, size):
    "One size: every server asked in turn, and then the memory of each"
    with contextlib.ExitStack() as stack:
        servers = {"reserved": stack.enter_context(Server([sys.executable, "-c", PROTOCOL, "{port}"], {}))}
        for name, folder in trees.items():
            for way in ("in", "out"):
                servers[f"{way} {name}"] = stack.enter_context(serving(a.root, way, size, folder))
        large, small = binary(np.ones((1, size // 4), "f4")), binary(np.ones((1, 1), "f4"))
        taken, count = {name: [] for name in servers}, max(3, 40_000_000 // size)
        for turn in range(a.rounds + 1):
            for name, server in servers.items():
                start = cpu(server.process.pid)
                for _ in range(count):
                    answer = server.ask(*(small if name.startswith("out") else large))
                    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
                time.sleep(0.05)
                if turn:
                    taken[name].append((cpu(server.process.pid) - start) / count)
        rate = {name: size / statistics.median(v) * 1e3 for name, v in taken.items()}
        for name, value in rate.items():
            most = "" if name == "reserved" else f"{peak(servers[name], small if name.startswith('out') else large) / size * 1e6:.1f}"
            print(f"| {size / 1e6:g} MB | {name} | {value:,.0f} | {value / rate['reserved']:.2f} | {most} |", flush=True)


if __name__ == "__main__":
    main()
