"""Bodies of megabytes, which are received into memory that was reserved for them: rows N4 and N8 of the table of faults."""
import gzip
import json

import numpy as np
import pytest
from servers import Server, Wire, error_of, request, status_of, until

MB = 2**20
SETTINGS = dict(max_body=4 * MB, max_decoded=16 * MB, body_seconds=60, max_batch=4096)


@pytest.fixture(scope="module")
def server(double, tmp_path_factory):
    with Server(double, tmp_path_factory.mktemp("large"), **SETTINGS) as s:
        yield s


def binary(rows=200_000, **headers):
    "A request of V2 whose tensor is binary, and the answer that belongs to it"
    x = np.random.default_rng(rows).standard_normal((rows, 2)).astype("f4")
    entry = {"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    more = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))} | headers
    return request("/v2/models/double/infer", head + x.tobytes(), **more), (x * 2).tobytes()


def right(answer, expected):
    status, headers, body = answer
    assert status == 200, body[:300]
    assert body[int(headers["inference-header-content-length"]):] == expected
    return True


def announced(size):
    return b"POST /v2/models/double/infer HTTP/1.1\r\nhost: a\r\ncontent-type: application/octet-stream\r\ninference-header-content-length: 9\r\ncontent-length: %d\r\n\r\n" % size


def test_N8_cut_anywhere_a_long_body_means_the_same_and_so_does_what_is_behind_it(server):
    long, expected = binary()
    for cut in (1, 60, long.index(b"\r\n\r\n") + 4, 4096, 2**16 + 1, len(long) - 1):
        with Wire(server.port, 120) as w:
            w.send(long[:cut], long[cut:] + request() + long, request())
            assert right(w.answer(), expected) and json.loads(w.answer()[2]) == {"outputs": [[2, 0]]}
            assert right(w.answer(), expected) and w.answer()[0] == 200


def test_a_long_body_that_waits_to_be_asked_for(server):
    long, expected = binary(expect="100-continue", connection="close")
    end = long.index(b"\r\n\r\n") + 4
    with Wire(server.port, 120) as w:
        assert w.send(long[:end]).answer()[0] == 100
        assert right(w.send(long[end:]).answer(), expected) and w.ended()


def test_N4_who_announces_much_and_sends_little_takes_no_room(server):
    idle = [Wire(server.port, 120).send(announced(3 * MB), b"x") for _ in range(12)]
    long, expected = binary()
    with Wire(server.port, 120) as w:
        assert right(w.send(long).answer(), expected)
    for w in idle:
        w.close()


def test_what_has_come_is_counted_and_given_back(server):
    held = [Wire(server.port, 120).send(announced(4 * MB - 1), bytes(4 * MB - 2)) for _ in range(4)]
    long, _ = binary()

    def refused():
        with Wire(server.port, 120) as w:
            return (w.send(long[:1000]).answer() or (0,))[0] == 503
    until(refused)
    for w in held:
        w.close()
    answered(server)


def test_clients_that_leave_in_the_middle_leave_nothing_behind(server):
    for _ in range(50):
        Wire(server.port, 120).send(announced(4 * MB - 1), bytes(MB)).close()
    answered(server)


def answered(server):
    "A long body is answered, as soon as the server has heard who left"
    long, expected = binary()

    def once():
        with Wire(server.port, 120) as w:
            answer = w.send(long).answer()
        return answer[0] == 200 and right(answer, expected)
    until(once)


def test_a_long_body_that_is_wrong_is_told_so_and_the_connection_goes_on(server):
    long, expected = binary()
    wrong = long.replace(b'"FP32"', b'"FP64"')
    with Wire(server.port, 120) as w:
        assert error_of(w.send(wrong).answer()) == 400
        assert right(w.send(long).answer(), expected)


def without_collector(double, folder):
    "A server in which nothing is freed that only the collector of cycles would find"
    return Server(double, folder, FAKE_COLLECTOR="off", **SETTINGS | {"max_body": 8 * MB, "max_json": 8 * MB})


@pytest.fixture(scope="module")
def collected_never(double, tmp_path_factory):
    with without_collector(double, tmp_path_factory.mktemp("never")) as s:
        yield s


def ways():
    "Requests with bodies of 1.6 MB, by the way on which they become tensors, and the status of the answer"
    (long, _), rows = binary(), [[0.25, 0.5]] * 160_000
    head, _, body = long.partition(b"\r\n\r\n")
    packed, text = gzip.compress(body, 1), json.dumps({"inputs": rows}).encode()
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[n:n + 2**17] for n in range(0, len(body), 2**17)))
    unnamed = head.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
    yield "reserved", 200, long
    yield "in chunks", 200, unnamed + b"\r\n\r\n" + chunked + b"0\r\n\r\n"
    yield "gzipped", 200, head.replace(b"content-length: %d" % len(body), b"content-encoding: gzip\r\ncontent-length: %d" % len(packed)) + b"\r\n\r\n" + packed
    yield "refused", 400, long.replace(b'"FP32"', b'"FP64"')
    yield "JSON", 200, request("/predict", text, **{"content-type": "application/json"})
    yield "no JSON", 400, request("/predict", text[:-1], **{"content-type": "application/json"})


@pytest.mark.parametrize("sent, status", [pytest.param(sent, status, id=name) for name, status, sent in ways()])
def test_N4_a_body_is_let_go_with_its_answer_and_no_collector_of_cycles_is_waited_for(collected_never, sent, status):
    with Wire(collected_never.port, 120) as w:
        def ask(count):
            for _ in range(count):
                assert w.send(sent).answer()[0] == status
            return status_of(collected_never.worker(), "VmRSS")
        before = ask(4)
        assert ask(12) - before < 6 * 1600, "kB that stay"
