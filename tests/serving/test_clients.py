"""The clients that people have, as they come: KServe's, MLServer's, Triton's, MLflow's, the JDK's, and the lines of TensorFlow Serving's documentation.

Those whose dependencies conflict with ours lie in folders of their own below `state/tools`, which `make clients` fills."""
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT, TESTS
from servers import Server

CLIENTS = TESTS / "clients"
NAME = "double"


def printed(*command, tools=None):
    "What a client's program printed, which ended well"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if tools:
        folder = ROOT / "state/tools" / tools
        assert (folder / ".installed").exists(), f"{folder} is not filled; run `make test-tools`"
        env |= {"PYTHONPATH": str(folder), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def server(double, tmp_path_factory):
    with Server(double, tmp_path_factory.mktemp("clients"), model_version="3") as s:
        yield s


def served(folder, name, build, inputs, outputs):
    "A server of an ONNX graph"
    import onnx
    from mlserve.package import save_package
    nodes, ins, outs, constants = build(onnx.helper, onnx.TensorProto)
    graph = onnx.helper.make_graph(nodes, name, ins, outs, constants)
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)]), folder / "model.onnx")
    save_package(folder / "model.onnx", folder / "p", name, inputs, outputs, format="onnx")
    return Server(folder / "p", folder, model_version="123", real=True)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    "A server of a model that shouts, and gives its text back as bytes"
    def build(h, t):
        text = [h.make_tensor_value_info(n, t.STRING, ["n"]) for n in ("text", "loud", "copy_bytes")]
        nodes = [h.make_node("StringConcat", ["text", "mark"], ["loud"]), h.make_node("Identity", ["text"], ["copy_bytes"])]
        return nodes, text[:1], text[1:], [h.make_tensor("mark", t.STRING, [1], [b"!"])]
    with served(tmp_path_factory.mktemp("texts"), "texts", build, {"text": np.array([b"a", b"b"], object)}, ["loud", "copy_bytes"]) as s:
        yield s


@pytest.fixture(scope="module")
def half_plus_three(tmp_path_factory):
    "A server of the model of TensorFlow Serving's documentation"
    def build(h, t):
        x, y = (h.make_tensor_value_info(n, t.FLOAT, ["n"]) for n in ("x", "y"))
        return ([h.make_node("Mul", ["x", "half"], ["h"]), h.make_node("Add", ["h", "three"], ["y"])], [x], [y],
                [h.make_tensor("half", t.FLOAT, [], [0.5]), h.make_tensor("three", t.FLOAT, [], [3.0])])
    with served(tmp_path_factory.mktemp("half"), "half_plus_three", build, {"x": np.array([1, 2], np.float32)}, ["y"]) as s:
        yield s


# ---- KServe


def test_kserve_s_client(server):
    found = json.loads(printed(sys.executable, CLIENTS / "kserve_client.py", server.url, NAME, "[[1, 2], [3, 4.5]]", tools="kserve"))
    want = [[2, 4], [6, 9]]
    assert found["v1"] == {"predictions": want} and found["v1 live"] is found["v1 ready"] is True
    assert found["live"] is found["ready"] is found["model ready"] is True
    for way in ("json", "binary", "all binary", "mixed"):
        assert found[way] == {"id": True, "model": NAME, "y": want, "type": True}, way
    assert found["v1 refused"][0] == 400 and "the model takes [-1, 2]" in found["v1 refused"][1]
    assert found["v2 refused"][0] == 404 and "There is no model 'another'" in found["v2 refused"][1]


# ---- MLServer


def test_mlserver_s_codecs(server, texts):
    found = json.loads(printed(sys.executable, CLIENTS / "mlserver_client.py", f"{server.url}/v2/models/{NAME}", f"{texts.url}/v2/models/texts", tools="mlserver"))
    numbers, loud = [[2, 4], [6, 9]], ["good!", "schön!", "!"]
    assert found["numpy"] == found["numpy request"] == found["nulls"] == numbers
    assert found["texts True"] == found["texts False"] == found["text request"] == found["base64"] == loud
    assert found["pandas"] == {"loud": loud, "copy_bytes": ["good", "schön", ""]}
    assert found["datetime"][0] == 400 and "allowed are np, pd, str, base64" in found["datetime"][1] and found["metadata"] == "BYTES"


# ---- the JDK


def test_the_jdk_s_client(server):
    lines = printed("java", CLIENTS / "Predict.java", f"{server.url}/v2/models/{NAME}").splitlines()
    assert len(lines) == 12 and lines[:6] == lines[6:]
    for row, line in enumerate(lines[:3]):
        version, status, body = line.split(" ", 2)
        assert (version, status) == ("HTTP_1_1", "200") and json.loads(body)["outputs"][0]["data"] == [2 * row, 4]
    assert lines[3].startswith("HTTP_1_1 200 ") and lines[3].endswith(" characters")
    assert json.loads(lines[4].split(" ", 2)[2])["name"] == NAME and lines[5] == "HTTP_1_1 200 "


