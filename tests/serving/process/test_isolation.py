"""What one part of the server must not do to the others: rows E12, E13 and L8 of the table of faults.

A handler that raises, ends, hangs or forks; a pause of everything; a request that takes minutes; and what is opened or started too late."""
import contextlib
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest
from fake_server import WAIT
from faulty_handler import RAISED
from commands import TESTS
from servers import Server, Wire, error_of, request, until

HANDLER = TESTS / "faulty_handler.py"
LARGE = b'{"inputs": [[1, 2]]}' + b" " * 100_000  # a body that is read beside the event loop
SETTINGS = dict(threads=1, queue=64, prove_seconds=0.5, FAKE_HANDLER=HANDLER)


@pytest.fixture(scope="module")
def server(double, tmp_path_factory):
    with Server(double, tmp_path_factory.mktemp("server"), **SETTINGS) as s:
        yield s


def do(server, *deeds, **kw):
    "Ask the handler for deeds: before the model, behind it"
    return server.http.post("/handle", json=list(deeds), **kw)


def well(server):
    "Whether the server answers as ever"
    return server.predict([1, 2]).json() == {"outputs": [[2, 4]]} and do(server, "").json() == [2, 0]


def offspring(pid):
    "The children of every thread of a process, those that wait to be collected left out"
    found = [int(c) for t in os.listdir(f"/proc/{pid}/task") for c in Path(f"/proc/{pid}/task/{t}/children").read_text().split()]
    return [c for c in found if "\nState:\tZ" not in Path(f"/proc/{c}/status").read_text()]


def events(server, name):
    lines = [json.loads(line) for line in server.events().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == name]


# ---- a handler that raises, ends or changes what is everybody's


@pytest.mark.parametrize("deed", range(len(RAISED)), ids=lambda i: type(RAISED[i]).__name__)
@pytest.mark.parametrize("before", [True, False], ids=["before the model", "behind it"])
def test_E12_whatever_a_handler_raises_is_one_500(server, deed, before):
    worker = server.worker()
    answer = do(server, *([str(deed)] if before else ["", str(deed)]))
    assert answer.status_code == 500 and type(RAISED[deed]).__name__ in answer.json()["error"]
    assert well(server) and server.worker() == worker


def test_E12_a_long_sentence_of_a_handler_is_cut_to_a_kilobyte(server):
    answer = do(server, "long")
    assert answer.status_code == 400 and 300 < len(answer.content) <= 1024


@pytest.mark.parametrize("deed, how", [("exit 0", "code 0"), ("exit 5", "code 5"), ("abort", "SIGABRT"), ("segfault", "SIGSEGV"), ("terminate", "code")])
def test_E12_a_handler_that_ends_its_process_is_a_crash_and_is_replaced(double, tmp_path, deed, how):
    with Server(double, tmp_path, **SETTINGS) as s:
        worker = s.worker()
        with contextlib.suppress(httpx.HTTPError):
            do(s, deed)
        until(lambda: s.process.poll() is not None or s.worker() not in (worker, 0))
        s.wait_ready()
        until(lambda: events(s, "worker_died"))  # told by the supervisor, which need not be the first to run
        assert well(s) and how in events(s, "worker_died")[0]["how"]
        assert s.stop() == 0


def test_E12_five_deaths_name_what_killed_the_last(double, tmp_path):
    with Server(double, tmp_path, **SETTINGS) as s:
        for _ in range(5):
            with contextlib.suppress(httpx.HTTPError, AssertionError):
                s.wait_ready()
                do(s, "segfault")
        assert s.ended(30) == 70
        assert "SIGSEGV" in s.last()["error"] and "memory" not in s.last()["error"]


def test_E12_a_death_while_it_stops_is_not_exit_0(double, tmp_path):
    "What it was answering was cut"
    with Server(double, tmp_path, drain_delay=3, **SETTINGS) as s:
        s.process.terminate()
        until(lambda: s.http.get("/v2/health/ready").status_code == 503)
        with contextlib.suppress(httpx.HTTPError):
            do(s, "exit 0")
        assert s.ended(20) == 75


