"""The right output, in the model's order, and what it is worth: without an engine, with a real server."""
import json

import numpy as np
import pytest
import torch

from mlserve.package.arrays import load_tensors, save_tensors
from mlserve.errors import UsageError
from mlserve.package.evaluation import Reading, as_labels, baseline, measure, read_target
from mlserve.package import Package, golden, save_package
from mlserve.release.check import CheckResult, judged
from mlserve.release.check.comparison import compare_server
from mlserve.release.gates import Gates
from mlserve.tensors import spec_of

NAMES = ["scores", "aux", "label"]  # in no alphabet's order, forwards or backwards
ROWS = np.random.default_rng(0).random((40, 4), np.float32)


class Several(torch.nn.Module):
    "Three scores of a row, whose first is the largest column's, something beside them, and the class itself"

    def forward(self, x):
        return {"label": x[:, :3].argmax(1), "aux": x[:, 3:], "scores": x[:, :3]}  # a dictionary in its own order


class Columns(Several):
    "The same as a tuple, in the order of the names"

    def forward(self, x):
        found = super().forward(x)
        return tuple(found[n] for n in NAMES)


def save(folder, format, model):
    return save_package(model, folder / format, "several", {"x": ROWS[:4]}, NAMES, format=format)


def test_A3_a_file_keeps_the_order_of_its_arrays(tmp_path):
    "safetensors sorts by type and name; held-back answers have no other order than the file's"
    outputs = {"scores": ROWS[:, :3], "aux": ROWS[:, 3:].astype(np.float64), "label": np.array([b"cat"] * 40, object)}
    assert list(load_tensors(save_tensors(tmp_path / "x.safetensors", outputs=outputs))["outputs"]) == NAMES


@pytest.mark.parametrize("format, model", [("torchscript", Columns()), ("torchscript", Several()), ("export", Several()), ("onnx", Several())],
                         ids=["torchscript", "torchscript of a dictionary", "export", "onnx"])
def test_A3_the_order_of_the_model_is_kept_by_every_file_and_program(tmp_path, format, model):
    from mlflow.models import Model
    from mlflow.pyfunc import load_model
    package = save(tmp_path, format, model)
    inputs, outputs = golden(package)
    assert list(outputs) == [s.name for s in package.outputs] == NAMES
    assert (outputs["label"] == inputs["x"][:, :3].argmax(1)).all() and outputs["aux"].shape == (4, 1)
    assert [s.name for s in Model.load(str(package.path)).signature.outputs] == NAMES
    assert list(load_model(str(package.path)).predict({"x": inputs["x"]})) == NAMES


@pytest.mark.parametrize("format", ["torchscript", "export", "onnx"])
def test_A3_golden_inputs_keep_the_order_of_the_call(tmp_path, format):
    "A module is called by position: in another order it would answer the opposite"
    from mlserve.package import load_program

    class Difference(torch.nn.Module):
        def forward(self, whole, part):
            return whole - part
    given = {"whole": ROWS[:4], "part": ROWS[4:8]}
    package = save_package(Difference(), tmp_path / "p", "difference", given, ["rest"], format=format)
    inputs, outputs = golden(package)
    assert list(inputs) == ["whole", "part"]
    assert np.allclose(load_program(package).run(inputs, ["rest"])["rest"], ROWS[:4] - ROWS[4:8]) and np.allclose(outputs["rest"], ROWS[:4] - ROWS[4:8])


def test_A3_a_server_answers_in_the_order_of_the_model(tmp_path):
    import httpx
    from mlserve.client import Client
    from mlserve.serving.server import serve_local
    package = save(tmp_path, "onnx", Several())
    with serve_local(package.path) as url, Client(url) as client, httpx.Client(base_url=url, trust_env=False) as http:
        x = ROWS[:2]
        answers = [client.infer({"x": x}, binary=b) for b in (True, False)] + [client.predict({"x": x})]
        answers += [http.post(path, json=body).json()[key] for path, key, body in (
            ("/predict", "outputs", {"inputs": x.tolist()}), ("/invocations", "predictions", {"inputs": x.tolist()}),
            ("/v1/models/several:predict", "outputs", {"inputs": x.tolist()}))]
        rows = http.post("/v1/models/several:predict", json={"instances": x.tolist()}).json()["predictions"]
        assert [list(a) for a in [*answers, *rows]] == [NAMES] * (len(answers) + 2)
        assert [t["name"] for t in client.metadata()["outputs"]] == NAMES
        assert all(np.allclose(a["scores"], x[:, :3]) for a in answers)


