"""The serving process under faults: rows N9, E1–E11 and L1–L6 of the table of faults.

Counts are a twentieth of the goals; `pytest -m soak` runs them in full."""
import concurrent.futures
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from fake_server import FEWER, HOLD, KILL, NAN, RAISE, SLEEP, STOP, WAIT
from load import Load
from servers import FAKE, Server, Wire, error_of, request, until

SETTINGS = dict(threads=1, queue=64, prove_seconds=0.5)


@pytest.fixture(scope="module")
def server(double, tmp_path_factory):
    with Server(double, tmp_path_factory.mktemp("server"), **SETTINGS) as s:
        yield s


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(64) as p:
        yield p


def right(rows, answer):
    return answer.status_code == 200 and answer.json()["outputs"] == [[2 * a, 2 * b] for a, b in rows]


# ---- clients that leave


def test_N9_a_client_that_leaves_while_queued_is_never_run(server):
    before = server.metric("cancelled_total"), server.metric("batch_rows_sum")
    with Wire(server.port) as busy:
        busy.send(request(body=b'{"inputs": [[1, %f]]}' % (WAIT + 1.5)))
        time.sleep(0.3)
        gone = [Wire(server.port).send(request(body=b'{"inputs": [[1, %d]]}' % i)) for i in range(20)]
        time.sleep(0.3)
        for w in gone:
            w.close()
        assert busy.answer()[0] == 200
    until(lambda: server.metric("cancelled_total") >= before[0] + 20)
    assert server.metric("batch_rows_sum") - before[1] <= 10  # the long one and the proofs, not the twenty
    assert "internal_error" not in server.events()


def test_N9_a_client_that_leaves_while_running_frees_its_place(server):
    before = server.metric("dropped_total")
    with Wire(server.port) as w:
        w.send(request(body=b'{"inputs": [[1, %f]]}' % (WAIT + 0.5)))
        time.sleep(0.2)
    until(lambda: server.metric("dropped_total") >= before + 1)
    assert right([(1, 0)], server.predict([1, 0]))


# ---- what a stranger must not reach


@pytest.mark.parametrize("name", ["nope", "..%2f..%2fetc%2fpasswd", "../../etc/passwd", "double/../../x", "%00", "double\\x", "%e2%80%aedouble", "a" * 3000])
def test_V8_no_name_opens_a_file(server, tmp_path, name):
    "The calls of the worker's threads while the name is asked for: none opens a file, or asks whether there is one"
    calls, asked = tmp_path / "calls", [(f"/v2/models/{name}", "GET"), (f"/v2/models/{name}/versions/{name}", "GET"), (f"/v1/models/{name}", "GET"),
                                        (f"/v2/models/{name}/infer", "POST"), (f"/predictions/{name}", "POST"), (f"/predictions/double/{name}", "POST")]
    with subprocess.Popen(["strace", "-f", "-e", "trace=open,openat,stat,newfstatat,access,readlink", "-o", calls, "-p", str(server.worker())], stderr=subprocess.PIPE) as tracer:
        assert b"attached" in tracer.stderr.readline()
        try:
            answers = []
            for path, method in asked:
                with Wire(server.port) as w:
                    answers.append(w.send(request(path, method=method)).answer())
        finally:
            tracer.send_signal(signal.SIGINT)
    opened = [line for line in calls.read_text().splitlines() if '"' in line and '.py"' not in line]  # FastAPI looks up the source of a route once
    assert not opened, "\n".join(opened)
    assert {error_of(a) for a in answers} == {404}


def test_V9_no_error_tells_what_is_inside(double, tmp_path):
    "Every kind of failure, with canaries in the environment, in the package's path and in what the model raises"
    import shutil
    package = tmp_path / "canary-in-the-path" / "double"
    shutil.copytree(double, package)
    with Server(package, tmp_path, queue=1, max_body=1000, head_seconds=1, CANARY="canary-in-the-environment") as s:
        asked = [request(body=b'{"inputs": [[1, %d]]}' % c) for c in (RAISE, FEWER, NAN)]
        asked += [request(body=b) for b in (b"", b"{", b"[1]", b'{"inputs": [[1]]}', b'{"inputs": [["a", 1]]}', b" " * 1001)]
        asked += [request("/v2/models/nope/infer"), request("/nowhere"), request(method="PUT"), request(content_type="text/x"), request(x_request_timeout="no"), b"\0\r\n\r\n",
                  request(x_request_timeout="0.01", body=b'{"inputs": [[1, %f]]}' % (WAIT + 0.1)), b"GET /" + b"a" * 9000, request(content_encoding="gzip")]
        for data in asked:
            with Wire(s.port) as w:
                answer = w.send(data).answer()
                assert error_of(answer) >= 400
                assert "canary" not in repr(answer).lower() and "traceback" not in repr(answer).lower() and str(tmp_path) not in repr(answer), answer
        assert "canary-in-the-model" in s.events(), "the operator is told"