# ---- TensorFlow Serving, as its page on REST has it


def curl(server, line):
    "What a line of the documentation prints here"
    words = shlex.split(line.replace("http://localhost:8501", server.url))
    assert words[0] == "curl"
    return json.loads(printed("curl", "-s", "--noproxy", "*", *words[1:]))


STATUS = {"version": "123", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}


def test_tensorflow_serving_s_documented_lines(half_plus_three):
    def ask(line):
        return curl(half_plus_three, line)
    model = "http://localhost:8501/v1/models/half_plus_three"
    for path in (model, model + "/versions/123"):
        assert ask(f"curl {path}")["model_version_status"] == [STATUS]
        assert ask(f"curl -d '{{\"instances\": [1.0,2.0,5.0]}}' -X POST {path}:predict") == {"predictions": [3.5, 4.0, 5.5]}
        assert ask(f"curl -X POST -d '{{\"signature_name\": \"serving_default\", \"inputs\": {{\"x\": [1.0, 2.0]}}}}' {path}:predict") == {"outputs": [3.5, 4.0]}
        assert ask(f"curl -d '{{\"instances\": [{{\"x\": 1.0}}, {{\"x\": 2.0}}]}}' {path}:predict") == {"predictions": [3.5, 4.0]}
        found = ask(f"curl {path}/metadata")
        assert found["model_spec"] == {"name": "half_plus_three", "signature_name": "", "version": "123"}
        signature = found["metadata"]["signature_def"]["signature_def"]["serving_default"]
        assert signature["inputs"]["x"] == {"name": "x", "dtype": "DT_FLOAT", "tensor_shape": {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False}}
        assert signature["outputs"]["y"]["dtype"] == "DT_FLOAT" and signature["method_name"] == "tensorflow/serving/predict"
    assert "error" in ask(f"curl -d '{{\"instances\": [[1.0, 2.0]]}}' {model}:predict") and "error" in ask(f"curl {model}/versions/124")


def test_tensorflow_serving_s_base64(texts):
    def ask(body):
        return curl(texts, f"curl -X POST -d '{json.dumps(body)}' http://localhost:8501/v1/models/texts:predict")
    want = [{"loud": "good!", "copy_bytes": {"b64": "Z29vZA=="}}, {"loud": "ö!", "copy_bytes": {"b64": "w7Y="}}]
    assert ask({"instances": [{"b64": "Z29vZA=="}, "ö"]}) == {"predictions": want}
    assert ask({"instances": [{"text": {"b64": "Z29vZA=="}}, {"text": {"b64": "w7Y="}}]}) == {"predictions": want}
    assert ask({"inputs": {"text": [{"b64": "Z29vZA=="}]}}) == {"outputs": {"loud": ["good!"], "copy_bytes": [{"b64": "Z29vZA=="}]}}
    assert "is not base64" in ask({"instances": [{"b64": "Z29vZA"}]})["error"]


# ---- Triton


def test_triton_s_client_and_its_model_configuration(server, texts):
    import tritonclient.http as triton
    from google.protobuf import json_format
    from tritonclient.grpc import model_config_pb2
    for s, name, want in ((server, NAME, {"x": ("TYPE_FP32", [2])}), (texts, "texts", {"text": ("TYPE_STRING", [])})):
        with triton.InferenceServerClient(s.url.removeprefix("http://")) as client:
            assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(name)
            version = client.get_model_metadata(name)["versions"][0]
            found = client.get_model_config(name)
            assert found == client.get_model_config(name, version) and "model_configuration" in client.get_server_metadata()["extensions"]
        config = json_format.ParseDict(found, model_config_pb2.ModelConfig())  # refuses every field that Triton's schema has not
        assert config.name == name and config.max_batch_size == 32
        assert {i.name: (model_config_pb2.DataType.Name(i.data_type), list(i.dims)) for i in config.input} == want


# ---- MLflow


def test_mlflow_s_client_with_params(server):
    import pandas as pd
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient
    host, port = server.url.removeprefix("http://").split(":")
    client = ScoringServerClient(host, int(port))
    client.wait_server_ready()
    for _ in range(2):
        assert np.array(client.invoke(pd.DataFrame([[1, 2], [3, 4]], dtype="float32"), params={"temperature": 0.5}).get_predictions()).tolist() == [[2, 4], [6, 8]]
    said = [json.loads(line) for line in server.events().splitlines() if '"ignored"' in line]
    assert [(o["route"], o["key"]) for o in said] == [("/invocations", "params")], "once, however often it is sent"
