"""Traces of a real server process, sent to a collector over HTTP."""
import http.server
import threading

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from servers import Server

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector():
    "Its port, and the spans that it was sent"
    spans = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            spans.extend(s for r in sent.resource_spans for scope in r.scope_spans for s in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *a):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, spans
    server.shutdown()


def test_a_request_continues_the_trace_of_its_caller_and_a_stop_sends_what_is_left(double, tmp_path, collector):
    port, spans = collector
    with Server(double, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}") as s:
        assert s.predict([1, 2], headers={"traceparent": PARENT}).status_code == 200
        assert s.http.post("/predict", json={"inputs": [[1]]}).status_code == 400
        assert s.stop() == 0
    asked = [x for x in spans if x.name == "POST /predict"]
    statuses = [next(a.value.int_value for a in x.attributes if a.key == "http.response.status_code") for x in asked]
    assert statuses == [200, 400]
    assert asked[0].trace_id.hex() == PARENT.split("-")[1] and asked[0].parent_span_id.hex() == PARENT.split("-")[2]
    assert asked[1].trace_id != asked[0].trace_id and not asked[1].parent_span_id
    steps = {x.name: x for x in spans if x.parent_span_id == asked[0].span_id}
    assert set(steps) == {"read", "predict"} and steps["read"].end_time_unix_nano == steps["predict"].start_time_unix_nano


def test_a_collector_that_is_not_there_stops_nothing(double, tmp_path):
    with Server(double, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", OTEL_EXPORTER_OTLP_TIMEOUT="1") as s:
        assert s.predict([1, 2]).json() == {"outputs": [[2, 4]]}
        assert s.stop() == 0
