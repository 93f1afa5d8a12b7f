"""Limits of time, size and place on a real port: rows N1–N8 and N10 of the table of faults."""
import json
import os
import threading
import time

import httpx
import pytest
from servers import HEALTH, Server, Wire, error_of, patience, request, status_of, until

GET = b"GET /v2 HTTP/1.1\r\nhost: a\r\n\r\n"
SETTINGS = dict(head_seconds=1, body_seconds=2, write_seconds=1, keep_alive_seconds=2, max_body=100_000, connections=40, queue=64)


@pytest.fixture(scope="module")
def server(double, tmp_path_factory):
    "A server whose times are short, so that the tests are"
    with Server(double, tmp_path_factory.mktemp("limits"), **SETTINGS) as s:
        yield s


def wire(server, *parts, **kw):
    return Wire(server.port, **kw).send(*parts)


def memory(server, field="VmRSS"):
    "Bytes the worker has, or had at most: `VmHWM`"
    return status_of(server.worker(), field) * 1024


def cpu(server):
    "Seconds the worker has computed"
    with open(f"/proc/{server.worker()}/stat") as f:
        return sum(map(int, f.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def test_N1_a_slow_head_is_told_408(server):
    slow = [wire(server, b"POST /predict HTTP/1.1\r\nhost: ") for _ in range(20)]
    assert server.predict([1, 0]).status_code == 200
    for w in slow:
        assert error_of(w.answer()) == 408
        assert w.ended()
        w.close()


def test_N1_a_head_that_drips_has_one_deadline_for_all_of_it(server):
    with wire(server, b"GET /v2 HTTP/1.1\r\nhost: ") as w:
        begin = time.monotonic()
        w.socket.settimeout(0.1)
        while time.monotonic() < begin + patience(30):
            try:
                w.send(b"a")
                if not w.fill() or b"\r\n\r\n" in w.buffer:
                    break
            except TimeoutError:
                pass
        assert error_of(w.answer()) == 408
        assert time.monotonic() - begin < 1 + 5


def test_N2_health_is_answered_when_silent_connections_hold_every_place(server):
    silent = [wire(server) for _ in range(150)]
    for _ in range(5):
        with wire(server, HEALTH) as w:
            assert w.answer()[0] == 200
    for w in silent:
        assert w.ended()
        w.close()
    assert server.predict([1, 0]).status_code == 200


def test_N2_over_the_limit_other_requests_are_told_503(server):
    held = [wire(server, b"POST /predict HTTP/1.1\r\n") for _ in range(45)]
    with wire(server, request()) as w:
        assert error_of(w.answer()) == 503
    for w in held:
        w.close()


def test_N3_a_slow_body_is_told_408_and_holds_no_place_in_the_queue(server):
    with wire(server, b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 50\r\n\r\n{") as w:
        assert server.metric("pending") == 0
        assert server.predict([1, 0]).status_code == 200
        assert error_of(w.answer()) == 408
        assert w.ended()


def test_N3_a_reader_that_never_reads_is_ended(server):
    before = server.metric("aborted_total")
    many = request("/openapi", b"", "GET") * 20000  # 404 answers, more than the buffers of the kernel hold
    with Wire(server.port, SO_RCVBUF=4096) as w:
        def push():
            try:
                w.socket.sendall(many)
            except OSError:
                pass
        thread = threading.Thread(target=push, daemon=True)
        thread.start()
        until(lambda: server.metric("aborted_total") == before + 1, 30)
    thread.join(10)


def test_N4_a_body_over_the_limit_is_told_413_before_it_is_read(server):
    head = b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 200000000\r\n\r\n"
    with wire(server, head) as w:
        assert error_of(w.answer()) == 413
        assert w.ended()
    with wire(server, head.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n")) as w:
        assert error_of(w.answer()) == 413


def test_N4_a_chunked_body_over_the_limit_is_told_413_and_memory_stays(server):
    server.predict([1, 0])
    before = memory(server)
    for _ in range(5):
        with wire(server, b"POST /predict HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n") as w:
            try:
                for _ in range(100):
                    w.send(b"4000\r\n" + b"0" * 0x4000 + b"\r\n")
            except OSError:
                pass
            assert error_of(w.answer()) == 413
    assert memory(server) - before < 16 * 2**20


def test_N4_a_gzip_bomb_is_told_413(server):
    import gzip
    bomb, before = gzip.compress(bytes(80_000_000)), memory(server, "VmHWM")
    with wire(server, request(body=bomb, content_encoding="gzip")) as w:
        assert error_of(w.answer()) == 413
    assert memory(server, "VmHWM") - before < 16 * 2**20, "no more is inflated than the limit"


@pytest.mark.parametrize("rounds", [pytest.param(5, id="1in20"), pytest.param(100, id="full", marks=pytest.mark.soak)])
def test_N5_many_tiny_chunks_cost_little(double, tmp_path, rounds):
    "Bodies of 6,000 chunks of 64 bytes: no memory is kept, and a chunk costs microseconds"
    body = b'{"inputs": [[1, 0]]}'.ljust(384_000)  # more than a processor copies within its caches
    chunks = b"".join(b"40\r\n%b\r\n" % body[i:i + 64] for i in range(0, len(body), 64)) + b"0\r\n\r\n"
    warm = 24  # the allocator has its share by then, and keeps it
    with Server(double, tmp_path, **SETTINGS | {"max_body": 400_000}) as server:
        for i in range(rounds + warm):
            if i == warm:
                before, began = memory(server), cpu(server)
            with wire(server, b"POST /predict HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n", chunks) as w:
                assert w.answer()[0] == 200
        spent, kept = cpu(server) - began, memory(server) - before
    print(f"{spent / rounds / len(body) * 64e6:.2f} us a chunk, {kept} bytes kept")
    seen = {"copied": spent >= rounds * len(body) / 64 * 3e-6, "kept": kept >= 2**20}  # a chunk takes a microsecond; copying the body takes ten times as long
    assert not any(seen.values()), [name for name, found in seen.items() if found]


@pytest.mark.parametrize("size", [1, 8])
def test_N5_tiny_chunks_without_number_are_refused_whoever_asks(server, size):
    with wire(server, b"POST /v2/health/live HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n") as w:
        try:
            for _ in range(100):
                w.send(b"%d\r\n%b\r\n" % (size, b"x" * size) * 2000)
        except OSError:
            pass
        assert error_of(w.answer()) == 400


def test_N5_chunks_that_are_mostly_wrapping_are_refused(server):
    with wire(server, b"POST /predict HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n") as w:
        try:
            for _ in range(300):
                w.send(b"1;" + b"x" * 1000 + b"\r\n \r\n")
        except OSError:
            pass
        assert error_of(w.answer()) == 400


@pytest.mark.parametrize("head, status", [(b"GET /" + b"a" * 2**20, 414), (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 2**20, 431),
                                          (b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 10_000, 431)], ids=["url", "one header", "10,000 headers"])
def test_N6_a_head_that_is_too_large_is_refused_early(server, head, status):
    with wire(server) as w:
        try:
            w.send(head)
        except OSError:
            pass
        assert error_of(w.answer()) == status


TWO_MEANINGS = {
    "length and chunks": b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc",
    "the same length twice": b"content-length: 3\r\ncontent-length: 3\r\n\r\nabc",
    "a list of lengths": b"content-length: 3, 3\r\n\r\nabc",
    "a signed length": b"content-length: +3\r\n\r\nabc",
    "chunked, x": b"transfer-encoding: chunked, x\r\n\r\n0\r\n\r\n",
    "x, chunked": b"transfer-encoding: x, chunked\r\n\r\n0\r\n\r\n",
    "identity": b"transfer-encoding: identity\r\n\r\n",
    "a bare line feed": b"x: y\nz: a\r\n\r\n",
    "a bare carriage return": b"x: y\rz: a\r\n\r\n",
    "a folded line": b"x: y\r\n z\r\n\r\n",
    "a folded coding": b"transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "two hosts": b"host: b\r\n\r\n",
    "a NUL": b"x: a\0b\r\n\r\n",
    "a space before the colon": b"content-length : 3\r\n\r\nabc",
    "a signed chunk": b"transfer-encoding: chunked\r\n\r\n-1\r\n\r\n",
    "a chunk ended by a line feed": b"transfer-encoding: chunked\r\n\r\n3\nabc\n0\n\n",
    "a chunk over 64 bits": b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("rest", TWO_MEANINGS.values(), ids=TWO_MEANINGS)
def test_N7_a_head_with_two_meanings_is_400_and_nothing_behind_it_is_a_request(server, rest):
    with wire(server, b"POST /predict HTTP/1.1\r\nhost: a\r\n" + rest + GET + GET) as w:
        assert error_of(w.answer()) == 400
        assert w.ended()


@pytest.mark.parametrize("first", [b"POST /predict HTTP/1.1\r\ncontent-length: 0\r\n\r\n", b"GET / HTTP/2.0\r\nhost: a\r\n\r\n", b"GET /\r\n\r\n",
                                   b"GET http://b/v2 HTTP/1.1\r\nhost: a\r\n\r\n", b"CONNECT b:1 HTTP/1.1\r\nhost: a\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"])
def test_N7_no_host_other_versions_and_other_targets_are_400(server, first):
    with wire(server, first + GET) as w:
        assert error_of(w.answer()) == 400
        assert w.ended()


@pytest.mark.parametrize("offer", [b"", b"connection: upgrade\r\nupgrade: x\r\ncontent-length: 3\r\n"])
def test_N7_a_tunnel_is_not_opened(server, offer):
    with wire(server, b"CONNECT /predict HTTP/1.1\r\nhost: a\r\n" + offer + b"\r\nabc" + GET) as w:
        assert error_of(w.answer()) == 405
        assert w.ended()


def test_N7_an_upgrade_is_not_taken(server):
    with wire(server, b"GET /v2 HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n" + GET) as w:
        assert [w.answer()[0] for _ in range(2)] == [200, 200]


def test_N8_pipelined_requests_are_answered_in_order_with_their_own_ids(server):
    kinds = [request(body=b'{"inputs": [[%d, 0]]}' % i, x_request_id=f"r{i}") if i % 3 else
             request("/nowhere", b"", "GET", x_request_id=f"r{i}") for i in range(30)]
    with wire(server, b"".join(kinds)) as w:
        for i in range(30):
            status, headers, body = w.answer()
            assert headers["x-request-id"] == f"r{i}"
            assert (status, json.loads(body)) == (200, {"outputs": [[2.0 * i, 0.0]]}) if i % 3 else status == 404


def test_N8_a_connection_lives_on_after_a_refusal_of_a_whole_request(server):
    with wire(server) as w:
        for body, status in [(b"{", 400), (b'{"inputs": [[1, 0]]}', 200), (b'{"inputs": [[1]]}', 400), (b'{"inputs": [[2, 0]]}', 200)]:
            assert w.send(request(body=body)).answer()[0] == status


def test_N8_an_empty_line_between_requests_means_nothing(server):
    "RFC 9112, 2.2: it is no head that never ends"
    with wire(server) as w:
        for _ in range(2):
            assert w.send(request()).answer()[0] == 200
            w.send(b"\r\n", b"\r", b"\n")
            time.sleep(1.6)  # longer than a head may take


def test_N8_an_early_answer_closes_the_connection(server):
    with wire(server, b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 100001\r\n\r\n" + b"x" * 1000) as w:
        answer = w.answer()
        assert error_of(answer) == 413 and answer[1]["connection"] == "close"


def test_N8_cut_anywhere_a_request_means_the_same(server):
    whole = request()
    for i in range(1, len(whole), 7):
        with wire(server, whole[:i]) as w:
            time.sleep(0.002)
            assert w.send(whole[i:]).answer()[0] == 200


PATHS = ["//v2", "/v2/../metrics", "/v2/%2e%2e/metrics", "/%6detrics", "/metrics;x", "/metrics/", "/METRICS", "/./metrics", "/v2//health/live", "/v2\\health"]


@pytest.mark.parametrize("path", PATHS)
def test_N10_a_path_has_one_spelling(server, path):
    with wire(server, request(path, b"", "GET")) as w:
        assert error_of(w.answer()) == 404


def test_a_client_is_asked_to_go_on_with_its_body(server):
    whole = request(expect="100-continue")
    head, _, body = whole.partition(b"\r\n\r\n")
    with wire(server, head + b"\r\n\r\n") as w:
        assert w.answer()[0] == 100
        assert w.send(body).answer()[0] == 200


def test_an_idle_connection_is_closed(server):
    with wire(server, request()) as w:
        assert w.answer()[0] == 200
        assert w.ended()


def test_a_head_request_has_no_body(server):
    with wire(server, b"HEAD //v2 HTTP/1.1\r\nhost: a\r\n\r\n") as w:
        while w.fill():
            pass
        assert w.buffer.startswith(b"HTTP/1.1 404") and w.buffer.endswith(b"\r\n\r\n")


def test_L8_under_a_limit_of_open_files_it_is_able_or_never_ready(double, tmp_path):
    "A low limit is raised to the hard one; where that has no room for the connections, the server says so"
    for limit in ("16", "1100"):
        with Server(double, tmp_path, wait=False, under=["prlimit", f"--nofile={limit}"]) as s:
            assert s.ended() == 7 and "MLSERVE_CONNECTIONS" in s.last()["error"], s.events()
    with Server(double, tmp_path, under=["prlimit", "--nofile=32:168"], **SETTINGS) as s:
        held = [wire(s, b"POST /predict HTTP/1.1\r\n") for _ in range(104)]
        for _ in range(20):
            with wire(s, HEALTH) as w:
                assert w.answer()[0] == 200
        for w in held:
            w.close()
        assert s.predict([1, 0]).status_code == 200


def test_a_token_is_asked_for_before_routing_and_health_is_exempt(double, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    with Server(double, tmp_path, token_file=tmp_path / "token") as s:
        for path in ("/v2", "/nowhere", "/metrics", "/v2/models/double", "/health"):
            r = s.http.get(path)
            assert r.status_code == 401 and "www-authenticate" in r.headers, path
            assert s.http.get(path, headers={"authorization": "Bearer s3cret"}).status_code in (200, 404)
        assert s.predict([1, 0]).status_code == 401
        assert s.predict([1, 0], headers={"authorization": "Bearer s3cre"}).status_code == 401
        assert s.predict([1, 0], headers={"authorization": "Bearer s3cret"}).status_code == 200
        assert s.http.get("/v2/health/live").status_code == 200


def test_a_rotated_token_is_the_one_that_holds(double, tmp_path):
    "The scheme has no case; the old token is refused within seconds, on connections that used it too"
    (tmp_path / "token").write_text("0ld")
    with Server(double, tmp_path, token_file=tmp_path / "token") as s, wire(s) as w:
        old = request(authorization="bearer 0ld")
        for _ in range(3):
            assert w.send(old).answer()[0] == 200
        (tmp_path / "next").write_text("n3w\n")
        (tmp_path / "next").replace(tmp_path / "token")
        until(lambda: s.predict([1, 0], headers={"authorization": "BEARER n3w"}).status_code == 200)
        assert error_of(w.send(old).answer()) == 401
        (tmp_path / "token").write_text("")
        time.sleep(1.5)
        assert s.predict([1, 0], headers={"authorization": "Bearer n3w"}).status_code == 200


@pytest.mark.parametrize("kind", ["pipe", "large"])
def test_a_token_file_that_is_no_file_changes_nothing(double, tmp_path, kind):
    "A pipe that nobody writes would be read for ever, and two gibibytes are no token"
    file = tmp_path / "token"
    file.write_text("0ld")
    with Server(double, tmp_path, token_file=file) as s:
        before = s.worker()
        if kind == "pipe":
            os.mkfifo(tmp_path / "next")
        else:
            with open(tmp_path / "next", "wb") as f:
                f.truncate(2 * 2**30)
        (tmp_path / "next").replace(file)
        began = cpu(s)
        for _ in range(20):
            assert s.http.get("/v2/health/live", timeout=1).status_code == 200
            time.sleep(0.1)
        assert s.predict([1, 0], headers={"authorization": "Bearer 0ld"}, timeout=1).status_code == 200
        assert s.worker() == before and cpu(s) - began < 1
        (tmp_path / "next").write_text("n3w")
        (tmp_path / "next").replace(file)
        until(lambda: s.predict([1, 0], headers={"authorization": "Bearer n3w"}).status_code == 200)


def test_a_body_that_nobody_reads_is_let_go(server):
    "Not for the model: only its beginning is kept, and the answer is what it would be anyhow"
    with wire(server, request("/nowhere", b"0" * 90_000)) as w:
        assert error_of(w.answer()) == 404
    with wire(server, request("/v2/repository/index", b" " * 90_000)) as w:
        assert error_of(w.answer()) == 413


def test_metrics_on_a_port_of_their_own_are_not_on_the_main_one(double, tmp_path):
    from servers import free_port
    port = free_port()
    with Server(double, tmp_path, metrics_port=port) as s:
        s.predict([1, 0])
        assert s.http.get("/metrics").status_code == 404
        r = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
        assert 'mlserve_requests_total{route="/predict",status="200"} 1.0' in r.text
        assert httpx.post(f"http://127.0.0.1:{port}/predict", json={"inputs": [[1, 0]]}, trust_env=False).status_code == 404
