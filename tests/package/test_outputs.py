"""What models return: nested structures, None, names that nobody gave, and bfloat16, in every format and over the wire."""
import httpx
import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from torch import nn

from mlserve.client import Client
from mlserve.errors import MlserveError, UsageError
from mlserve.package import load_program, save_package
from mlserve.package.programs import FORMATS
from mlserve.serving.server import serve_local

SOURCE = '''
from dataclasses import dataclass
from typing import Any, NamedTuple
import torch
from torch import nn

@dataclass
class Detections:
    logits: Any
    boxes: Any
    loss: Any = None

class Pair(NamedTuple):
    mean: torch.Tensor
    deviation: torch.Tensor

SHAPES = {
    "tensor": lambda y: y,
    "list": lambda y: [y, [y * 2]],
    "nested tuple": lambda y: (y, (y * 2, y * 3)),
    "none in a tuple": lambda y: (y, None, y * 2),
    "none in a dictionary": lambda y: {"a": y, "b": None},
    "mixed dictionary": lambda y: {"a": y, "b": (y * 2, y * 3)},
    "named tuple": lambda y: Pair(y, y * 2),
    "dataclass": lambda y: Detections(y, {"xy": y * 2, "size": (y + 1, y + 2)}),
}

class Returns(nn.Module):
    def __init__(self, shape="tensor"):
        super().__init__()
        torch.manual_seed(0)
        self.line, self.shape = nn.Linear(4, 3), shape
    def forward(self, x): return SHAPES[self.shape](self.line(x))
'''
space: dict = {"__name__": "returned"}
exec(SOURCE, space)
X = np.random.default_rng(0).random((3, 4), np.float32)
PATHS = {
    "tensor": {"output": 1},
    "list": {"output_0": 1, "output_1.0": 2},
    "nested tuple": {"output_0": 1, "output_1.0": 2, "output_1.1": 3},
    "none in a tuple": {"output_0": 1, "output_2": 2},
    "none in a dictionary": {"a": 1},
    "mixed dictionary": {"a": 1, "b.0": 2, "b.1": 3},
    "named tuple": {"mean": 1, "deviation": 2},
    "dataclass": {"logits": 1, "boxes.xy": 2, "boxes.size.0": (1, 1), "boxes.size.1": (1, 2)},
}


def line():
    return space["Returns"]().line(torch.from_numpy(X)).detach().numpy()


def saved(folder, shape, format="torchscript", outputs=()):
    more = {}
    if format == "safetensors":
        (folder / "returns.py").write_text(SOURCE)
        more = {"handler": folder / "returns.py", "arguments": {"shape": shape}}
    return save_package(space["Returns"](shape).eval(), folder / "p", "returns", {"x": X}, outputs, format=format, **more)


CASES = [(shape, "torchscript") for shape in PATHS] + [(shape, format) for shape in ("dataclass", "none in a tuple") for format in FORMATS]


@pytest.mark.parametrize("shape,format", sorted(set(CASES)))
def test_every_structure_is_answered_by_its_paths(shape, format, tmp_path):
    package = saved(tmp_path, shape, format)
    assert [spec.name for spec in package.outputs] == list(PATHS[shape])
    answered = load_program(package).run({"x": X}, list(PATHS[shape]))
    for name, how in PATHS[shape].items():
        factor, more = how if isinstance(how, tuple) else (how, 0)
        assert np.allclose(answered[name], line() * factor + more, atol=1e-5), name


def test_names_pick_and_order_what_has_names_and_name_what_has_places(tmp_path):
    picked = saved(tmp_path, "dataclass", outputs=["boxes.size.1", "logits"])
    answered = load_program(picked).run({"x": X}, ["boxes.size.1", "logits"])
    assert np.allclose(answered["boxes.size.1"], line() + 2, atol=1e-5) and np.allclose(answered["logits"], line(), atol=1e-5)
    placed = saved(tmp_path, "nested tuple", outputs=["one", "two", "three"])
    assert np.allclose(load_program(placed).run({"x": X}, ["one", "two", "three"])["three"], line() * 3, atol=1e-5)


