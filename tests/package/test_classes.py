"""Which class each column of an answer stands for: told by package, MLflow and server, in the order of the columns, and refused where it is not."""
import json

import mlflow
import numpy as np
import pytest
import torch
from lightgbm import LGBMClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from test_python import FRAME as FLATS
from test_tables import HELD, TRAIN, pipeline
from torch import nn
from xgboost import XGBClassifier

from mlserve.errors import CheckFailed, IntegrityError, UsageError
from mlserve.package import load_package, save_package
from mlserve.package.convert.columns import table_columns, to_arrays
from mlserve.package.mlmodel import parse_mlmodel
from mlserve.serving.docs.openapi import body_schema
from mlserve.serving.model import load_model
from mlserve.serving.model.device import Device
from mlserve.tensors import TensorSpec
from mlserve.wire.metadata import model_metadata
from mlserve.wire.v2 import answer_infer, decode_infer

KINDS = {"texts": (LogisticRegression(max_iter=500), ["no", "yes"]), "numbers that do not sort as texts do": (RandomForestClassifier(10, random_state=0), [2, 10, 9]),
         "truth values": (LogisticRegression(max_iter=500), [False, True]), "floats": (RandomForestClassifier(10, random_state=0), [1.0, 0.0]),
         "xgboost": (XGBClassifier(n_estimators=5, n_jobs=1), [0, 1, 2]), "lightgbm": (LGBMClassifier(n_estimators=5, verbose=-1, n_jobs=1), ["small", "large", "b"]),
         "labels that no largest probability decides": (SVC(probability=True, random_state=0), ["yes", "no"])}


def fitted(kind):
    "A model on a table, and its labels"
    last, labels = KINDS[kind]
    y = np.array(labels)[np.digitize(TRAIN[2], [3.6, 4.2][:len(labels) - 1])]
    return pipeline(last, impute=kind != "xgboost").fit(TRAIN[0], y), y


@pytest.mark.parametrize("kind", KINDS)
def test_A6_a_column_of_probabilities_is_told_by_its_class(kind, tmp_path):
    "Over held-back rows, each class by its name: in the package, MLmodel, V2's metadata, OpenAPI, and V2's own classification"
    model, _ = fitted(kind)
    package = load_package(save_package(model, tmp_path / "p", "table", TRAIN[0]).path)
    label, chances = package.outputs
    assert label.classes is None and len(chances.classes) == len(model.classes_)
    served = load_model(package, Device("cpu")).predict(to_arrays(HELD[0], table_columns(TRAIN[0])))
    expected = model.predict_proba(HELD[0])
    for place, own in enumerate(model.classes_):
        name = {str: str(own), int: None if isinstance(own, str) else int(own)}[type(chances.classes[0])]
        column = chances.classes.index(name)
        assert np.abs(served["probabilities"][:, column] - expected[:, place]).max() < 1e-5, f"{name!r} is another column"
    known = {v.decode() if isinstance(v, bytes) else v for v in served["label"].tolist()}
    assert known <= set(chances.classes), "a label is looked up by its value"
    assert mlflow.models.Model.load(str(package.path)).metadata == {"classes": {"probabilities": list(chances.classes)}}
    told = model_metadata("table", [], "onnx", package.inputs, package.outputs)["outputs"]
    assert "parameters" not in told[0] and tuple(json.loads(told[1]["parameters"]["classes"])) == chances.classes
    schema = body_schema({"outputs": [{"label": 0}]}, package.outputs)["properties"]["outputs"]["items"]["properties"]
    assert schema["probabilities"]["description"].endswith("in this order: " + ", ".join(map(json.dumps, chances.classes)))
    asked = {"inputs": [], "outputs": [{"name": "probabilities", "parameters": {"classification": 1}}]}
    cells = to_arrays(HELD[0].dropna()[:4], table_columns(TRAIN[0]))
    for spec in package.inputs:
        data = [v.decode() if isinstance(v, bytes) else v for v in cells[spec.name].ravel().tolist()]
        asked["inputs"].append({"name": spec.name, "shape": [4, 1], "datatype": spec.datatype, "data": data})
    request = decode_infer(json.dumps(asked).encode(), package.inputs, package.outputs)
    answer = json.loads(answer_infer(request, load_model(package, Device("cpu")).predict(request.inputs), "table", "")[0])
    for text in answer["outputs"][0]["data"]:
        _, column, name = text.split(":")
        assert name == str(chances.classes[int(column)])


def test_A6_classes_that_are_not_the_models_own_are_refused(tmp_path):
    "A list in another order, or of other numbers; names for numbers that count the columns are taken"
    given = {"path": tmp_path / "p", "name": "table", "inputs": TRAIN[0]}
    with pytest.raises(UsageError, match=r"are given as yes, no; the model's own \(classes_\) are no, yes"):
        save_package(fitted("texts")[0], classes=["yes", "no"], **given)
    with pytest.raises(UsageError, match="are given as 1, 0, 2; the model's own"):
        save_package(fitted("xgboost")[0], classes=[1, 0, 2], **given)
    with pytest.raises(UsageError, match="There are 3 classes .*probabilities has 2"):
        save_package(fitted("texts")[0], classes=["a", "b", "c"], **given)
    assert not (tmp_path / "p").exists()
    named = save_package(fitted("xgboost")[0], classes=["small", "usual", "large"], **given)
    assert named.outputs[1].classes == ("small", "usual", "large")
    assert save_package(fitted("texts")[0], outputs=["label"], **given).outputs[0].classes is None


