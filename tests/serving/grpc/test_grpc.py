"""V2 over gRPC, asked by Triton's client and by the stub that protoc made of the protocol's definition: rows N3, N4, N9, E5, E6 and L3 of the table of faults."""
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from servers import Server, children, patience, status_of, until
from tritonclient.grpc import service_pb2 as v2
from tritonclient.grpc import service_pb2_grpc

from mlserve.package.trial.process import free_port
from mlserve.serving.grpc.messages import message_classes, read_message, write_message

INFER = "/inference.GRPCInferenceService/ModelInfer"
WATCH = "/grpc.health.v1.Health/Watch"
SETTINGS = dict(grpc_port=free_port(), model_version=1, max_body=8_000_000, max_json=1_000_000, body_seconds=1, max_batch=4096)
ENDLESS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Stub(service_pb2_grpc.GRPCInferenceServiceStub):
    "What a client has of the service, and of gRPC's own for health"

    def __init__(self, port):
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=ENDLESS)
        super().__init__(self.channel)
        self.port, self.bytes = port, self.channel.unary_unary(INFER)

    def infer(self, *rows, **kw):
        return self.ModelInfer(infer(rows), **{"timeout": patience(30)} | kw)

    def check(self, service=""):
        return read_message("HealthCheckResponse", self.channel.unary_unary("/grpc.health.v1.Health/Check")(write_message("HealthCheckRequest", service=service))).status

    def watch(self, service=""):
        for told in self.channel.unary_stream(WATCH)(write_message("HealthCheckRequest", service=service), timeout=patience(30)):
            yield read_message("HealthCheckResponse", told).status


def infer(rows, typed=False, **more):
    x = np.array(rows, "f4").reshape(-1, 2)
    tensor = v2.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=x.shape)
    if typed:
        tensor.contents.fp32_contents.extend(x.ravel())
    return v2.ModelInferRequest(**{"model_name": "double", "inputs": [tensor], "raw_input_contents": [] if typed else [x.tobytes()]} | more)


def numbers(answer):
    return np.frombuffer(answer.raw_output_contents[0], "f4").reshape(tuple(answer.outputs[0].shape)).tolist()


def code(call, *args, **kw):
    with pytest.raises(grpc.RpcError) as e:
        call(*args, **kw)
    return e.value.code().name


@pytest.fixture(scope="module")
def server(double, tmp_path_factory):
    with Server(double, tmp_path_factory.mktemp("grpc"), **SETTINGS) as s:
        yield s


@pytest.fixture(scope="module")
def quick(double, tmp_path_factory):
    "One whose model takes no time, so that many rows are soon through, whatever the machine has to do beside"
    with Server(double, tmp_path_factory.mktemp("quick"), **SETTINGS | {"grpc_port": (port := free_port()), "FAKE_SECONDS": 0}) as s:
        yield s, Stub(port)


@cache
def stub_of(server):
    return Stub(SETTINGS["grpc_port"])


def test_the_messages_are_those_of_the_definition():
    "As Triton's client has them, generated; the two live in one process"
    nested = {"InferParameter": v2.InferParameter, "InferTensorContents": v2.InferTensorContents, "Tensor": v2.ModelInferRequest.InferInputTensor,
              "WantedOutput": v2.ModelInferRequest.InferRequestedOutputTensor, "Parameter": v2.ModelInferRequest.DESCRIPTOR.nested_types_by_name["ParametersEntry"]}
    for name, ours in message_classes().items():
        if name.startswith("HealthCheck"):
            continue
        theirs = nested.get(name) or getattr(v2, name)
        known = {f.number: f for f in getattr(theirs, "DESCRIPTOR", theirs).fields}
        for field in ours.DESCRIPTOR.fields:
            other = known[field.number]
            assert (field.name, field.type, field.is_repeated) == (other.name, other.type, other.is_repeated), name


def test_json_binary_and_grpc_give_equal_answers(server):
    rows = np.random.default_rng(0).standard_normal((7, 2)).astype("f4")
    x, wanted = rows.ravel().tolist(), (rows * 2).tolist()
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [7, 2], "data": x}]}
    assert np.array(server.http.post("/v2/models/double/infer", json=body).json()["outputs"][0]["data"], "f4").reshape(7, 2).tolist() == wanted
    from mlserve.client import Client
    assert Client(server.url, model="double").infer({"x": rows})["y"].tolist() == wanted
    for typed in (False, True):
        answer = stub_of(server).ModelInfer(infer(rows, typed, id="7", model_version="1"))
        assert numbers(answer) == wanted
        assert (answer.model_name, answer.model_version, answer.id, answer.outputs[0].name, answer.outputs[0].datatype) == ("double", "1", "7", "y", "FP32")


