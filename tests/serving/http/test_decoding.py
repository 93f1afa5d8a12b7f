"""Bodies that are far more in memory, or far longer to read, than they look: row N11 of the table of faults."""
import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvloop
from commands import TESTS
from servers import Server, Wire, children, error_of, patience, request, until

from mlserve.serving.observability.shared_memory import Board
from mlserve.serving.http.budget import ByteBudget
from mlserve.serving.http.exchange import PIECE, Exchange
from mlserve.serving.http.request_head import Limits
from mlserve.serving.http.connection import Connection
from mlserve.serving.state import Lifecycle
from mlserve.serving.http.listener import Listener
from mlserve.serving.observability.metrics import Numbers
from mlserve.serving.http.inference import ROUTES
from mlserve.serving.process.supervisor import listen

SETTINGS = dict(hang_seconds=20, FAKE_SECONDS=0)
MOST = 8 * 2**20


def filled(item, size=MOST, end=b""):
    "JSON of about so many bytes: the same item again and again, and then one that is refused"
    return b'{"inputs": [' + item * ((size - 100) // len(item)) + end + b"0]}"


LONG = {  # just below the limit for text; each is read whole before it is refused
    "rows of one": filled(b"[1],"), "empty lists": filled(b"[],"), "deep": filled(b"[" * 1000 + b"]" * 1000 + b","), "objects": filled(b'{"a":1},'),
    "long numbers": filled(b"[1." + b"9" * 4000 + b"],"), "short strings": filled(b'"ab",'), "one long string": filled(b"[1,2],", 1000, b'"' + b"a" * (MOST - 2000) + b'",'),
    "colons in texts": filled(b'"a:b",'), "many tensors": b'{"inputs": [' + b'{"name":"x","data":[1],"shape":[1],"datatype":"FP32"},' * (MOST // 55) + b"0]}"}
PROBE = r"""
import json, os, select, socket, sys, time
port, me, worker, took = int(sys.argv[1]), os.getpid(), sys.argv[2], []
def waited(pid):
    "Seconds in which the first thread of a process could have run, and had no processor"
    with open(f"/proc/{pid}/task/{pid}/schedstat") as f:
        return int(f.read().split()[1]) / 1e9
print("probing", flush=True)
while not select.select([sys.stdin], [], [], 0.01)[0]:
    own, theirs, begin = waited(me), waited(worker), time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), 30) as s:
        s.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert s.recv(4096).startswith(b"HTTP/1.1 200")
    seconds, own = time.perf_counter() - begin, waited(me) - own
    took.append((seconds - own, own, waited(worker) - theirs))
print(json.dumps(sorted(took)))
"""


@pytest.fixture
def server(double, tmp_path):
    with Server(double, tmp_path, **SETTINGS) as s:
        yield s


def family(pid):
    "A process and all that come from it"
    found = [pid]
    for p in found:
        try:
            found += children(p)
        except OSError:
            pass
    return found


def memory(pid):
    "Bytes that a process and its children use together, shared pages counted once"
    total = 0
    for p in family(pid):
        try:
            text = Path(f"/proc/{p}/smaps_rollup").read_text()
            total += int(text.split("\nPss:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            pass
    return total


class Probed:
    """Liveness, asked by another process every ten milliseconds, and the memory of the server meanwhile.

    What the kernel says that the asking process itself waited for a processor is not the server's, and is taken off; it is printed. What
    the server waited for one is its own, and is only printed."""

    def __init__(self, server):
        self.server = server

    def __enter__(self):
        self.process = subprocess.Popen([sys.executable, "-c", PROBE, str(self.server.port), str(self.server.worker())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "probing\n"
        self.ends, self.most = threading.Event(), 0
        self.watch = threading.Thread(target=self.look)
        self.watch.start()
        return self

    def look(self):
        while not self.ends.wait(0.1):
            self.most = max(self.most, memory(self.server.pid()))

    def __exit__(self, *error):
        self.ends.set()
        self.watch.join()
        out = self.process.communicate("\n", timeout=60)[0]
        if error == (None, None, None):
            took = json.loads(out)
            self.p99, self.asked = took[int(0.99 * (len(took) - 1))][0], len(took)
            self.worst, prober, loop = took[-1]
            self.words = (f"liveness asked {self.asked}, p99 {self.p99 * 1e3:.1f} ms, worst {self.worst * 1e3:.1f} ms (of which the loop waited "
                          f"{loop * 1e3:.1f} ms for a processor; the prober {prober * 1e3:.1f} ms more), {self.most / 2**20:.0f} MiB")


def ask(server, body, **headers):
    "One request: its status, with a connection that is not reused; an answer may come before all is sent"
    with Wire(server.port, timeout=120) as w:
        try:
            w.send(request(body=body, **headers))
        except OSError:
            pass
        return error_of(w.answer())


def attack(server, bodies, **headers):
    "All at once; the statuses"
    found, lock = [], threading.Lock()

    def one(body):
        try:
            status = ask(server, body, **headers)
        except (OSError, TypeError):
            status = None
        with lock:
            found.append(status)
    threads = [threading.Thread(target=one, args=(b,), daemon=True) for b in bodies]
    for t in threads:
        t.start()
    served = 0
    while any(t.is_alive() for t in threads):  # another client, meanwhile
        assert server.predict([1, 2]).json() == {"outputs": [[2, 4]]}
        served += 1
        time.sleep(0.02)
    return found, served


def survives(server, bodies, allowed, **headers):
    worker = server.worker()
    with Probed(server) as probed:
        found, served = attack(server, bodies, **headers)
    print(f"statuses {sorted(set(found))}, served {served}, {probed.words}")
    assert len(found) == len(bodies) and set(found) <= allowed, found
    assert probed.p99 < 0.05 and probed.worst <= 0.25, f"liveness took {probed.p99:.3f} s at p99 and {probed.worst:.3f} s at most"
    assert probed.most < 2**30, "the server does not stay within a gibibyte"
    assert server.worker() == worker and server.predict([1, 2]).status_code == 200, "the worker was replaced"


def test_N11_compressed_bodies_that_inflate_a_thousandfold_are_413_and_disturb_nobody(server):
    bomb = gzip.compress(filled(b"[1],", 45 * 2**20), 9)
    assert len(bomb) < 200_000
    survives(server, [bomb] * 24, {413}, content_encoding="gzip")


def test_N11_one_body_of_json_over_its_limit_is_413_before_it_is_read(server):
    with Wire(server.port) as w:
        w.send(request(body=b"")[:-2].replace(b"content-length: 0", b"content-length: 15000000") + b"\r\n")
        assert error_of(w.answer()) == 413


def test_N11_what_is_long_to_read_disturbs_nobody(server):
    "Some of every kind at once, and then every kind compressed"
    plain, packed = list(LONG.values())[::2], [gzip.compress(b, 1) for b in LONG.values()]
    worker = server.worker()
    with Probed(server) as probed:
        found, _ = attack(server, plain)
        more, _ = attack(server, packed, content_encoding="gzip")
    print(f"statuses {sorted(found + more)}, {probed.words}")
    assert set(found + more) <= {400, 413, 503}, found + more
    assert probed.p99 < 0.05 and probed.worst <= 0.25, f"liveness took {probed.p99:.3f} s at p99 and {probed.worst:.3f} s at most"
    assert probed.most < 2**30, "the server does not stay within a gibibyte"
    assert server.worker() == worker


@pytest.mark.soak
@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_N11_24_at_once_of_each_kind_disturb_nobody(server, kind, packed):
    body = gzip.compress(LONG[kind], 9) if packed else LONG[kind]
    survives(server, [body] * 24, {400, 413, 503}, **(dict(content_encoding="gzip") if packed else {}))


def test_N11_no_socket_is_read_twice_in_a_turn_of_the_loop(monkeypatch):
    "However much has come: an event loop reads a socket on, up to eight megabytes, before it looks at the next"
    read, turn, good = Counter(), [0], Connection.data_received

    def data_received(self, data):
        read[turn[0], id(self)] += len(data) > PIECE
        good(self, data)
    monkeypatch.setattr(Connection, "data_received", data_received)

    async def receive():
        listener = Listener(None, Lifecycle("ready"), Numbers(Board()), Limits())
        listener.routes, listener.inference = {b"/predict": ROUTES[0]}, SimpleNamespace(start=lambda route, headers, body, done, *more: done(200, b"text/plain", (), b""))
        port = listen("127.0.0.1", 0)
        await listener.open(port)
        clients = [asyncio.ensure_future(asyncio.to_thread(send, port.getsockname()[1])) for _ in range(4)]
        while not all(c.done() for c in clients):
            await asyncio.sleep(0)
            turn[0] += 1
        await listener.stop(1)
        return [c.result()[0] for c in clients]

    def send(port):
        with Wire(port) as w:
            return w.send(request(body=bytes(MOST))).answer()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(receive()) == [200] * 4
    assert sum(read.values()) >= 8 and max(read.values()) == 1, "a socket was read on"


def test_N11_a_long_body_is_kept_as_it_came():
    "An array that grows is copied whole, again and again, on the event loop"
    parts, e = [bytes([i]) * 2**18 for i in range(32)], Exchange()
    e.limit, e.route = MOST, "the model"
    for p in parts:
        e.add(p, ByteBudget(MOST), False)
    e.whole()
    assert len(e.body) == MOST and all(kept is came for kept, came in zip(e.body.pieces, parts, strict=True)) and bytes(e.body) == b"".join(parts)


def test_N11_all_requests_share_one_budget(double, tmp_path):
    "What waits for the model holds its tensors; what would go beyond the budget is told 503, and there is room again afterwards"
    with Server(double, tmp_path, max_body=60_000, max_decoded=60_000, FAKE_SECONDS=0) as s:
        body = gzip.compress(json.dumps({"inputs": [[1, 1000.5]] + [[1, 0]] * 3000}).encode())  # half a second of the model
        found, threads = [], []
        for _ in range(6):
            threads.append(threading.Thread(target=lambda: found.append(s.http.post("/predict", content=body, headers={"content-encoding": "gzip"}))))
            threads[-1].start()
        for t in threads:
            t.join()
        statuses = [r.status_code for r in found]
        assert set(statuses) == {200, 503}
        assert all(int(r.headers["retry-after"]) >= 1 and "60000 bytes" in r.json()["error"] for r in found if r.status_code == 503)
        assert s.http.post("/predict", content=body, headers={"content-encoding": "gzip"}).status_code == 200


def test_N11_a_large_request_is_read_elsewhere_and_means_the_same(server):
    rows = [[i, i % 7] for i in range(1000)]
    body = json.dumps({"inputs": rows}).encode() + b" " * 2**19
    for sent, headers in ((body, {}), (gzip.compress(body), {"content-encoding": "gzip"})):
        for size in (len(sent), 1000, 2**16):  # announced, and in chunks
            content = sent if size == len(sent) else (sent[i:i + size] for i in range(0, len(sent), size))
            assert server.http.post("/predict", content=content, headers=headers).json()["outputs"] == [[2 * a, 2 * b] for a, b in rows]
    assert server.http.post("/predict", content=b"\xef\xbb\xbf" + json.dumps({"inputs": rows[:3]}).encode()).status_code == 200


def test_N11_a_helper_that_is_killed_costs_its_worker(server):
    worker = server.worker()
    helper, = children(worker)
    os.kill(helper, signal.SIGKILL)
    body = json.dumps({"inputs": [[1, 2]]}).encode() + b" " * 2**19
    with Wire(server.port) as w:
        assert w.send(request(body=body)).answer() is None
    until(lambda: server.worker() not in (0, worker))
    server.wait_ready()
    assert server.http.post("/predict", content=body).status_code == 200
    assert "helper_died" in server.events()


def test_N11_nothing_of_the_helper_outlives_the_server(double, tmp_path):
    with Server(double, tmp_path) as s:
        everyone = family(s.process.pid)
        assert len(everyone) == 3
        os.kill(s.process.pid, signal.SIGKILL)
        s.process.wait(patience(10))
    until(lambda: not any(Path(f"/proc/{p}").exists() for p in everyone))


def test_json_before_binary_tensors_has_the_limit_of_json(server):
    "The header that says where the JSON ends may say that there is nothing else"
    body = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}'
    for size, status in ((2**19, 200), (MOST + 1, 413)):
        headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(size)}
        for coding in ({}, {"content-encoding": "gzip"}):
            sent = body + b" " * (size - len(body))
            answer = server.http.post("/v2/models/double/infer", content=gzip.compress(sent) if coding else sent, headers=headers | coding)
            assert answer.status_code == status, answer.text


READER = """
import sys, time
from mlserve.errors import InvalidInput
from mlserve.serving.process.helper import Helper
def read(seconds):
    print('reads', flush=True)
    begun = time.process_time()
    while time.process_time() - begun < seconds: pass
    return seconds
helper = Helper(read, 2**28, seconds=2)
try: print('gave', helper(float(sys.argv[1])), flush=True)
except Exception as e: print(type(e).__name__, flush=True)
"""


@pytest.mark.parametrize("seconds, pause, what", [(0.5, 4, "gave 0.5"), (60, 0, "TooLarge")])
def test_a_pause_while_the_helper_reads_is_no_fault_of_the_body(seconds, pause, what):
    with subprocess.Popen([sys.executable, "-c", READER, str(seconds)], stdout=subprocess.PIPE, text=True, start_new_session=True) as p:
        assert p.stdout.readline() == "reads\n"
        everyone = family(p.pid)
        assert len(everyone) == 3
        for one in everyone if pause else ():
            os.kill(one, signal.SIGSTOP)
        time.sleep(pause)
        for one in everyone if pause else ():
            os.kill(one, signal.SIGCONT)
        assert p.stdout.readline().strip() == what


HANDLER = TESTS / "faulty_handler.py"


def test_a_small_body_of_many_faults_for_a_handler_keeps_nobody_waiting(double, tmp_path):
    body = gzip.compress(b'["",""' + b",[]" * ((MOST - 100) // 3) + b"]", 9)
    with Server(double, tmp_path, FAKE_HANDLER=HANDLER, **SETTINGS) as s:
        with Probed(s) as probed:
            answer = s.http.post("/handle", content=body, headers={"content-encoding": "gzip"}, timeout=patience(60))
        assert answer.status_code == 413 and "values" in answer.text
        assert probed.worst <= 0.25 and probed.most < 2**30, f"liveness took {probed.worst:.3f} s, {probed.most / 2**20:.0f} MiB"
        assert s.http.post("/handle", content=gzip.compress(b'["","' + b"a" * (MOST - 100) + b'"]'), headers={"content-encoding": "gzip"}).status_code == 200


def test_what_a_body_for_a_handler_inflates_to_is_counted(double, tmp_path):
    with Server(double, tmp_path, max_body=100_000, max_decoded=100_000, FAKE_HANDLER=HANDLER, **SETTINGS) as s:
        for spaces, status in ((99_990, 503), (90_000, 200), (99_990, 503)):
            answer = s.http.post("/handle", content=gzip.compress(b'["",""]' + b" " * spaces), headers={"content-encoding": "gzip"})
            assert answer.status_code == status, "all that was taken is given back"
