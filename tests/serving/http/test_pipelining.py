"""Many requests on one connection (keep-alive, pipelining): row N12 of the table of faults, against a model of what must be answered.

The connection is the real one, with uvicorn's bridge to an application behind it. Transport, model and clock are the test's: any bytes may come in any
pieces, answers may come late or early, a reader may pause, and what the transport was told not to read is not delivered."""
import asyncio
from collections import deque
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from servers import Server, Wire, request
from uvicorn import Config
from uvicorn.server import ServerState

from mlserve.serving.http.budget import ByteBudget
from mlserve.serving.http.connection import Connection
from mlserve.serving.http.inference import ROUTES
from mlserve.serving.http.listener import Listener
from mlserve.serving.http.request_head import Heads, Limits

LIMITS = Limits(max_body=1000, max_text=1000)
LOOP = asyncio.new_event_loop()
QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking takes minutes; add it to look at a failure


class Transport:
    "A socket in memory: what is written is kept, and a pause is a pause"

    def __init__(self):
        self.out, self.paused, self.ended, self.closed = b"", False, False, False

    def write(self, data):
        assert not self.ended, "written behind the end"
        self.out += data

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False

    def write_eof(self):
        self.ended = True

    def close(self):
        self.ended = self.closed = True

    abort = close

    def is_closing(self):
        return self.closed

    def can_write_eof(self):
        return True

    def get_write_buffer_size(self):
        return 0

    def get_extra_info(self, name):
        return None


class Model:
    "Stands for the typed call: answers with the body, when it is told to"

    def __init__(self):
        self.pending = []

    def start(self, route, headers, body, done, id, arrived):
        call = SimpleNamespace(gone=False, answer=lambda: call.gone or done(200, b"text/plain", (), bytes(body)))
        call.cancel = lambda: setattr(call, "gone", True)
        self.pending.append(call)
        return call


async def application(scope, receive, send):
    "The paths that are not predictions"
    await receive()
    await asyncio.sleep(0)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3"), (b"x-request-id", scope["mlserve.id"])]})
    await send({"type": "http.response.body", "body": b"app"})


class Talk:
    "One connection and all behind it"

    def __init__(self):
        self.loop, self.model, self.wire = LOOP, Model(), Transport()
        config = Config(app=application, http="httptools", ws="none", lifespan="off", log_config=None, server_header=False)
        config.loaded_app = application
        self.web = SimpleNamespace(
            config=config, state=ServerState(), loop=self.loop, limits=LIMITS, token=None, inference=self.model, routes={b"/predict": ROUTES[0]}, heads=Heads(),
            crowded=False, budget=ByteBudget(2**20), stopping=False, date=b"", life=SimpleNamespace(in_flight=0, state="ready"), opened=lambda c: None,
            closed=lambda c: None, refused=lambda e, status: None, aborted=lambda c: c.transport.abort(), probed=lambda path: (200, b"text/plain", (), b"alive"),
            unread=deque(), in_turn=lambda c: Listener.in_turn(self.web, c))
        self.connection = Connection(self.web)
        self.connection.connection_made(self.wire)

    def turn(self):
        "Let the event loop do what it has"
        for _ in range(4):
            self.loop.run_until_complete(asyncio.sleep(0))

    def answer(self):
        if self.model.pending:
            self.model.pending.pop(0).answer()

    def settle(self):
        "Give every answer that is owed"
        self.connection.resume_writing()
        for _ in range(60):
            self.turn()
            self.answer()

    def close(self):
        for task in self.connection.tasks.copy():
            task.cancel()
        self.turn()


def predict(i, body, chunked, *headers, version="1.1"):
    lines = [f"POST /predict HTTP/{version}", "host: a", f"x-request-id: r{i}", *headers]
    if chunked:
        cut = len(body) // 2
        coded = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (body[:cut], body[cut:]) if p) + b"0\r\n\r\n"
        return "\r\n".join([*lines, "transfer-encoding: chunked", "", ""]).encode(), coded
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode(), body


def plain(i, method, path, *headers):
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: a", f"x-request-id: r{i}", *headers, "", ""]).encode(), b""