def test_tritons_client_asks_and_is_answered(server):
    with triton.InferenceServerClient(f"127.0.0.1:{stub_of(server).port}") as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("double", "1")
        assert client.get_server_metadata().name == "mlserve"
        metadata, http = client.get_model_metadata("double", "1"), server.http.get("/v2/models/double").json()
        assert (metadata.name, metadata.platform, list(metadata.versions)) == (http["name"], http["platform"], http["versions"])
        for key in ("inputs", "outputs"):
            assert [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in getattr(metadata, key)] == http[key]
        x = triton.InferInput("x", [2, 2], "FP32").set_data_from_numpy(np.array([[1, 2], [3, 4]], "f4"))
        answer = client.infer("double", [x], request_id="7", outputs=[triton.InferRequestedOutput("y")])
        assert answer.as_numpy("y").tolist() == [[2, 4], [6, 8]] and answer.get_response().id == "7"
        largest = client.infer("double", [x], outputs=[triton.InferRequestedOutput("y", class_count=1)]).as_numpy("y")
        assert largest.tolist() == [[b"4.000000:1"], [b"8.000000:1"]]
        for name, version in (("other", ""), ("double", "2")):
            with pytest.raises(triton.InferenceServerException, match="There is no") as e:
                client.infer(name, [x], version)
            assert e.value.status() == "StatusCode.NOT_FOUND"


def test_what_is_wrong_has_its_status(server):
    ask, stub = stub_of(server).ModelInfer, stub_of(server)
    assert code(ask, infer([1, 2], model_name="other")) == code(ask, infer([1, 2], model_version="2")) == "NOT_FOUND"
    assert code(stub.ModelReady, v2.ModelReadyRequest(name="other")) == code(stub.ModelMetadata, v2.ModelMetadataRequest(name="other")) == "NOT_FOUND"
    other = v2.ModelInferRequest.InferInputTensor(name="x", datatype="FP64", shape=[1, 2])
    shared = infer([1, 2])
    shared.inputs[0].parameters["shared_memory_region"].string_param = "a"
    for wrong in (infer([1, 2], raw_input_contents=[b"1"]), infer([1, 2], raw_input_contents=[]), infer([1, 2], outputs=[{"name": "z"}]),
                  infer([1, 2], inputs=[other]), infer([1, 2], inputs=[]), infer([1, 2], True, raw_input_contents=[b"12345678"]), shared):
        assert code(ask, wrong) == "INVALID_ARGUMENT"
    for wrong in (b"\xff" * 100, b"\x0a\x05hi", infer([0, 0] * 20_000).SerializeToString()[:-1]):
        assert code(stub.bytes, wrong) == "INVALID_ARGUMENT"
    assert code(stub.channel.unary_unary("/inference.GRPCInferenceService/Other"), b"") == "UNIMPLEMENTED"
    assert numbers(stub.infer([1, 2])) == [[2, 4]]


@pytest.mark.parametrize("typed, rows", [(False, 700_000), (True, 110_000), (True, 20_000), (True, 4_000)], ids=["raw", "typed, in the helper", "typed, in a thread", "typed, at once"])
def test_a_large_message_is_right(quick, typed, rows):
    server, stub = quick
    x = np.random.default_rng(1).standard_normal((rows, 2)).astype("f4")
    answer = stub.ModelInfer(infer(x, typed), timeout=patience(120))
    assert np.array_equal(np.frombuffer(answer.raw_output_contents[0], "f4"), x.ravel() * 2)
    until(lambda: server.metric("in_flight") == 0)


def test_N4_a_message_over_the_limits_is_resource_exhausted(server):
    stub = stub_of(server)
    assert code(stub.infer, [0, 0] * 1_000_001) == code(stub.infer, [0, 0] * 1_000_001, compression=grpc.Compression.Gzip) == "RESOURCE_EXHAUSTED"
    assert code(stub.ModelInfer, infer([0, 0] * 130_000, typed=True), timeout=patience(20)) == "RESOURCE_EXHAUSTED"  # read number by number, as JSON is
    assert code(stub.bytes, b"\x2a\x00" * 3_000_000, timeout=patience(20)) in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")  # two bytes would become ninety
    assert numbers(stub.infer([1, 2], compression=grpc.Compression.Gzip)) == [[2, 4]]
    assert status_of(server.worker(), "VmHWM") < 1_500_000


