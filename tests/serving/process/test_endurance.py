"""A server that runs for long: its memory, its open files and its threads (L7), and hundreds of slow clients (N1–N3)."""
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import threading
import time

import httpx
import pytest
from fake_server import RAISE
from load import Load
from servers import HEALTH, Server, Wire, request, status_of

MIB = 2**20


def sample(pid):
    "Bytes of memory, open files and threads of a process"
    return status_of(pid, "VmRSS") * 1024, len(os.listdir(f"/proc/{pid}/fd")), status_of(pid, "Threads")


def slope(points):
    "The middle of the slopes between all pairs of points (Theil and Sen): steps and outliers do not move it"
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(points) for b in points[i + 1:] if b[0] > a[0])


def trouble(server, stop):
    "Clients that send what is broken, leave in the middle, and poison the model, beside the steady load"
    chance = random.Random(5)
    while not stop.is_set():
        with Wire(server.port, timeout=0.5) as w, contextlib.suppress(TimeoutError):
            w.send(chance.choice([request(body=b"{"), request(body=b'{"inputs": [[1, %d]]}' % RAISE), request("/nowhere"), b"\0\1\2", request(body=b'{"inputs": [[1, 2]]}')]))
            if chance.random() < 0.5:  # else it leaves
                w.answer()
        time.sleep(0.01)


def growth(server, seconds, warm):
    "Run for so long under load: the growth in bytes a second and in bytes a request, the samples and the requests"
    stop, points = threading.Event(), []
    beside = threading.Thread(target=trouble, args=(server, stop))
    with Load(server.port, connections=8, pause=0.02 if seconds >= 600 else 0) as load:
        beside.start()
        try:
            time.sleep(warm)
            begin = time.monotonic()
            while time.monotonic() < begin + seconds:
                points.append((time.monotonic() - begin, len(load.seconds), *sample(server.worker())))
                time.sleep(max(0.25, seconds / 200))
        finally:
            stop.set()
            beside.join(60)
    assert not load.failures, load.failures[:3]
    return slope([(p[0], p[2]) for p in points]), slope([(p[1], p[2]) for p in points]), points, len(load.answers)


HOUR = [pytest.param(20, 5, id="20 s"), pytest.param(3600, 120, id="1 h", marks=pytest.mark.soak)]


def grows(double, folder, seconds, warm, **bug):
    with Server(double, folder, threads=1, FAKE_SECONDS=0, **bug) as s:
        a_second, a_request, points, requests = growth(s, seconds, warm)
    files, threads = [[p[i] for p in points] for i in (3, 4)]
    print(f"{requests} requests: {a_request * 100_000 / MIB:+.2f} MiB in 100,000, {a_second * 3600 / MIB:+.2f} MiB an hour; {min(files)}–{max(files)} files, {min(threads)}–{max(threads)} threads")
    half = len(points) // 2
    assert max(files[half:]) <= max(files[:half]) + 2, "files stay open"
    assert max(threads[half:]) <= max(threads[:half]), "threads stay"
    assert a_request * 100_000 < MIB, "memory grows with the requests"
    assert seconds < 3600 or a_second * 3600 < MIB, "memory grows with the hours"


@pytest.mark.parametrize("seconds, warm", HOUR)
def test_L7_memory_files_and_threads_do_not_grow(double, tmp_path, seconds, warm):
    grows(double, tmp_path, seconds, warm)


@pytest.mark.parametrize("bug, sees", [("every_request_leaves_64_bytes", "memory grows"), ("some_connections_leave_a_file", "files stay"), ("some_connections_leave_a_thread", "threads stay")])
def test_L7_control_a_server_that_leaks_is_seen(double, tmp_path, bug, sees):
    with pytest.raises(AssertionError, match=sees):
        grows(double, tmp_path, 10, 5, FAKE_PLANT=bug)


SLOW = {"N1 a head that drips": ["-H", "-i", "1"], "N3 a body that drips": ["-B", "-i", "1", "-s", "4096"], "N3 a reader that hardly reads": ["-X", "-w", "1", "-y", "10", "-n", "2", "-z", "8", "-k", "3"]}


class Steady:
    "One client that asks for health and for a prediction, again and again; what it was told, and how long predictions took"

    def __init__(self, server):
        self.server, self.health, self.predictions, self.seconds, self.stop = server, set(), set(), [], threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        with httpx.Client(base_url=self.server.url, timeout=10, trust_env=False, verify=False) as c:
            while not self.stop.is_set():
                with Wire(self.server.port, timeout=10) as w:
                    self.health.add(w.send(HEALTH).answer()[0])
                begin = time.monotonic()
                self.predictions.add(c.post("/predict", json={"inputs": [[1, 0]]}).status_code)
                self.seconds.append(time.monotonic() - begin)
                time.sleep(0.01)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *a):
        self.stop.set()
        self.thread.join(30)

    def p99(self):
        return statistics.quantiles(self.seconds, n=100)[98] * 1000


def silent(server, clients, stop):
    "So many connections that say nothing, opened again when they were closed"
    while not stop.is_set():
        held = [Wire(server.port) for _ in range(clients)]
        stop.wait(1)
        for w in held:
            w.close()


@pytest.mark.parametrize("kind, room", [*[(k, True) for k in SLOW], ("N1 a head that drips", False)], ids=lambda v: v if type(v) is str else "room" if v else "no room")
@pytest.mark.parametrize("clients, duration", [pytest.param(25, 3, id="1in20"), pytest.param(500, 600, id="full", marks=pytest.mark.soak)])
def test_N1_N2_N3_slow_clients_disturb_nobody(double, tmp_path, kind, room, clients, duration):
    "slowhttptest beside as many silent clients: health is 200 throughout, and where there are places left, so is every prediction"
    stop, said = threading.Event(), []
    with Server(double, tmp_path, head_seconds=1, body_seconds=1, write_seconds=1, connections=2 * clients + 24 if room else clients // 2) as s:
        with Steady(s) as before:
            time.sleep(min(10, duration / 2))
        beside = threading.Thread(target=silent, args=(s, clients, stop))
        beside.start()
        try:
            with Steady(s) as during:
                url = f"{s.url}/openapi" if "-X" in SLOW[kind] else f"{s.url}/predict"
                end = time.monotonic() + duration
                while time.monotonic() < end:  # it leaves when all its connections were ended
                    said.append(subprocess.run([shutil.which("slowhttptest"), "-c", str(clients), "-r", str(clients), "-l", "5", "-u", url, "-t", "POST", *SLOW[kind]],
                                               capture_output=True, text=True, timeout=60).stdout)
        finally:
            stop.set()
            beside.join(30)
    print(f"{clients} clients, {kind}: p99 {before.p99():.1f} ms before, {during.p99():.1f} ms meanwhile, {len(during.seconds)} predictions")
    assert all("SLOW" in s and str(clients) in s for s in said), said
    assert all("No open connections left" in s for s in said) or "-X" in SLOW[kind], "the slow ones were ended by the server"
    assert during.health == {200} and len(during.seconds) > 20
    assert not room or during.predictions == {200}