def test_A6_an_order_that_labels_speak_against_is_refused(tmp_path):
    "An ONNX file brings its labels, and no classes_: the label of each row says which column is its class"
    from skl2onnx import to_onnx
    model, x = fitted("texts")[0], TRAIN[0][["visits"]].to_numpy(np.float32)
    model = LogisticRegression().fit(x, np.where(x[:, 0] > 14, "yes", "no"))
    (tmp_path / "m.onnx").write_bytes(to_onnx(model, x[:1], options={"zipmap": False}).SerializeToString())
    given = {"model": tmp_path / "m.onnx", "path": tmp_path / "p", "name": "table", "inputs": {"X": x[:8]}, "outputs": ["label", "probabilities"]}
    with pytest.raises(CheckFailed, match="given as yes, no; the output 'label' goes with other columns: .*no with column 0"):
        save_package(classes=["yes", "no"], **given)
    assert save_package(classes=["no", "yes"], **given).outputs[1].classes == ("no", "yes")


SOURCE = """
import json
import numpy as np
class Judge:
    def load(self, files): self.known = json.loads((files / 'classes.json').read_text())
    @property
    def classes_(self): return self.known
    def predict(self, area): return {'chance': np.stack([area > 60, area <= 60], 1).astype(float), 'area': area}
"""


def test_A6_the_files_of_a_class_have_the_classes_of_the_live_object(tmp_path):
    "They may be of another training, whose answers are the same"
    (tmp_path / "model.py").write_text(SOURCE)
    (tmp_path / "classes.json").write_text('["large", "small"]')
    module = {"__name__": "cells"}
    exec(SOURCE, module)
    judge = module["Judge"]()
    judge.load(tmp_path)
    given = {"path": tmp_path / "p", "name": "flats", "inputs": FLATS[["area"]].dropna(), "format": "python", "handler": tmp_path / "model.py", "files": [tmp_path / "classes.json"]}
    assert save_package(judge, **given).outputs[0].classes == ("large", "small")
    (tmp_path / "classes.json").write_text('["small", "large"]')
    with pytest.raises(CheckFailed, match=r"saved model's classes_ are small, large; the live model's of 'chance' are large, small"):
        save_package(judge, **given)


@pytest.mark.parametrize("format", ["torchscript", pytest.param("export", marks=pytest.mark.matrix), "onnx"])
def test_a_network_has_the_classes_that_it_was_given(format, tmp_path):
    "By argument or by attribute; no class is told where nobody said one"
    torch.manual_seed(0)
    given = {"path": tmp_path / "p", "name": "animals", "inputs": {"x": torch.rand(4, 5)}, "outputs": ["logits"], "format": format}
    net = nn.Sequential(nn.Linear(5, 3))
    assert save_package(net, **given).outputs[0].classes is None and '"classes"' not in (tmp_path / "p/MLmodel").read_text()
    assert save_package(net, classes=("owl", "cat", "dog"), **given).outputs[0].classes == ("owl", "cat", "dog")
    net.classes_ = np.array(["cat", "dog", "owl"])
    package = save_package(net, **given)
    assert package.outputs[0].classes == ("cat", "dog", "owl") and "cat, dog, owl" in repr(package)
    with pytest.raises(UsageError, match="given as owl, cat, dog; the model's own"):
        save_package(net, classes=("owl", "cat", "dog"), **given)


def test_a_description_with_classes_that_cannot_be_meant_is_refused(tmp_path):
    package = save_package(nn.Linear(2, 2), tmp_path / "p", "tiny", {"x": torch.rand(3, 2)}, ["y"], classes=["a", "b"])
    told = json.loads((package.path / "MLmodel").read_text())
    assert parse_mlmodel(json.dumps(told).encode())["outputs"][0]["classes"] == ["a", "b"]
    for wrong in (["a"], ["a", "a"], "ab", ["a", None], ["a", ["b"]], {"a": 0, "b": 1}):
        told["flavors"]["mlserve"]["outputs"][0]["classes"] = wrong
        with pytest.raises(IntegrityError, match="the field 'outputs' is"):
            parse_mlmodel(json.dumps(told).encode())
    told["flavors"]["mlserve"] |= {"outputs": package_outputs(told, ["a", "b"]), "inputs": package_outputs(told, ["a", "b"])}
    with pytest.raises(IntegrityError, match="the field 'inputs' is"):
        parse_mlmodel(json.dumps(told).encode())


def package_outputs(told, classes):
    return [told["flavors"]["mlserve"]["outputs"][0] | {"classes": classes}]


def test_a_specs_own_words_show_its_classes_and_stay_short():
    few, many = (TensorSpec("p", "FP32", (-1, n), classes=[f"c{i}" for i in range(n)]) for n in (2, 1000))
    assert repr(few).endswith("classes=('c0', 'c1'))") and "'c5', ...)" in repr(many) and len(repr(many)) < 200
    assert "classes" not in repr(TensorSpec("p", "FP32", (-1, 2)))