@pytest.mark.parametrize("deed", ["signals", "directory", "umask", "threads", "quit in a thread", "stop child", "fork and return", "stderr", "close stderr"])
def test_E12_what_a_handler_changes_for_everybody_disturbs_nobody(double, tmp_path, deed):
    with Server(double, tmp_path, **SETTINGS) as s:
        worker, own = s.worker(), offspring(s.worker())
        with Wire(s.port) as w:
            w.send(request("/handle", json.dumps([deed]).encode()))
            time.sleep(0.5)
            assert do(s, "0").status_code == 500 and "SystemExit" in s.events(), "the operator still hears"
            assert w.answer()[0] == 200
        time.sleep(1.2)  # it is proved meanwhile
        assert s.http.get("/v2/health/ready").status_code == 200 and well(s) and s.worker() == worker
        assert offspring(worker) == own, "a copy of the server lives on"
        assert s.stop() == 0


# ---- a handler that hangs, or forks


def test_E12_eight_handlers_that_hang_starve_nobody(double, tmp_path):
    "Large bodies and the timeout of others are kept, traffic is not welcome, and the worker is replaced when they stay"
    with Server(double, tmp_path, hang_seconds=5, **SETTINGS) as s, contextlib.ExitStack() as stack:
        worker, wires = s.worker(), [stack.enter_context(Wire(s.port)) for _ in range(8)]
        for w in wires:
            w.send(request("/handle", b'["hang"]'))
        time.sleep(0.3)
        begin = time.monotonic()
        assert s.http.post("/predict", content=LARGE, headers={"content-type": "application/json"}).status_code == 200
        assert do(s, "", headers={"x-request-timeout": "0.5"}).status_code == 504
        assert time.monotonic() - begin < 2.5 and s.http.get("/v2/health/live").status_code == 200
        until(lambda: s.http.get("/v2/health/ready").status_code == 503, 5)
        assert s.predict([1, 2]).status_code == 200
        assert {error_of(w.answer()) for w in wires} == {504}
        until(lambda: s.worker() not in (worker, 0), 20)
        s.wait_ready()
        assert well(s) and "handler" in events(s, "hung")[0]["why"]
        assert s.stop() == 0


def test_E12_one_that_hangs_is_told_504_at_its_own_deadline(server):
    begin = time.monotonic()
    assert do(server, "hang", headers={"x-request-timeout": "0.5"}).status_code == 504
    assert 0.5 <= time.monotonic() - begin < 2 and well(server)


def test_E12_a_child_of_a_handler_keeps_no_port_and_no_connection(double, tmp_path):
    with Server(double, tmp_path, **SETTINGS) as s:
        (helper,) = offspring(s.worker())
        with Wire(s.port) as w:
            assert w.send(request("/handle", b'["fork"]')).answer()[0] == 200
            (child,) = set(offspring(s.worker())) - {helper}
            w.send(request("/handle", b"[", connection="close"))
            assert w.answer()[0] == 400 and w.ended(), "the child holds no client"
        try:
            s.stop(signal.SIGKILL)
            until(lambda: not os.path.exists(f"/proc/{child}") or "\nPPid:\t1\n" in Path(f"/proc/{child}/status").read_text())
            assert os.path.exists(f"/proc/{child}"), "the child lives on"
            until(lambda: not os.path.exists(f"/proc/{helper}") or "\nState:\tZ" in Path(f"/proc/{helper}/status").read_text())  # the server's own does not
            socket.create_server(("127.0.0.1", s.port)).close()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


# ---- a pause, and a request that takes long


