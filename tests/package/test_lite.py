"""LiteRT: a `.tflite` file is a package and answers as the interpreter itself does, bit by bit; a hostile one never reaches the runtime."""
import subprocess
import sys

import httpx
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from lite_files import lite_bytes

from mlserve.client import Client
from mlserve.errors import MlserveError, Refused, UsageError
from mlserve.package import load_package, load_program, save_package
from mlserve.package.programs import read_program
from mlserve.release.lock.dependencies import requirements_of, spared_of
from mlserve.serving.server import serve_local

KINDS = {"float": {}, "int8": {"int8": True}, "fixed": {"free": False}}


def example(kind, rows, seed=1):
    x = np.random.default_rng(seed).normal(size=(rows, 4))
    return (x * 30).astype(np.int8) if kind == "int8" else x.astype(np.float32)


def itself(file, x):
    "What the interpreter answers, one row at a time"
    interpreter = Interpreter(str(file), num_threads=1)
    interpreter.allocate_tensors()
    taken, given = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    rows = []
    for row in x:
        interpreter.set_tensor(taken, row[None])
        interpreter.invoke()
        rows.append(interpreter.get_tensor(given)[0])
    return np.array(rows)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("lite"), {}
    for kind, how in KINDS.items():
        file = folder / f"{kind}.tflite"
        file.write_bytes(lite_bytes(**how))
        made[kind] = save_package(file, folder / kind, "lite", {"x": example(kind, 8)}, ["scores"])
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_tflite_file_answers_over_the_wire_as_its_interpreter_does(packages, kind):
    package = load_package(packages[kind].path)
    assert package.format == "tflite" and package.inputs[0].datatype == ("INT8" if kind == "int8" else "FP32")
    if kind == "int8":
        assert package.inputs[0].step == (pytest.approx(0.05), 3) and package.outputs[0].step == (pytest.approx(0.1), -5)
        assert "0.05 × (value − 3)" in str(package)
    x = example(kind, 21, 2)
    expected = itself(package.path / package.file, x)
    assert np.array_equal(load_program(package).run({"x": x}, ["scores"])["scores"], expected)
    with serve_local(package.path) as url, Client(url) as client, httpx.Client(base_url=url, trust_env=False) as http:
        assert np.array_equal(client.infer({"x": x})["scores"], expected)
        told = http.get("/v2/models/lite").json()
        assert ("zero_point" in str(told)) == (kind == "int8"), told
        assert ("stands for 0.05" in http.get("/openapi.json").text) == (kind == "int8")
        answered = http.post("/predict", json={"inputs": x.tolist()}).raise_for_status().json()["outputs"]
        assert np.array_equal(np.array(answered, expected.dtype), expected)


def test_a_package_of_litert_needs_neither_torch_nor_onnxruntime(packages):
    wanted = [line.partition("=")[0] for line in requirements_of(packages["float"])]
    assert "ai-edge-litert" in wanted and not {"torch", "onnxruntime"} & set(wanted)
    spared = spared_of("tflite")["ai-edge-litert"]
    code = f"""
import sys
for name in {sorted(spared | {'google', 'ml_dtypes', 'backports', 'torch', 'onnxruntime'})}: sys.modules[name] = None
import numpy as np
from mlserve.package import load_package, load_program
package = load_package(sys.argv[1])
print(load_program(package).run({{'x': np.ones((2, 4), np.float32)}}, ['scores'])['scores'].shape)
"""
    done = subprocess.run([sys.executable, "-c", code, packages["float"].path], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "(2, 3)", done.stderr
    with pytest.raises(Refused, match="computes on the CPU"):
        requirements_of(packages["float"], device="cuda")


def test_a_runtime_that_is_missing_is_named_with_its_extra(packages):
    code = """
import sys
sys.modules['ai_edge_litert'] = None
from mlserve.errors import MlserveError
from mlserve.package import load_package, load_program
try: load_program(load_package(sys.argv[1]))
except MlserveError as e: print(e)
"""
    done = subprocess.run([sys.executable, "-c", code, packages["float"].path], capture_output=True, text=True, timeout=60)
    assert "mlserve[tflite]" in done.stdout and "ai_edge_litert" in done.stdout, done.stderr


def test_W11_a_custom_operator_is_refused_before_the_runtime_sees_it(tmp_path):
    file = tmp_path / "model.tflite"
    file.write_bytes(lite_bytes(custom="Evil"))
    with pytest.raises(Refused, match="'Evil' is a custom one"):
        read_program(file, "tflite")


def test_hostile_lite_file_is_refused(tmp_path):
    "A custom operator by its name, a cut file, a weight that is shorter than it says, a fixed batch of several rows, another kind of file"
    whole = lite_bytes()
    short = whole.replace(np.array([8, 4], "i4").tobytes(), np.array([8, 1 << 20], "i4").tobytes())
    assert short != whole
    cases = {"custom": (lite_bytes(custom="Evil"), "'Evil' is a custom one"), "cut": (whole[:600], "is refused"), "short": (short, "bytes and shape"),
             "rows": (lite_bytes(free=False, rows=4), "must be open or 1"), "zip": (b"PK\3\4" + whole, "asked for as a LiteRT model")}
    for name, (data, why) in cases.items():
        file = tmp_path / f"{name}.tflite"
        file.write_bytes(data)
        with pytest.raises(MlserveError, match=why):
            save_package(file, tmp_path / "out", "lite", {"x": example("float", 4)}, ["scores"])
        assert not (tmp_path / "out").exists()


def test_what_cannot_be_a_lite_package_is_said(tmp_path):
    import torch
    with pytest.raises(UsageError, match="nothing here writes"):
        save_package(torch.nn.Linear(4, 3).eval(), tmp_path / "out", "lite", {"x": example("float", 4)}, ["scores"], format="tflite")
    file = tmp_path / "model.tflite"
    file.write_bytes(lite_bytes())
    with pytest.raises(MlserveError, match="The file takes x; given was y"):
        save_package(file, tmp_path / "out", "lite", {"y": example("float", 4)}, ["scores"])


@pytest.mark.parametrize("free", [True, False], ids=["any rows", "one row"])
def test_outputs_go_by_the_names_of_the_file(tmp_path, free):
    file, x = tmp_path / "two.tflite", np.ones((3, 4), np.float32)
    file.write_bytes(lite_bytes(free=free, gives=("a", "b")))
    own = load_program(save_package(file, tmp_path / "own", "m", {"x": x})).run({"x": x}, ["a", "b"])
    assert own["a"].shape == (3, 3) and own["b"].shape == (3, 8)
    for names, expected in ((["b", "a"], {"a": "a", "b": "b"}), (["one", "two"], {"one": "a", "two": "b"}), (["b"], {"b": "b"})):
        package = save_package(file, tmp_path / "named", "m", {"x": x}, names)
        given = load_program(package).run({"x": x}, names)
        assert list(given) == names == [s.name for s in package.outputs]
        assert all(np.array_equal(given[name], own[expected[name]]) for name in names)
    for names in (["a", "b", "c"], ["a", "c"], ["c"]):
        with pytest.raises(UsageError, match="The file gives a, b"):
            save_package(file, tmp_path / "wrong", "m", {"x": x}, names)
    file.write_bytes(lite_bytes(free=free, gives=("same", "same")))
    with pytest.raises(Refused, match="no names of their own"):
        save_package(file, tmp_path / "wrong", "m", {"x": x})