def stand_in(outputs, off=0.0):
    "A server that gives an answer by row, in the alphabet's order as a careless one might"
    class Server:
        def health(self):
            return {"device": "cpu"}

        def infer(self, inputs):
            rows = inputs["x"][:, 0].astype(int)
            return {n: outputs[n][rows] for n in sorted(outputs)}
    return Server()


def measured(tmp_path, outputs, labels, target=None):
    "What a check says of a model with these answers, through the files that a release keeps"
    rows = len(labels)
    x = np.arange(rows, dtype=np.float32)[:, None]
    held = load_tensors(save_tensors(tmp_path / "package.holdout.safetensors", inputs={"x": x}, outputs=outputs, labels={"labels": as_labels(labels)}))
    reading = read_target(held["outputs"], held["labels"]["labels"], target)
    save_tensors(tmp_path / "golden.safetensors", inputs={"x": x[:2]}, outputs={n: a[:2] for n, a in outputs.items()})
    specs = [tuple(spec_of(n, a) for n, a in arrays.items()) for arrays in ({"x": x}, outputs)]
    package = Package(tmp_path, "stand-in", "onnx", "model.onnx", *specs, {"rtol": 1e-4, "atol": 1e-5}, "sha256:0")
    return compare_server(stand_in(outputs), package, held, "cpu", reading)


Y = np.array([2, 0, 1, 2, 0, 1, 0, 0])
RIGHT, OTHER = np.eye(3, dtype=np.float32)[Y], np.eye(3, dtype=np.float32)[(Y + 1) % 3]
TEXT = as_labels(["cat", "dog", "cow"])[Y]
TWO_HEADS = {"shape_logits": RIGHT, "colour_logits": OTHER}
CASES = {  # outputs in the model's order, labels, the output that is meant, the metric and its value
    "scores before aux": ({"scores": RIGHT, "aux": OTHER}, Y, "scores", "accuracy", 1),
    "a label and how sure it is": ({"confidence": RIGHT.max(1), "label": Y}, Y, "label", "accuracy", 1),
    "probabilities before label": ({"probabilities": RIGHT, "label": Y}, Y, "label", "accuracy", 1),
    "text beside probabilities": ({"probabilities": OTHER, "label": TEXT}, ["cat", "dog", "cow", "cat", "dog", "cow", "dog", "dog"], "label", "accuracy", 0),
    "text that is right": ({"probabilities": OTHER, "output_label": TEXT}, [t.decode() for t in TEXT], "output_label", "accuracy", 1),
    "classes of any number": ({"class": Y * 7 - 3}, Y * 7 - 3, "class", "accuracy", 1),
    "one-hot labels": ({"y": RIGHT}, RIGHT, "y", "accuracy", 1),
    "a column of floats": ({"logits": RIGHT}, Y[:, None].astype(float), "logits", "accuracy", 1),
    "a sigmoid column": ({"p": np.where(Y == 0, .7, .2)[:, None]}, Y == 0, "p", "accuracy", 1),
    "a sigmoid in a row": ({"p": np.where(Y == 0, .7, .2)}, (Y == 0).astype(float), "p", "accuracy", 1),
    "a logit": ({"y": np.where(Y == 0, 3., -.2)}, Y == 0, "y", "accuracy", 1),
    "a logit within 0 and 1": ({"logit": np.where(Y == 0, .3, -0.)}, Y == 0, "logit", "accuracy", 1),
    "several labels a row": ({"tags": np.stack([Y > 0, Y > 1, Y < 9], 1) * .8}, np.stack([Y > 0, Y > 1, Y < 9], 1), "tags", "f1_macro", 1),
    "a number": ({"embedding": np.ones((8, 16)), "price": Y + .5}, Y + .25, "price", "rmse", .25),
    "a count": ({"count": Y + .25}, Y * 1, "count", "mae", .25),
}


@pytest.mark.parametrize("case", CASES)
def test_A3_the_output_that_the_labels_belong_to_is_measured(tmp_path, case):
    "The notebook and the container by the same number, and by the right one"
    outputs, labels, target, metric, value = CASES[case]
    found = measured(tmp_path, outputs, labels)
    assert found["reading"].startswith(f"'{target}' as ") and found["rows"] == 8
    assert found["metrics"][metric]["notebook"] == found["metrics"][metric]["container"] == pytest.approx(value)