@pytest.mark.parametrize("seconds", [pytest.param(4, id="short"), pytest.param(75, id="full", marks=pytest.mark.soak)])
def test_E13_a_pause_of_the_whole_server_is_no_hang_and_costs_nobody_an_answer(double, tmp_path, seconds):
    "Half a head, half a body, a connection that is kept, one in the model and one with a deadline: all as if nothing had been"
    limit = seconds - 2
    limits = dict(hang_seconds=limit, head_seconds=limit, body_seconds=limit, keep_alive_seconds=limit, write_seconds=limit)
    whole = request(body=b'{"inputs": [[1, 0]]}')
    with Server(double, tmp_path, **limits, **SETTINGS) as s, contextlib.ExitStack() as stack:
        worker = s.worker()
        head, body, kept, inside, timed = [stack.enter_context(Wire(s.port, seconds + 30)) for _ in range(5)]
        assert kept.send(whole).answer()[0] == 200
        inside.send(request(body=b'{"inputs": [[1, %f]]}' % (WAIT + 1)))
        timed.send(request(body=b'{"inputs": [[1, 0]]}', x_request_timeout=str(limit)))
        head.send(whole[:20])
        body.send(whole[:-3])
        time.sleep(0.3)
        for p in (s.process.pid, worker):
            os.kill(p, signal.SIGSTOP)
        time.sleep(seconds)
        for p in (s.process.pid, worker):
            os.kill(p, signal.SIGCONT)
        time.sleep(0.8)
        head.send(whole[20:])
        body.send(whole[-3:])
        kept.send(whole)
        assert [w.answer()[0] for w in (head, body, kept, inside, timed)] == [200] * 5
        time.sleep(1)
        assert s.process.poll() is None and s.worker() == worker and well(s)
        assert s.stop() == 0