@pytest.mark.parametrize("shape,outputs,sentence", [
    ("dataclass", ["logits", "boxes"], "The model gave logits, boxes.xy, boxes.size.0, boxes.size.1; outputs names logits, boxes."),
    ("named tuple", ["deviation", "y"], "The model gave mean, deviation; outputs names deviation, y."),
    ("none in a tuple", ["a", "b", "c"], "The model gave 2 of the 3 outputs named a, b, c: 0, 2."),
    ("none in a dictionary", ["b"], "The model gave a; outputs names b."),
])
def test_names_that_fit_nothing_are_refused_with_what_there_is(shape, outputs, sentence, tmp_path):
    with pytest.raises(UsageError) as e:
        saved(tmp_path, shape, outputs=outputs)
    assert str(e.value).startswith(sentence) and not (tmp_path / "p").exists()


class Sometimes(nn.Module):
    def forward(self, x):
        return x, (x * 2 if len(x) > 2 else None)


class Loss(nn.Module):
    def forward(self, x):
        return {"y": x, "loss": 0.5}


class Twice(nn.Module):
    def forward(self, x):
        return {"a.b": x, "a": {"b": x}}


@pytest.mark.parametrize("model,outputs", [(Sometimes(), ["a", "b"]), (Sometimes(), []), (Loss(), []), (Twice(), []), (Twice(), ["a.b"])])
def test_what_is_not_there_every_time_or_is_no_tensor_is_not_saved(model, outputs, tmp_path):
    with pytest.raises(MlserveError) as e:
        save_package(model, tmp_path / "p", "net", {"x": X}, outputs)
    assert e.value.code in (2, 3, 8) and not (tmp_path / "p").exists(), e.value


def test_a_value_beside_tensors_is_left_where_names_do_not_ask_for_it(tmp_path):
    assert [spec.name for spec in save_package(Loss(), tmp_path / "p", "net", {"x": X}, ["y"]).outputs] == ["y"]


def test_paths_are_names_on_every_wire(tmp_path):
    package = saved(tmp_path, "dataclass")
    with serve_local(package.path) as url:
        binary = Client(url).predict({"x": X})
        plain = httpx.post(f"{url}/predict", json={"inputs": X.tolist()}).json()["outputs"]
        described = httpx.get(f"{url}/v2/models/returns").json()["outputs"]
        typed = httpx.get(f"{url}/openapi.json").text
    assert list(binary) == list(plain) == [output["name"] for output in described] == list(PATHS["dataclass"])
    assert np.allclose(binary["boxes.size.0"], line() + 1, atol=1e-5) and np.allclose(plain["boxes.xy"], line() * 2, atol=1e-5)
    assert '"boxes.size.1"' in typed


@pytest.mark.parametrize("format", ["torchscript", "export"])
def test_a_model_in_bfloat16_answers_in_float32_within_the_tolerance_of_its_weights(format, tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0)
    model = nn.Sequential(nn.Embedding(100, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 5)).to(torch.bfloat16).eval()
    ids = np.random.default_rng(0).integers(0, 100, (3, 7))
    package = save_package(model, tmp_path / "p", "text", {"ids": ids}, format=format)
    answer = load_program(package).run({"ids": ids}, ["output"])["output"]
    assert package.tolerance == {"rtol": 2e-2, "atol": 5e-3} and answer.dtype == np.float32
    assert np.allclose(answer, model(torch.from_numpy(ids)).float().detach().numpy(), rtol=2e-2, atol=5e-3)


def test_bfloat16_as_onnx_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(MlserveError, match="bfloat16, which onnxruntime does not compute with on a CPU") as e:
        save_package(nn.Embedding(9, 4).to(torch.bfloat16), tmp_path / "p", "text", {"ids": np.ones((3, 2), int)}, format="onnx")
    assert "'torchscript' or 'export'" in e.value.mend


def test_an_onnx_file_has_the_names_that_its_graph_gives(tmp_path):
    package = saved(tmp_path, "mixed dictionary", "onnx")
    again = save_package(package.path / "model.onnx", tmp_path / "again", "net", {"x": X})
    assert [spec.name for spec in again.outputs] == ["a", "b.0", "b.1"] == [o.name for o in onnx.load(package.path / "model.onnx").graph.output]


@pytest.mark.parametrize("model,names", [(LogisticRegression(), ["label", "probabilities"]), (RidgeClassifier(), ["label"]), (Ridge(), ["prediction"])])
def test_a_table_model_has_the_names_of_its_kind(model, names, tmp_path):
    frame = pd.DataFrame({"a": np.linspace(0, 1, 40), "b": np.linspace(1, 0, 40) ** 2})
    package = save_package(model.fit(frame, (frame["a"] > 0.5).astype(int)), tmp_path / "p", "table", inputs=frame)
    assert [spec.name for spec in package.outputs] == names