@pytest.mark.parametrize("form", ["scores", "probabilities", "logits", "labels"])
def test_an_answer_that_is_no_number_is_wrong(form):
    "NumPy's argmax calls the first NaN the largest; a comparison with NaN is no"
    outputs = {"y": np.array([[np.nan, 0], [0, 1]])} if form == "scores" else {form: np.array([np.nan, 1])}
    labels = as_labels([0, 1])
    assert measure(read_target({k: np.nan_to_num(a) for k, a in outputs.items()}, labels), outputs, labels)["accuracy"] == 0.5


@pytest.mark.parametrize("outputs, labels, words", [
    (TWO_HEADS, Y, ["shape_logits, colour_logits", 'target = "shape_logits"']),
    ({"a": RIGHT, "b": OTHER}, Y, ["a, b"]),
    ({"class_weights": OTHER, "out": RIGHT}, Y, ["class_weights, out"]),
    ({"mean": Y * 1., "std": Y * 2.}, Y / 2, ["mean, std"]),
    ({"logits": RIGHT}, TEXT, ["the labels (text [8])", "logits (float32 [8, 3])"]),
    ({"logits": RIGHT}, Y + 1, ["1 to 3", "logits (float32 [8, 3])"]),
], ids=["two heads", "two that fit", "a name of labels", "two numbers", "text for scores", "classes from one"])
def test_A3_what_cannot_be_known_is_asked_for(outputs, labels, words):
    with pytest.raises(UsageError) as e:
        read_target(outputs, as_labels(labels))
    assert all(w in str(e.value) for w in words), str(e.value)


WIDE = 2**60 + Y  # beyond 2**53, where floats hold every 256th whole number only


@pytest.mark.parametrize("answers", [WIDE.astype(np.uint64) + 1, np.append(WIDE[:-1].astype(float), np.nan), WIDE.astype(float)], ids=["unsigned", "with NaN", "floats"])
def test_A3_whole_numbers_are_compared_without_rounding(answers):
    "NumPy joins int64 and uint64 to float64, in which these are all alike"
    labels, outputs = as_labels(WIDE), {"label": answers}
    exact = np.mean([a == b for a, b in zip(answers.tolist(), WIDE.tolist())])
    assert exact < 1
    assert measure(Reading("label", "labels"), outputs, labels)["accuracy"] == exact
    assert measure(Reading("label", "labels"), {"label": WIDE.astype(np.uint64)}, labels)["accuracy"] == 1
    with pytest.raises(UsageError, match="decide differently"):
        read_target({"label": WIDE, "class": WIDE.astype(np.uint64) + 1}, labels)


def test_a_label_that_is_missing_is_refused():
    "NaN is below and above no limit: an error of NaN would pass a careless gate"
    for labels in ([1.5, float("nan")], ["cat", float("nan")], [1, None]):
        with pytest.raises(UsageError, match="label"):
            as_labels(labels)


def result(**numbers):
    return CheckResult(True, "cpu", "x@sha256:1", "2", held="sha256:1", metrics={"accuracy": {"production": None, **numbers}})


@pytest.mark.parametrize("got", [None, float("nan")])
def test_a_number_that_could_not_be_computed_passes_no_gate(got):
    from mlserve.release.check.comparison import finite
    found = judged(result(**finite({"notebook": got, "container": got, "baseline": 0.5})), Gates(min={"accuracy": 0}), None)
    assert not found.passed and "not finite" in found.reason and found.warnings


def test_a_model_that_learnt_nothing_is_seen_beside_production_and_the_majority():
    "It is reproduced exactly, and every comparison is green"
    labels = as_labels(np.arange(100) % 10 == 0)
    outputs = {"logits": np.tile([1., 0.], (100, 1))}
    reading = read_target(outputs, labels)
    value, constant = measure(reading, outputs, labels)["accuracy"], baseline(reading, labels)["accuracy"]
    assert value == constant == 0.9
    production = {"version": "1", "held": "sha256:1", "metrics": {"accuracy": 0.97}}
    found = judged(result(notebook=value, container=value, baseline=constant), Gates(), production)
    assert found.passed and "no better than" in found.warnings[0]
    assert found.metrics["accuracy"] == {"notebook": 0.9, "container": 0.9, "production": 0.97, "baseline": 0.9}
    found = judged(result(notebook=value, container=value, baseline=constant), Gates(drop={"accuracy": 0.05}), production)
    assert not found.passed and found.code == 3 and "0.97 in production" in found.reason
    assert json.dumps(found.metrics, allow_nan=False)