def test_no_route_administers_takes_a_url_or_unpickles(server):
    "A walk over every route there is: which methods it has, and what it takes"
    from types import SimpleNamespace

    from mlserve.serving.http.app import create_app, create_metrics_app
    from mlserve.serving.observability.shared_memory import Board
    from mlserve.serving.state import Lifecycle
    from mlserve.serving.observability.metrics import Numbers
    settings, numbers = SimpleNamespace(ui=True, metrics_port=0, model_version="1", image="", max_body=2**20, max_json=2**20, max_decoded=2**22, queue=8), Numbers(Board())
    apps = [create_app(Lifecycle(), settings, numbers), create_metrics_app(Lifecycle(), settings, numbers)]
    writing = {"/predict", "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer", "/v1/models/{name}:predict", "/v1/models/{name}/versions/{version}:predict", "/invocations", "/predictions/{name}",
               "/predictions/{name}/{version}", "/handle", "/v2/repository/index"}
    for app in apps:
        for route in app.routes:
            assert route.methods <= {"GET", "HEAD"} or route.methods == {"POST"} and route.path in writing, route
            taken = set(route.param_convertors) if hasattr(route, "param_convertors") else set()
            if dependant := getattr(route, "dependant", None):
                taken |= {p.name for p in dependant.query_params + dependant.header_params + dependant.cookie_params + dependant.body_params}
            assert taken <= {"name", "version"}, f"{route.path} takes {taken}"
    served = {m for m in sys.modules if m.startswith("mlserve.")}
    assert served
    for name in served:
        if (file := getattr(sys.modules[name], "__file__", None)) and "/serving/" in file:
            source = open(file).read()
            assert not re.search(r"\bpickle\.loads?\(|\bcloudpickle\b|\bjoblib\b|\bdill\b|torch\.load\(|allow_pickle=True|\beval\(", source.replace("model.eval(", "")), file


# ---- a model that fails


def test_E1_one_poisoned_request_fails_alone(server, pool):
    blocker = pool.submit(server.predict, [1, WAIT + 0.3])
    time.sleep(0.1)
    answers = [(i, pool.submit(server.predict, [i, RAISE if i == 7 else 0])) for i in range(16)]
    assert blocker.result().status_code == 200
    for i, a in answers:
        r = a.result()
        assert r.status_code == 500 if i == 7 else right([(i, 0)], r)
        assert "canary" not in r.text
    assert "canary-in-the-model" in server.events()


def test_E2_a_value_that_is_no_number_fails_its_request_alone(server, pool):
    blocker = pool.submit(server.predict, [1, WAIT + 0.3])
    time.sleep(0.1)
    answers = [(i, pool.submit(server.predict, [i, NAN if i == 3 else 0])) for i in range(8)]
    blocker.result()
    for i, a in answers:
        assert a.result().status_code == 500 if i == 3 else right([(i, 0)], a.result())


def test_E3_a_broken_contract_makes_the_server_not_ready_until_it_is_proved_again(server):
    assert server.predict([1, FEWER], [2, 0]).status_code == 500
    until(lambda: '"broken"' in server.events() or "repaired" in server.events())
    server.wait_ready()
    assert "repaired" in server.events() and right([(1, 0)], server.predict([1, 0]))


@pytest.mark.parametrize("count", [pytest.param(50_000, id="1in20"), pytest.param(1_000_000, id="full", marks=pytest.mark.soak)])
def test_E4_no_answer_goes_to_another_request(server, count):
    "60 clients, each answer a function of its own question; the queue has room for them and for the proof"
    batches = server.metric("batch_rows_count")
    with Load(server.port, connections=60) as load:
        until(lambda: len(load.answers) + len(load.failures) * count >= count, count / 50)
    assert not load.failures, f"{len(load.failures)} wrong, such as {load.failures[:3]}"
    assert server.metric("batch_rows_count") - batches < len(load.answers) / 3, "batches were formed"