UPGRADE = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA")
KINDS = {  # name: the request as its head and its body, and what it must be told: status, body, whether the connection stays
    "predict": lambda i, body, chunked: (predict(i, body, chunked), (200, body, True)),
    "h2c": lambda i, body, chunked: (predict(i, body, chunked, *UPGRADE), (200, body, True)),
    "expect": lambda i, body, chunked: (predict(i, body, chunked, "expect: 100-continue"), (200, body, True)),
    "probe": lambda i, body, chunked: (plain(i, "GET", "/v2/health/live"), (200, b"alive", True)),
    "HEAD of a probe": lambda i, body, chunked: (plain(i, "HEAD", "/v2/health/live"), (200, b"", True)),
    "application": lambda i, body, chunked: (plain(i, "GET", "/v2"), (200, b"app", True)),
    "HEAD of the application": lambda i, body, chunked: (plain(i, "HEAD", "/v2"), (200, b"", True)),
    "close": lambda i, body, chunked: (predict(i, body, chunked, "connection: close"), (200, body, False)),
    "HTTP/1.0": lambda i, body, chunked: (predict(i, body, False, version="1.0"), (200, body, False)),
    "too large": lambda i, body, chunked: ((b"POST /predict HTTP/1.1\r\nhost: a\r\nx-request-id: r%d\r\ncontent-length: 5000\r\n\r\n" % i, b"0" * 5000), (413, None, False)),
    "larger than said": lambda i, body, chunked: (predict(i, b"0" * 3000, True), (413, None, False)),
    "two hosts": lambda i, body, chunked: (predict(i, body, chunked, "host: b"), (400, None, False)),
    "no HTTP": lambda i, body, chunked: ((b"\x00\x01 what\r\n\r\n", b""), (400, None, False)),
}
STAYS = [k for k in KINDS if KINDS[k](0, b"x", False)[1][2]]


def answers(out, wanted):
    "The answers in what was written, read with what was asked in mind; (status, id, body), informational ones counted apart"
    found, early = [], 0
    while out:
        head, _, out = out.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status, headers = int(first.split(" ")[1]), dict(line.lower().split(": ", 1) for line in lines)
        if status == 100:
            early += 1
            continue
        silent = len(found) < len(wanted) and wanted[len(found)][0].startswith("HEAD")
        size = 0 if silent else int(headers["content-length"])
        found.append((status, headers["x-request-id"], out[:size], headers.get("connection") == "close"))
        out = out[size:]
    return found, early


requests_of = st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.binary(max_size=300), st.booleans()), min_size=1, max_size=8)
ACTIONS = ["answer", "turn", "pause", "resume", "sweep", "nothing"]


def deliver(talk, parts, data, wanted):
    "Bring the bytes in pieces; between two pieces something else may happen"
    stuck = 0
    for piece, waits_for in parts:
        while piece:
            early = answers(talk.wire.out, wanted)[1]
            if talk.wire.ended:
                return
            if talk.wire.paused or early < waits_for:  # the server does not read, or the client waits to be told to go on
                stuck += 1
                assert stuck < 300, "the server never goes on"
                talk.connection.resume_writing()
                talk.turn()
                talk.answer()
                continue
            stuck = 0
            n = data.draw(st.integers(1, len(piece)))
            now, piece = piece[:n], piece[n:]
            talk.connection.data_received(now)
            action = data.draw(st.sampled_from(ACTIONS))
            if action == "answer":
                talk.answer()
            elif action == "turn":
                talk.turn()
            elif action == "pause":
                talk.connection.pause_writing()
            elif action == "resume":
                talk.connection.resume_writing()
            elif action == "sweep":  # a client that waits for two answers is not late, however long they take
                c = talk.connection
                c.overdue(c.loop.time() + (3600 if c.waiting and c.write_deadline > 1e300 else 0))


@settings(QUICK, max_examples=200)
@given(requests_of, st.data())
def test_N12_whatever_comes_in_whatever_pieces_each_is_answered_in_order(asked, data):
    "The model: answers in the order of the requests, up to the first that ends the connection; then the end, or another request that is answered too"
    talk, parts, wanted, said = Talk(), [], [], 0
    for i, (kind, body, chunked) in enumerate(asked):
        (head, body), (status, answer, stays) = KINDS[kind](i, body, chunked)
        said += kind == "expect" and bool(body)
        parts += [(head, 0), (body, said if kind == "expect" else 0)]
        wanted.append((kind, status, None if status == 400 else f"r{i}", answer, not stays))
        if not stays:
            break
    deliver(talk, parts, data, wanted)
    talk.settle()
    if wanted[-1][4]:
        assert talk.wire.ended, "the connection must end"
    else:
        assert not talk.wire.paused, "nothing waits, and nothing is read"
        wanted.append(("predict", 200, "last", b"more", False))
        head, body = predict(0, b"more", False)
        talk.connection.data_received(head.replace(b"r0", b"last") + body)
        talk.settle()
    found, _ = answers(talk.wire.out, wanted)
    assert [(s, i if w[2] else None, b if w[3] is not None else None, end) for (s, i, b, end), w in zip(found, wanted)] == [w[1:] for w in wanted]
    assert len(found) == len(wanted) and talk.web.life.in_flight == 0 and talk.web.budget.receiving == 0
    talk.close()