def test_N4_a_long_message_is_few_times_in_memory(double, tmp_path):
    "gRPC itself has it three times while it comes; what is behind has no more of it, and its tensor, and the answer"
    size = 16_000_000
    with Server(double, tmp_path, grpc_port=(port := free_port()), max_batch=2**20, FAKE_SECONDS=0) as s:
        stub, worker = Stub(port), s.worker()
        assert numbers(stub.infer([1, 2])) == [[2, 4]]
        Path(f"/proc/{worker}/clear_refs").write_text("5")  # the peak begins anew
        before = status_of(worker, "VmHWM")
        answer = stub.ModelInfer(infer(np.ones(size // 4, "f4")), timeout=patience(60))
        assert answer.raw_output_contents[0] == np.full(size // 4, 2, "f4").tobytes()
        times = (status_of(worker, "VmHWM") - before) * 1024 / size
        assert times < 6, f"it was {times:.1f} times in memory"


def test_N3_a_message_that_does_not_come_is_not_waited_for(server):
    silent, begin = threading.Event(), time.monotonic()

    def nothing():
        silent.wait(20)
        yield b""

    asking = stub_of(server).channel.stream_unary(INFER)
    try:
        assert code(asking, nothing(), timeout=12) == "DEADLINE_EXCEEDED"
        assert time.monotonic() - begin < 10
    finally:
        silent.set()
    assert code(asking, iter([])) == "INVALID_ARGUMENT"


def test_E6_a_deadline_is_kept(server):
    begin = time.monotonic()
    assert code(stub_of(server).infer, [1, 1005], timeout=0.5) == "DEADLINE_EXCEEDED"
    late = infer([1, 2])
    late.parameters["timeout"].int64_param = 1
    assert code(stub_of(server).ModelInfer, late) == "DEADLINE_EXCEEDED"
    assert time.monotonic() - begin < 4
    assert numbers(stub_of(server).infer([1, 0])) == [[2, 0]]


def test_N9_a_client_that_cancels_frees_its_place_and_what_waits_is_never_run(server):
    stub, before = stub_of(server), server.metric("cancelled_total")
    busy = stub.ModelInfer.future(infer([1, 1003]))
    time.sleep(0.3)
    gone = [stub.ModelInfer.future(infer([1, n])) for n in range(5)]
    time.sleep(1)
    for call in gone:
        call.cancel()
    until(lambda: server.metric("cancelled_total") >= before + 5)
    assert numbers(busy.result())[0][0] == 2
    until(lambda: server.metric("in_flight") == 0 and server.metric("pending") == 0)


def test_the_health_service_is_asked_and_watched(server):
    for name in ("", "double", "inference.GRPCInferenceService"):
        assert stub_of(server).check(name) == 1
    assert code(stub_of(server).check, "other") == "NOT_FOUND" and next(stub_of(server).watch("other")) == 3
    watching = [stub_of(server).watch() for _ in range(70)]
    seen = []
    for told in watching:  # those that watch are few, so that nobody is kept from asking
        try:
            seen.append(next(told))
        except grpc.RpcError as e:
            seen.append(e.code().name)
    assert set(seen) == {1, "UNAVAILABLE"} and seen.count(1) <= 16


def test_calls_are_counted_as_requests_are(server):
    text = server.http.get("/metrics").text
    for name, status in (("ModelInfer", 200), ("ModelInfer", 400), ("ServerReady", 200), ("ModelReady", 404)):
        assert any(f"/inference.GRPCInferenceService/{name}" in line and f'"{status}"' in line for line in text.splitlines()), name


def test_any_bytes_are_answered_or_refused(server):
    "Random ones, and requests that are cut, changed and mixed: a status of the client's fault, and the next one is right"
    chance, good = random.Random(0), [infer([1, 2]).SerializeToString(), infer([1, 2, 3, 4], True, id="7").SerializeToString()]
    good.append(infer([1, 2], outputs=[{"name": "y"}]).SerializeToString())
    codes = {}
    for turn in range(400):
        body = bytearray(chance.choice(good))
        if turn % 4 == 0:
            body = chance.randbytes(chance.randrange(200))
        elif turn % 4 == 1:
            body = body[:chance.randrange(len(body))]
        elif turn % 4 == 2:
            for _ in range(chance.randrange(1, 4)):
                body[chance.randrange(len(body))] = chance.randrange(256)
        else:
            at = chance.randrange(len(body))
            body[at:at] = chance.randbytes(chance.randrange(1, 9)) if turn % 8 == 3 else chance.choice(good)
        if turn % 50 == 49:
            body = bytes(body) + chance.randbytes(20_000)  # one that is measured first
        try:
            stub_of(server).bytes(bytes(body), timeout=patience(20))
            name = "OK"
        except grpc.RpcError as e:
            name = e.code().name
        codes[name] = codes.get(name, 0) + 1
    assert set(codes) <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"} and codes["INVALID_ARGUMENT"] > 200, codes
    assert numbers(stub_of(server).infer([1, 2])) == [[2, 4]] and server.process.poll() is None
    until(lambda: server.metric("in_flight") == 0)  # a copy that is made twice a second


def test_a_token_is_asked_for_but_not_by_health(double, tmp_path):
    (tmp_path / "token").write_text("secret")
    with Server(double, tmp_path, grpc_port=(port := free_port()), token_file=tmp_path / "token"):
        stub = Stub(port)
        assert code(stub.infer, [1, 0]) == code(stub.infer, [1, 0], metadata=[("authorization", "Bearer other")]) == "UNAUTHENTICATED"
        assert code(stub.ModelMetadata, v2.ModelMetadataRequest(name="double")) == "UNAUTHENTICATED"
        assert numbers(stub.infer([1, 0], metadata=[("authorization", "Bearer secret")])) == [[2, 0]]
        assert stub.ServerLive(v2.ServerLiveRequest()).live and stub.check() == 1


def test_E5_a_full_queue_is_unavailable_and_those_that_were_taken_are_answered(double, tmp_path):
    with Server(double, tmp_path, grpc_port=(port := free_port()), queue=2, max_batch=1, threads=1) as s:
        calls = [Stub(port).ModelInfer.future(infer([1, 1000.3])) for _ in range(12)]
        failed = [call.exception() for call in calls]
        assert {e and e.code().name for e in failed} == {None, "UNAVAILABLE"} and s.process.poll() is None
        assert all(dict(e.trailing_metadata())["retry-after"].isdigit() for e in failed if e)
        assert all(numbers(call.result())[0][0] == 2 for call, e in zip(calls, failed) if not e)


def test_L3_what_was_taken_is_answered_while_the_server_stops(double, tmp_path):
    with Server(double, tmp_path, grpc_port=(port := free_port()), drain_delay=1, grace=10) as s:
        stub = Stub(port)
        assert numbers(stub.infer([1, 0])) == [[2, 0]]
        watching = stub.watch()
        assert next(watching) == 1
        call = stub.ModelInfer.future(infer([1, 1002]))
        until(lambda: s.metric("in_flight") > 0)
        os.kill(s.process.pid, signal.SIGTERM)
        assert next(watching) == 2 and stub.check() == 2
        assert numbers(stub.infer([3, 0])) == [[6, 0]]
        assert numbers(call.result())[0][0] == 2
        assert s.process.wait(patience(30)) == 0
        assert list(watching) == []


def test_L3_two_workers_share_the_port_and_one_that_died_is_replaced(double, tmp_path):
    with Server(double, tmp_path, grpc_port=(port := free_port()), workers=2) as s:
        assert all(numbers(Stub(port).infer([n, 0])) == [[2 * n, 0]] for n in range(8))
        os.kill(children(s.process.pid)[0], signal.SIGKILL)
        until(lambda: len(children(s.process.pid)) == 2 and s.http.get("/v2/health/ready").status_code == 200)
        assert all(numbers(Stub(port).infer([n, 0], wait_for_ready=True)) == [[2 * n, 0]] for n in range(8))


def test_a_port_that_is_taken_is_refused_at_once(double, tmp_path, server):
    with Server(double, tmp_path, wait=False, grpc_port=server.port) as s:
        assert s.ended() == 7
        assert "MLSERVE_GRPC_PORT" in s.events()


@pytest.mark.parametrize("gone", ["grpc", "google.protobuf"])
def test_a_port_without_the_library_is_refused_with_a_sentence(double, gone, tmp_path):
    "As in an image whose model did not ask for it; and nothing of it is imported where no port is asked for"
    hidden = f"import sys\nimport importlib.util as u\nfind = u.find_spec\nu.find_spec = lambda name, *a: None if name == {gone!r} else find(name, *a)\n"
    start = "from mlserve.serving.server import run\nfrom mlserve.settings import Settings\n"
    done = subprocess.run([sys.executable, "-c", f"{hidden}{start}sys.exit(run(Settings(package={str(double)!r}, host='127.0.0.1', port={free_port()}, grpc_port={free_port()})))"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 7 and "MLSERVE_GRPC_PORT is set, and" in done.stderr and "requirements" in done.stderr, done.stderr
    loads = "import sys, mlserve.serving.server, mlserve.serving.process.worker, mlserve.serving.grpc.port\nprint([m for m in sys.modules if m in ('grpc', 'google.protobuf')])"
    assert subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_only_an_image_whose_model_asks_for_it_has_the_library(tmp_path):
    from mlserve.release.lock.dependencies import requirements_of

    def names(format, *extra):
        lines = requirements_of(SimpleNamespace(format=format, providers=("cuda",), path=tmp_path), extra)
        return {re.split(r"[<>=!~\[ ]", line)[0] for line in lines}

    for format in ("torchscript", "export", "safetensors", "onnx", "python"):
        assert not names(format) & {"grpcio", "protobuf"} and not names(format, "pillow") & {"grpcio", "protobuf"}
        assert names(format, "grpcio") - names(format) == {"grpcio", "protobuf"}


def test_calls_go_through_the_proxy_of_a_deployment(double, tmp_path):
    "The configuration as it is rendered, but for names that only an engine resolves; a server that drains is asked no more"
    from mlserve.release.deploy.deployment import Deployment, Resources
    from mlserve.release.deploy.options import DeployOptions
    from mlserve.release.deploy.render.haproxy import haproxy_config
    from mlserve.release.deploy.times import Times
    plan = Deployment("compose", "double", "3", "a@sha256:" + "a" * 64, "sha256:" + "c" * 64, "cpu", "baked", Resources(2, 2**30), Times(start=20), DeployOptions(grpc_port=8081))
    text, front, http = haproxy_config(plan, "model"), free_port(), free_port()
    with Server(double, tmp_path, grpc_port=(port := free_port()), drain_delay=6, max_batch=4096, FAKE_SECONDS=0) as s:
        text = re.sub(r"\n\nresolvers docker(\n  .*)*", "", text).replace(" resolvers docker resolve-prefer ipv4 init-addr none", "").replace("stats socket /tmp", f"stats socket {tmp_path}")
        text = text.replace("bind :8080", f"bind 127.0.0.1:{http}").replace("bind :9000", f"bind 127.0.0.1:{front}").replace("port 8080", f"port {s.port}")
        text = text.replace("server-template s 8 model:8080", f"server s 127.0.0.1:{s.port} check").replace("server-template s 8 model:9000", f"server s 127.0.0.1:{port} check")
        (tmp_path / "haproxy.cfg").write_text(text)
        proxy = subprocess.Popen(["haproxy", "-db", "-f", tmp_path / "haproxy.cfg"])
        try:
            stub = Stub(front)
            assert numbers(stub.infer([1, 2], wait_for_ready=True)) == [[2, 4]] and stub.check() == 1
            x = np.random.default_rng(1).standard_normal((100_000, 2)).astype("f4")
            assert numbers(stub.ModelInfer(infer(x), timeout=patience(30))) == (x * 2).tolist()
            os.kill(s.process.pid, signal.SIGTERM)

            def refused():
                try:
                    return not stub.infer([1, 2])
                except grpc.RpcError as e:
                    return e.code().name == "UNAVAILABLE"
            until(refused)
            assert s.process.poll() is None, "the proxy knew before the server had ended"
            assert s.process.wait(patience(30)) == 0
        finally:
            proxy.kill()
            proxy.wait()


def crowded(double, folder):
    "A server with few connections, in which nothing is freed that only the collector of cycles would find"
    settings = SETTINGS | {"grpc_port": free_port(), "connections": 20, "body_seconds": 20, "max_decoded": 32_000_000}
    server = Server(double, folder, FAKE_COLLECTOR="off", **settings)
    return SimpleNamespace(server=server, stub=Stub(settings["grpc_port"]), port=settings["grpc_port"])


@pytest.fixture
def own(double, tmp_path):
    made = crowded(double, tmp_path)
    with made.server:
        yield made


@pytest.fixture(scope="module")
def few(double, tmp_path_factory):
    made = crowded(double, tmp_path_factory.mktemp("few"))
    with made.server:
        yield made


def raw(port, path=INFER.encode(), size=None):
    "A connection of HTTP/2 with one call, by hand; its message is cut, or is not sent"
    def literal(text):
        return bytes([len(text)]) + text
    block = b"\x83\x86\x04" + literal(path) + b"\x01\x01a" + b"\x00" + literal(b"content-type") + literal(b"application/grpc") + b"\x00\x02te" + literal(b"trailers")

    def frame(kind, flags, stream, data):
        return len(data).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + data
    s = socket.create_connection(("127.0.0.1", port))
    s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, block))
    if size is not None:
        s.sendall(frame(0, 0, 1, b"\x00" + size.to_bytes(4, "big") + b"x"))
    return s


def test_a_name_that_is_no_text_ends_nothing(own):
    stub = own.stub
    assert numbers(stub.infer([1, 2])) == [[2, 4]]
    with raw(own.port, b"/\xff"):
        until(lambda: "grpc_reopened" in own.server.events())

    def answered():
        try:
            return numbers(stub.infer([1, 2])) == [[2, 4]]
        except grpc.RpcError:
            return False
    until(answered)
    assert own.server.stop() == 0


def test_calls_that_send_nothing_keep_health_and_predictions_for_others(few):
    silent = [raw(few.port, b"/grpc.health.v1.Health/Check") for _ in range(12)]
    assert few.stub.check() == 1 and numbers(few.stub.infer([1, 2])) == [[2, 4]]
    for s in silent:
        s.close()


def test_connections_have_a_limit(few):
    many = [raw(few.port) for _ in range(40)]

    def ended(s):
        s.settimeout(0.1)
        try:
            while s.recv(4096):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True
    until(lambda: sum(map(ended, many)) >= 15)
    for s in many:
        s.close()


def test_few_messages_may_be_late(few):
    silent, late = threading.Event(), [raw(few.port, size=7_000_000) for _ in range(12)]

    def nothing():
        silent.wait(20)
        yield b""
    time.sleep(1.5)
    try:
        with pytest.raises(grpc.RpcError) as e:
            few.stub.channel.stream_unary(INFER)(nothing(), timeout=patience(20))
        assert (e.value.code().name, "late" in e.value.details()) == ("UNAVAILABLE", True)
        assert numbers(few.stub.infer([1, 2])) == [[2, 4]]
    finally:
        silent.set()
    for s in late:
        s.close()


def test_N4_a_message_that_is_long_in_coming_has_a_place_or_is_refused_at_once(few):
    "gRPC makes room for what it is asked for, and does not say what has come: what is short has come in a tenth of a second"
    silent, late = threading.Event(), [raw(few.port, size=7_000_000) for _ in range(4)]

    def nothing():
        silent.wait(20)
        yield b""
    time.sleep(0.4)
    began = time.monotonic()
    try:
        with pytest.raises(grpc.RpcError) as e:
            few.stub.channel.stream_unary(INFER)(nothing(), timeout=20)
        took = time.monotonic() - began
        assert e.value.code().name == "UNAVAILABLE" and took < 0.9, f"it took {took:.1f} s"
    finally:
        silent.set()
    assert numbers(few.stub.infer([1, 2])) == [[2, 4]]
    for s in late:
        s.close()


def test_a_refused_message_is_let_go(few):
    wrong = infer([[1, 2]] * 200_000, model_name="other").SerializeToString()

    def ask(count):
        for _ in range(count):
            with pytest.raises(grpc.RpcError):
                few.stub.bytes(wrong, timeout=patience(30))
        return status_of(few.server.worker(), "VmRSS")
    before = ask(4)
    assert ask(12) - before < 6 * 1600, "kB that stay"


def test_parts_without_number_are_refused_before_they_are_read(few):
    with pytest.raises(grpc.RpcError) as e:
        few.stub.bytes(b"\x2a\x00" * 8000, timeout=patience(30))
    assert e.value.code().name == "INVALID_ARGUMENT" and "allowed are 1024" in e.value.details()


def test_who_is_silent_does_not_hold_up_the_end(own):
    with raw(own.port, size=7_000_000):
        time.sleep(0.3)
        began = time.monotonic()
        assert own.server.stop() == 0 and time.monotonic() - began < 15