def test_E5_a_full_queue_is_told_503_and_all_that_is_accepted_is_answered(double, tmp_path, pool):
    with Server(double, tmp_path, threads=1, queue=8, max_batch=1) as s:
        answers = [pool.submit(s.predict, [i, WAIT + 0.1]) for i in range(40)]
        found = [a.result() for a in answers]
        assert {r.status_code for r in found} == {200, 503}
        assert all(int(r.headers["retry-after"]) >= 1 for r in found if r.status_code == 503)
        assert s.http.get("/v2/health/ready").status_code == 200
        assert s.metric("shed_total") == sum(r.status_code == 503 for r in found)


def test_E6_a_deadline_is_kept_in_the_queue_and_in_the_model(server, pool):
    rows = server.metric("batch_rows_sum")
    busy = pool.submit(server.predict, [1, WAIT + 1.5], headers={"x-request-timeout": "0.5"})
    time.sleep(0.2)
    begin = time.monotonic()
    queued = server.predict([2, 0], headers={"x-request-timeout": "0.3"})
    assert queued.status_code == 504 and time.monotonic() - begin < 1.2
    assert busy.result().status_code == 504
    until(lambda: right([(1, 0)], server.predict([1, 0])))
    assert server.metric("batch_rows_sum") - rows < 15
    v2 = {"parameters": {"timeout": 300_000}, "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, WAIT + 1]}]}
    assert server.http.post("/v2/models/double/infer", json=v2).status_code == 504


@pytest.mark.parametrize("where", [0, 0.002], ids=["on the loop", "in a thread"])
@pytest.mark.parametrize("command", [SLEEP, HOLD, STOP], ids=["sleeps", "holds the lock", "is stopped"])
def test_E7_a_hung_worker_is_found_and_the_process_ends_with_70(double, tmp_path, command, where):
    with Server(double, tmp_path, hang_seconds=2, FAKE_SECONDS=where) as s:
        with Wire(s.port) as w:
            w.send(request(body=b'{"inputs": [[1, %d]]}' % command))
            assert s.ended(30) == 70
        assert s.last()["code"] == 70 and s.last()["step"] == "watchdog"


def test_E7_liveness_is_answered_while_the_model_is_busy(server, pool):
    busy = pool.submit(server.predict, [1, WAIT + 1])
    time.sleep(0.1)
    begin = time.monotonic()
    for _ in range(10):
        assert server.http.get("/v2/health/live").status_code == 200
    assert not busy.done() and time.monotonic() - begin < 0.8
    busy.result()


def test_E10_a_killed_worker_is_replaced_and_five_times_in_a_minute_is_the_end(double, tmp_path):
    with Server(double, tmp_path) as s:
        seconds = []
        for i in range(5):
            old = s.worker()
            with pytest.raises(httpx.HTTPError):
                s.predict([1, KILL])
            if i < 4:
                begin = time.monotonic()
                until(lambda: s.process.poll() is None and s.worker() not in (old, 0))
                s.wait_ready()
                seconds.append(time.monotonic() - begin)
        assert min(seconds) <= 5
        assert s.ended(30) == 70
        assert "five times" in s.last()["error"]


def test_E11_a_log_that_nobody_reads_stops_nothing(double, tmp_path):
    with Server(double, tmp_path, wait=False) as s:
        s.stop(signal.SIGKILL)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        env = {k: v for k, v in os.environ.items() if not k.startswith("MLSERVE_")}
        env |= {"MLSERVE_PACKAGE": str(double), "MLSERVE_HOST": "127.0.0.1", "MLSERVE_PORT": str(s.port), "MLSERVE_DRAIN_DELAY": "0"}
        s.process = subprocess.Popen([sys.executable, str(FAKE)], env=env, stderr=writer)
        s.wait_ready(30)
        assert s.predict([1, RAISE]).status_code == 500
        assert s.metric("lost_lines_total") > 0
        assert s.stop() == 0
        os.close(reader)
        os.close(writer)


# ---- start and stop


def test_L1_while_it_loads_it_lives_and_is_not_ready(double, tmp_path):
    with Server(double, tmp_path, wait=False, FAKE_LOAD_SECONDS=1.5) as s:
        seen = set()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                live, ready = s.http.get("/v2/health/live"), s.http.get("/v2/health/ready")
                infer = s.predict([1, 0])
                assert live.status_code == 200
                seen.add((ready.status_code, infer.status_code))
                if infer.status_code == 503:
                    assert int(infer.headers["retry-after"]) >= 1
                if ready.status_code == 200:
                    break
            time.sleep(0.01)
        assert (503, 503) in seen and (200, 503) not in seen


def test_L2_a_load_that_fails_ends_with_its_code(double, tmp_path):
    with Server(double, tmp_path, wait=False, package_digest="sha256:" + "0" * 64) as s:
        assert s.ended(30) == 5
        assert s.last()["code"] == 5 and s.last()["step"] == "package"


def test_L2_a_wrong_setting_or_argument_ends_with_2(double, tmp_path):
    for wrong in (dict(thread=2), dict(device="cuda", workers=2), dict(max_decoded=1), dict(hang_seconds="1e-999"), dict(device="cuda:٣")):
        with Server(double, tmp_path, wait=False, **wrong) as s:
            assert s.ended(30) == 2, wrong


KINDS = {"one worker": {}, "two workers": {"workers": 2}, "process 1": {"under": ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]}}