@pytest.mark.parametrize("rows", [pytest.param(100_000, id="1in4"), pytest.param(400_000, id="full", marks=pytest.mark.soak)])
def test_E13_a_long_request_runs_in_turns_with_others_and_is_no_hang(double, tmp_path, rows):
    body = b'{"inputs": [%s]}' % b", ".join(b"[%d, 0]" % i for i in range(rows))
    with Server(double, tmp_path, hang_seconds=2, max_batch=32, **SETTINGS) as s, Wire(s.port, 400) as long:
        begin = time.monotonic()
        long.send(request(body=body))
        until(lambda: s.metric("batch_rows_sum") > 1000)
        others = []
        while time.monotonic() - begin < 4:
            at = time.monotonic()
            assert s.predict([1, 2]).json() == {"outputs": [[2, 4]]}
            others.append(time.monotonic() - at)
        assert sorted(others)[len(others) // 2] < 0.5, "others have their turns"
        try:
            status, _, answer = long.answer()
        except TimeoutError:
            raise AssertionError(f"no answer, and {s.metric('batch_rows_sum'):.0f} rows were run: {s.events()[-2000:]}") from None
        assert status == 200 and json.loads(answer)["outputs"] == [[2 * i, 0] for i in range(rows)]
        assert time.monotonic() - begin > 2.5, "it took longer than a hang may"


@pytest.mark.parametrize("how", ["client gone", "deadline"])
def test_E13_of_a_long_request_that_nobody_waits_for_no_more_is_run(double, tmp_path, how):
    body = b'{"inputs": [%s]}' % b", ".join([b"[1, 0]"] * 100_000)
    with Server(double, tmp_path, max_batch=32, **SETTINGS) as s:
        with Wire(s.port) as w:
            w.send(request(body=body, **({"x_request_timeout": "3"} if how == "deadline" else {})))
            until(lambda: s.metric("batch_rows_sum") > 1000)
            if how == "deadline":
                assert error_of(w.answer()) == 504
        time.sleep(0.5)
        ran = s.metric("batch_rows_sum")
        time.sleep(1)
        assert s.metric("batch_rows_sum") < ran + 10, "only proofs were run"


# ---- ready means loaded, and able


def asked():
    "One request for every route, and for every kind of refusal that a stranger can cause"
    import gzip
    good, v2 = b'{"inputs": [[1, 0]]}', {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 0]}]}
    for path in ("/", "/docs", "/openapi.json", "/metrics", "/health", "/version", "/v2", "/v2/health/live", "/v2/health/ready", "/ping", "/v2/models", "/v1/models",
                 "/v2/models/stats", "/v2/models/double", "/v2/models/double/ready", "/v2/models/double/stats", "/v2/models/double/config", "/v1/models/double",
                 "/v2/models/double/versions/1", "/v2/models/nope", "/v1/models/double/metadata", "/nowhere"):
        yield request(path, b"", "GET")
        yield request(path, b"", "PUT")
    for path in ("/predict", "/predictions/double", "/v2/models/double/infer", "/v1/models/double:predict", "/invocations", "/handle", "/predictions/nope", "/nowhere"):
        for body in (good, b"", b"{", b"[1]", b'{"inputs": [["a", 1]]}', b'{"inputs": [[NaN, 1]]}', b"\xff", b"[" * 100_000, b'{"instances": [[1, 2]]}', b'[""]',
                     json.dumps({"inputs": [[0.125 * i, 1] for i in range(10_000)]}).encode(), json.dumps(v2).encode()):
            yield request(path, body)
        yield request(path, gzip.compress(good), content_encoding="gzip", accept_encoding="gzip")
        yield request(path, b"no", content_encoding="deflate")
        yield request(path, good, content_encoding="br")
        yield request(path, good, x_request_timeout="0.000001")
        yield request(path, good, x_request_timeout="no")
        for media in ("text/xml", "text/csv", "text/csv; charset=utf-16", "application/octet-stream", "application/jsonlines"):
            yield request(path, b"1,2\n", **{"content-type": media})
    for part in ({"datatype": "FP64"}, {"shape": [2, 1]}, {"name": "q"}, {"shape": [-1, 2]}, {"data": ["a", "b"]}, {"parameters": {"binary_data_size": 8}}):
        yield request("/v2/models/double/infer", json.dumps({"inputs": [v2["inputs"][0] | part]}).encode())
    yield request("/v2/models/double/infer", json.dumps(v2 | {"outputs": [{"name": "y", "parameters": {"classification": 1}}]}).encode())
    yield request("/v2/models/double/infer", json.dumps(v2 | {"outputs": [{"name": "y", "parameters": {"binary_data": True}}]}).encode())
    yield request("/v2/repository/index", b'{"ready": true}')
    yield request("/v2/repository/index", b"[")
    yield from (b"\0\r\n\r\n", request("/" + "a" * 9000), request(x="a" * 40_000), b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/3.1\r\nhost: a\r\n\r\n", request("/../x"),
                request(**{"content-length": str(2**60)}), request(transfer_encoding="gzip"), b"POST /predict HTTP/1.0\r\nhost: a\r\ncontent-length: 0\r\n\r\n",
                b"GET / HTTP/1.1\r\nhost: a\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"POST /predict HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nx\r\n")


def test_L8_from_ready_on_nothing_is_opened(double, tmp_path):
    "Every file that any thread of the server opens, from before the first 200 of its readiness; what a traceback quotes is what its request is about"
    calls = tmp_path / "calls"
    under = ["strace", "--seccomp-bpf", "-f", "-ttt", "-e", "trace=open,openat,execve", "-o", str(calls)]
    with Server(double, tmp_path, wait=False, under=under, model_version="1", ui=True, cache=tmp_path / "cache", **SETTINGS) as s:
        s.wait_ready(120)
        ready, statuses = time.time(), set()
        for data in asked():
            with Wire(s.port) as w:
                statuses.add(w.send(data).answer()[0])
        time.sleep(1.5)  # it is proved meanwhile
        quiet = time.time()
        assert do(s, "0").status_code == 500
    assert {200, 400, 404, 405, 413, 414, 415, 431, 504} <= statuses and 500 not in statuses
    opened = [line for line in calls.read_text().splitlines() if '"' in line and ready < float(line.split()[1]) < quiet]
    opened = [line for line in opened if not re.search('"(/sys/fs/cgroup|/proc)/', line) and str(tmp_path / "cache") not in line]  # what /metrics counts
    assert not opened, "\n".join(opened)


USER = 20_000 + os.getpid() % 40_000  # of these tests alone: another lane runs some of them at the same time
LIMITED = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--inh-caps=-all,+dac_override,+dac_read_search,+kill",
           "--ambient-caps=-all,+dac_override,+dac_read_search,+kill", "prlimit"]