@settings(QUICK, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(STAYS), st.binary(max_size=300), st.booleans()), min_size=1, max_size=6), st.data())
def test_N12_a_client_that_leaves_at_any_point_leaves_nothing(asked, data):
    talk = Talk()
    text = b"".join(b"".join(KINDS[kind](i, body, chunked)[0]) for i, (kind, body, chunked) in enumerate(asked))
    text = text[:data.draw(st.integers(0, len(text)))]
    while text and not talk.wire.paused:
        n = data.draw(st.integers(1, len(text)))
        talk.connection.data_received(text[:n])
        text = text[n:]
        if data.draw(st.booleans()):
            talk.answer()
    written = len(talk.wire.out)
    talk.connection.connection_lost(None)
    talk.wire.closed = True
    talk.settle()
    assert talk.web.life.in_flight == 0 and talk.web.budget.receiving == 0 and not talk.connection.waiting
    assert len(talk.wire.out) == written, "an answer to nobody"
    talk.close()


def test_N12_thousands_behind_a_slow_one_wait_as_they_came():
    "What is parsed becomes ten times as much: few are, all are counted, and each has its answer"
    talk, count = Talk(), 4000
    head, body = predict(0, b"slow", False)
    talk.connection.data_received(head + body + b"".join(plain(i, "GET", "/v2/health/live")[0] for i in range(1, count)))
    talk.turn()
    assert len(talk.connection.waiting) < 200, "all wait parsed"
    assert talk.wire.paused and talk.web.budget.receiving > count * 40
    while talk.connection.current or talk.connection.waiting or talk.connection.rest:
        talk.settle()
    found, _ = answers(talk.wire.out, [])
    assert [i for _, i, _, _ in found] == [f"r{i}" for i in range(count)]
    assert talk.web.budget.receiving == 0 and not talk.wire.paused
    talk.close()


def test_N12_what_waits_unparsed_is_refused_when_memory_is_full():
    talk = Talk()
    talk.web.budget.most = 100_000
    head, body = predict(0, b"slow", False)
    talk.connection.data_received(head + body + plain(1, "GET", "/v2/health/live")[0] * 3000)
    assert not talk.connection.rest
    talk.settle()
    assert answers(talk.wire.out, [])[0][-1][0] == 503 and talk.wire.ended and talk.web.budget.receiving == 0
    talk.close()


def test_N12_an_application_that_asks_for_its_body_reads_no_request():
    talk, begun = Talk(), []
    c = talk.connection
    talk.wire.resume_reading = lambda: begun.append(len(c.waiting) + len(c.rest))
    c.data_received(b"".join(plain(i, "GET", "/v2")[0] for i in range(5)))
    talk.settle()
    assert len(answers(talk.wire.out, [])[0]) == 5
    assert not any(begun), "it is read on while some wait"
    talk.close()


@pytest.fixture(scope="module")
def server(double, tmp_path_factory):
    with Server(double, tmp_path_factory.mktemp("pipelining"), keep_alive_seconds=5) as s:
        yield s


SETTINGS = dict(keep_alive_seconds=5)


def test_N12_two_requests_in_one_write_and_then_a_third(server):
    with Wire(server.port, timeout=10) as w:
        w.send(request() + request(body=b'{"inputs": [[2, 0]]}'))
        assert [w.answer()[2] for _ in range(2)] == [b'{"outputs":[[2.0,0.0]]}', b'{"outputs":[[4.0,0.0]]}']
        w.send(request(body=b'{"inputs": [[3, 0]]}'))
        assert w.answer()[2] == b'{"outputs":[[6.0,0.0]]}'


def test_N12_who_waits_to_go_on_is_told_so_when_it_is_its_turn(server):
    "A slow answer first; behind it a request that sends its body only when it is asked to"
    body = b'{"inputs": [[3, 0]]}'
    late = request(body=body, expect="100-continue")[:-len(body)]
    with Wire(server.port, timeout=10) as w:
        w.send(request(body=b'{"inputs": [[1, 1000.5]]}') + late)
        assert w.answer()[0] == 200
        assert w.answer()[0] == 100
        assert w.send(body).answer()[2] == b'{"outputs":[[6.0,0.0]]}'


def test_N12_an_offered_upgrade_is_passed_over(server):
    "As the JDK's HttpClient asks first: a body behind an offer of HTTP/2"
    offer = dict(connection="Upgrade, HTTP2-Settings", upgrade="h2c", HTTP2_Settings="AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA")
    with Wire(server.port, timeout=10) as w:
        for number in (2, 4):
            assert w.send(request(body=b'{"inputs": [[%d, 0]]}' % number, **offer)).answer()[2] == b'{"outputs":[[%d.0,0.0]]}' % (2 * number)
        w.send(request(body=b'{"inputs": [[1, 0]]}', **offer) + request("/v2/health/live", b"", "HEAD"))
        assert w.answer()[0] == 200
        while b"\r\n\r\n" not in w.buffer:
            assert w.fill()
        assert w.buffer.startswith(b"HTTP/1.1 200") and w.buffer.endswith(b"\r\n\r\n"), "a HEAD has no body"