def stopped_under_load(double, folder, kind, clients=8):
    "Start, load, stop at a random instant: exit code, seconds, what went wrong, ids that were accepted, and ids that were answered"
    accepted = folder / f"accepted-{time.monotonic_ns()}"
    with Server(double, folder, threads=1, FAKE_ACCEPTED=accepted, **KINDS[kind]) as s:
        lost, answered, go = [], [], threading.Event()

        def client(seed):
            r, n = random.Random(seed), 0
            c = httpx.Client(base_url=s.url, timeout=30, trust_env=False)
            while not go.is_set():
                a, n = r.randrange(1000), n + 1
                try:
                    found = c.post("/predict", json={"inputs": [[a, WAIT + 0.001 * r.randrange(10)]]}, headers={"x-request-id": f"{seed}-{n}"})
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    return  # the port is closed: nothing was accepted
                except httpx.HTTPError as e:
                    lost.append(repr(e))
                    return
                if found.status_code != 200 or found.json()["outputs"][0][0] != 2 * a:
                    lost.append(found.text)
                answered.append(found.headers["x-request-id"])
        threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
        for t in threads:
            t.start()
        until(lambda: answered)
        time.sleep(random.random() / 2)
        begin = time.monotonic()
        code = s.stop()
        took = time.monotonic() - begin
        go.set()
        for t in threads:
            t.join()
        asked = [i for i in accepted.read_text().split() if "-" in i]  # by clients, not by the server before it was ready
        return code, took, lost, sorted(asked), sorted(answered)


@pytest.mark.parametrize("kind, share", [("one worker", 0.4), ("two workers", 0.3), ("process 1", 0.3)], ids=KINDS)
@pytest.mark.parametrize("stops", [pytest.param(50, id="1in20"), pytest.param(1000, id="full", marks=pytest.mark.soak)])
def test_L3_a_stop_under_load_loses_no_answer(double, tmp_path, kind, share, stops):
    "At a random instant, as process 1 and as any other: each request that was accepted was answered, once; exit 0"
    for _ in range(int(stops * share)):
        code, took, lost, accepted, answered = stopped_under_load(double, tmp_path, kind)
        assert not lost and accepted == answered and answered
        assert code == 0 and took < 10


def test_L3_in_the_drain_delay_it_serves_and_is_not_ready(double, tmp_path, pool):
    with Server(double, tmp_path, drain_delay=2) as s:
        slow = pool.submit(s.predict, [1, WAIT + 1])
        time.sleep(0.2)
        s.process.terminate()
        until(lambda: s.http.get("/v2/health/ready").status_code == 503, 2)
        r = httpx.post(s.url + "/predict", json={"inputs": [[2, 0]]}, trust_env=False)
        assert right([(2, 0)], r) and r.headers["connection"] == "close"
        assert right([(1, WAIT + 1)], slow.result()) and s.ended(20) == 0