@pytest.mark.parametrize("most", [2, 3, 5, 8, 12, 60])
def test_L8_under_a_limit_of_processes_it_is_able_or_never_ready(double, tmp_path, most):
    "The kernel's limit for a user, who has no other process; it counts threads, as a container's does"
    with Server(double, tmp_path, wait=False, under=[*LIMITED, f"--nproc={most}"], **SETTINGS | {"threads": 2}) as s:
        ready = False
        while s.process.poll() is None and not ready:
            with contextlib.suppress(httpx.HTTPError):
                ready = s.http.get("/v2/health/ready").status_code == 200
            time.sleep(0.05)
        if ready:
            assert well(s) and s.http.post("/predict", content=LARGE, headers={"content-type": "application/json"}).status_code == 200 and most > 12
        else:
            assert s.ended() == 7 and "pids" in s.last()["error"], s.events()


def started_by_numbers(server):
    "How many threads a handler starts by multiplying matrices"
    return int(re.search(r"(\d+) more threads", do(server, "numbers").json()["error"])[1])


def test_E12_numbers_of_a_handler_are_computed_on_the_cores_that_the_model_may_use(server):
    "NumPy's library would start a thread for each core of the machine but one"
    assert started_by_numbers(server) == 0


def test_E12_control_a_library_that_starts_threads_of_its_own_is_seen(double, tmp_path):
    "Whoever sets its variable for the container is obeyed"
    with Server(double, tmp_path, OPENBLAS_NUM_THREADS="2", **SETTINGS) as s:
        assert started_by_numbers(s) == 1


@pytest.mark.parametrize("deed", ["timeout", "modules"])
def test_what_a_handler_sets_for_everybody_spares_large_bodies(double, tmp_path, deed):
    "They are read by another process: the sockets to it wait as they did, and what travels is known there"
    with Server(double, tmp_path, **SETTINGS) as s:
        assert do(s, deed).status_code == 200
        for body, status in ((LARGE, 200), (b'{"inputs": [[1, 2], [1]]}', 400)):
            answer = s.http.post("/predict", content=body + b" " * 6_000_000)
            assert answer.status_code == status, answer.text


def test_an_exception_that_comes_when_a_job_is_over_costs_no_thread_and_no_answer(double, tmp_path):
    with Server(double, tmp_path, **SETTINGS) as s:
        worker = s.worker()
        for _ in range(12):
            assert do(s, "late", timeout=5).status_code == 200
            time.sleep(0.25)
        assert well(s) and s.worker() == worker


def test_a_sentence_of_a_failure_that_takes_its_time_keeps_nobody_waiting(server):
    with Wire(server.port) as w:
        w.send(request("/handle", b'["slow"]'))
        time.sleep(0.3)
        began = time.monotonic()
        assert server.predict([1, 2]).status_code == 200
        assert time.monotonic() - began < 1
        assert error_of(w.answer()) == 500
    assert "slow" in events(server, "model_failed")[-1]["traceback"]


@pytest.mark.parametrize("deed", ["tee", "no stdout"])
def test_a_stop_is_exit_0_whatever_a_handler_made_of_stdout(double, tmp_path, deed):
    with Server(double, tmp_path, **SETTINGS) as s:
        assert do(s, deed).status_code == 200
        assert s.stop() == 0
