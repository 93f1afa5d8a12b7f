"""What the server takes for granted of uvicorn, which promises none of it: names, signatures and what they do. The pin is a minor version for that
reason; when it moves, this file says what to look at."""
import asyncio
import inspect
import logging
import re

from uvicorn import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from commands import ROOT
from mlserve.serving.http.connection import Connection


class Transport(asyncio.Transport):
    "Remembers what is written and asked"
    def __init__(self):
        super().__init__()
        self.written, self.asked = b"", []

    def write(self, data):
        self.written += data

    def is_closing(self):
        return False

    def pause_reading(self):
        self.asked.append("pause")

    def resume_reading(self):
        self.asked.append("resume")


def test_the_pin_is_one_minor_version_and_holds_the_one_that_was_tried():
    low, high = re.search(r"uvicorn>=(0\.\d+),<(0\.\d+)", (ROOT / "settings.ini").read_text()).groups()
    tried = re.search(r"^uvicorn==(0\.\d+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert low == tried and int(high[2:]) == int(low[2:]) + 1


def test_every_method_of_the_protocol_is_ours_or_never_called():
    "One that uvicorn adds might be called by its parser or by asyncio, behind the back of our limits"
    ours = {name for c in Connection.__mro__[:Connection.__mro__.index(HttpToolsProtocol)] for name in vars(c)}
    theirs = {name for name in vars(HttpToolsProtocol) if not name.startswith("__")} - ours
    only_by_each_other = {"_get_upgrade", "_should_upgrade", "_should_upgrade_to_ws", "_start_asgi_task", "_unset_keepalive_if_required", "_unsupported_upgrade_warning",
        "handle_websocket_upgrade", "on_response_complete", "send_400_response", "shutdown", "timeout_keep_alive_handler"}
    assert theirs - {"eof_received"} == only_by_each_other
    assert inspect.getsource(HttpToolsProtocol.eof_received).strip().endswith(("pass", "..."))  # a half-closed connection is ended by asyncio


def test_the_protocol_starts_with_what_the_reader_uses():
    loop = asyncio.new_event_loop()
    try:
        state = ServerState()
        assert isinstance(state.connections, set) and isinstance(state.tasks, set)
        protocol = HttpToolsProtocol(Config(lambda scope: None, http="httptools", ws="none", lifespan="off", log_config=None), state, {}, loop)
    finally:
        loop.close()
    assert protocol.loop is loop and protocol.connections is state.connections and protocol.tasks is state.tasks
    assert {"app", "logger", "access_logger", "parser", "transport", "flow", "server", "client", "scheme", "headers"} <= set(vars(protocol))


def test_flow_control_asks_the_transport_once_and_drain_waits_for_the_reader():
    async def run():
        transport = Transport()
        flow = FlowControl(transport)
        for ask in (flow.pause_reading, flow.pause_reading, flow.resume_reading, flow.resume_reading):
            ask()
        assert transport.asked == ["pause", "resume"] and not flow.write_paused
        flow.pause_writing()
        drained = asyncio.ensure_future(flow.drain())
        await asyncio.sleep(0)
        assert flow.write_paused and not drained.done()
        flow.resume_writing()
        await asyncio.wait_for(drained, 1)
    asyncio.run(run())


def test_a_cycle_hands_a_whole_body_to_the_application_and_writes_its_answer():
    parameters = ["self", "scope", "transport", "flow", "logger", "access_logger", "access_log", "default_headers", "message_event", "expect_100_continue", "keep_alive", "on_response"]
    assert list(inspect.signature(RequestResponseCycle.__init__).parameters) == parameters
    seen, answered = [], []

    async def app(scope, receive, send):
        seen.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        seen.append(await receive())

    async def run():
        transport, log = Transport(), logging.getLogger("uvicorn.error")
        scope = {"type": "http", "method": "GET", "http_version": "1.1", "path": "/", "headers": []}
        cycle = RequestResponseCycle(scope, transport, FlowControl(transport), logger=log, access_logger=log, access_log=False,
            default_headers=[(b"date", b"now")], message_event=asyncio.Event(), expect_100_continue=False, keep_alive=True, on_response=lambda: answered.append(True))
        cycle.body, cycle.more_body = bytearray(b"body"), False
        cycle.message_event.set()
        task = asyncio.ensure_future(cycle.run_asgi(app))
        await asyncio.sleep(0.01)
        cycle.disconnected = True  # as `Exchange.stop` does
        cycle.message_event.set()
        await asyncio.wait_for(task, 1)
        return transport.written
    written = asyncio.run(run())
    assert seen == [{"type": "http.request", "body": b"body", "more_body": False}, {"type": "http.disconnect"}] and answered == [True]
    assert written == b"HTTP/1.1 200 OK\r\ndate: now\r\ncontent-length: 2\r\n\r\nok"


def test_a_status_line_is_whole():
    assert STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n" and STATUS_LINE[503].startswith(b"HTTP/1.1 503 ") and STATUS_LINE[504].endswith(b"\r\n")