def test_L3_a_client_that_had_an_answer_just_now_may_ask_once_more(double, tmp_path):
    "On the connection that it keeps; the answer says that it is the last"
    one = request(body=b'{"inputs": [[1, 0]]}')
    with Server(double, tmp_path) as s, Wire(s.port) as w:
        assert w.send(one).answer()[0] == 200
        s.process.terminate()
        time.sleep(0.6)
        status, headers, _ = w.send(one).answer() or (None, {}, b"")
        assert status == 200 and headers["connection"] == "close", "lost"
        assert s.ended(8) == 0


def test_L3_a_request_that_is_not_sent_to_its_end_does_not_hold_the_stop(double, tmp_path):
    "It would have 30 s for its body; a platform kills after 10"
    whole = request(body=b'{"inputs": [[1, 0]]}')
    with Server(double, tmp_path) as s:
        with Wire(s.port) as half, Wire(s.port) as head:
            half.send(whole[:-3])
            head.send(whole[:20])
            time.sleep(0.3)
            s.process.terminate()
            assert s.ended(8) == 0
            assert [w.answer()[0] for w in (half, head)] == [408, 408]
        assert any(e["event"] == "draining" and e["receiving"] == 2 for e in map(json.loads, s.events().splitlines()))


def test_L4_after_the_grace_the_client_is_told_and_the_exit_code_is_75(double, tmp_path, pool):
    with Server(double, tmp_path, grace=0.5) as s:
        cut = pool.submit(s.predict, [1, WAIT + 20])
        time.sleep(0.5)
        s.process.terminate()
        assert cut.result().status_code == 503 and s.ended(10) == 75
        assert "1 request" in s.last()["error"]


def test_L4_a_model_that_holds_the_lock_cannot_keep_the_process(double, tmp_path):
    with Server(double, tmp_path, grace=1) as s:
        with Wire(s.port) as w:
            w.send(request(body=b'{"inputs": [[1, %d]]}' % HOLD))
            time.sleep(0.5)
            assert s.stop(seconds=20) == 75


def test_L5_a_signal_during_the_load_ends_it_at_once(double, tmp_path):
    for when in ("", "", '"listening"'):
        with Server(double, tmp_path, wait=False, FAKE_LOAD_SECONDS=30) as s:
            until(lambda: when in s.events())
            time.sleep(random.random() / 2)
            assert s.stop(seconds=10) in (0, -signal.SIGTERM)


def test_L5_a_second_signal_does_not_wait(double, tmp_path):
    with Server(double, tmp_path, drain_delay=60) as s:
        s.process.terminate()
        until(lambda: s.http.get("/v2/health/ready").status_code == 503)
        assert s.stop(signal.SIGINT, 10) == 0


def test_L5_a_killed_parent_leaves_no_worker_and_its_port_is_free(double, tmp_path):
    with Server(double, tmp_path) as s:
        worker = s.worker()
        s.stop(signal.SIGKILL)
        until(lambda: not os.path.exists(f"/proc/{worker}") or "\nState:\tZ" in open(f"/proc/{worker}/status").read())
        with Server(double, tmp_path, port=s.port):
            assert httpx.get(s.url + "/v2/health/live", trust_env=False).status_code == 200


# ---- several workers


def test_two_workers_share_one_port_and_one_view_of_the_metrics(double, tmp_path):
    with Server(double, tmp_path, workers=2) as s:
        for i in range(40):
            with Wire(s.port) as w:
                assert w.send(request(body=b'{"inputs": [[%d, 0]]}' % i)).answer()[0] == 200
        seen = {s.http.get("/metrics").text.split('route="/predict",status="200"} ')[1].split("\n")[0] for _ in range(5)}
        assert seen == {"40.0"}
        assert s.stop() == 0


def test_sagemaker_starts_it_with_serve_and_names_the_port(double, tmp_path):
    with Server(double, tmp_path, wait=False) as s:
        s.stop(signal.SIGKILL)
        env = {k: v for k, v in os.environ.items() if not k.startswith("MLSERVE_")}
        env |= {"MLSERVE_PACKAGE": str(double), "SAGEMAKER_BIND_TO_PORT": str(s.port), "MLSERVE_DRAIN_DELAY": "0"}
        s.process = subprocess.Popen([sys.executable, str(FAKE), "serve"], env=env, stderr=subprocess.DEVNULL)
        s.wait_ready()
        assert s.http.get("/ping").status_code == 200
        assert json.loads(s.http.post("/invocations", json={"instances": [[1, 2]]}).content) == {"predictions": [[2.0, 4.0]]}
