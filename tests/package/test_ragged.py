"""Ragged outputs: boxes of any number are each picture's own, over every wire and in every company, and nobody who does not know of them takes them for rows."""
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import onnx
import pytest
import torch
import tritonclient.grpc as triton
from onnx import TensorProto, helper
from test_detectors import EXAMPLE, OUTPUTS, PAGE, A, B, C, D, Detector, pictures
from test_invariance import load_here, submitted

from mlserve.client import Client
from mlserve.errors import CheckFailed, IntegrityError, ModelFailed, UsageError
from mlserve.package import golden, load_package, load_program, save_package
from mlserve.package.evaluation import read_target
from mlserve.package.holdout import beside, held_outputs, read_holdout
from mlserve.package.trial.process import free_port
from mlserve.ragged.rows import joined
from mlserve.release.check.comparison import compare_server
from mlserve.serving.server import serve_local

RAGGED = {"boxes": "counts", "scores": "counts"}
EACH = [[[A]], [[], [A, B]], [[C], [], [A, B, C]], [[]]]  # pictures of a request: none to three squares in each


def expected(images):
    "For each picture what the model finds when it is asked alone"
    found = []
    for image in images:
        with torch.inference_mode():
            found.append([t.numpy() for t in Detector().eval()(torch.from_numpy(image[None]))])
    boxes, scores, counts = zip(*found)
    return {"boxes": list(boxes), "scores": list(scores), "counts": np.concatenate(counts)}


def same(told, images):
    want = expected(images)
    assert told["counts"].tolist() == want["counts"].tolist()
    for name in RAGGED:
        assert [np.shape(one) for one in told[name]] == [one.shape for one in want[name]], name
        assert all(np.abs(got - one).max(initial=0) < 1e-5 for got, one in zip(told[name], want[name])), name


def by_row(told):
    "An answer in flat tensors as lists, by its counts; written apart from the product"
    ends = np.cumsum(told["counts"]).tolist()
    return {n: [a[end - k:end] for end, k in zip(ends, told["counts"].tolist())] if n in RAGGED else a for n, a in told.items()}


def saved_in(folder):
    images = pictures(*[[A], [], [B, C], [D]] * 2)["image"]
    return save_package(Detector().eval(), folder / "p", "detector", EXAMPLE, OUTPUTS, ragged=RAGGED, holdout=({"image": images}, [1, 0, 2, 1] * 2))


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    return saved_in(tmp_path_factory.mktemp("ragged"))


def test_A2_pictures_of_several_clients_share_a_call_and_each_has_its_own_boxes(ragged):
    life, _ = load_here(ragged)
    asked = [pictures(*each)["image"] for each in ([[A]], [[]], [[A, B], [C]], [[D], [], [A, C, D]], [[], [B]] * 40, [[B, C]])]
    for image, told in zip(asked, submitted(life, *({"image": image} for image in asked))):
        same(by_row(told), image)


def test_a_ragged_answer_is_right_over_every_wire_to_clients_at_once(ragged):
    port = free_port()
    with serve_local(ragged.path, grpc_port=port) as url, Client(url) as client, triton.InferenceServerClient(f"127.0.0.1:{port}") as stub, httpx.Client(base_url=url, trust_env=False) as plain:
        def lists(path, key, **asked):
            response = plain.post(path, **asked)
            told = response.json()[key]
            if isinstance(told, list):
                told = {n: [row[n] for row in told] for n in OUTPUTS}
            return {n: [np.reshape(np.float32(one), (-1, 4) if n == "boxes" else -1) for one in told[n]] if n in RAGGED else np.array(told[n]) for n in OUTPUTS}
        def lines(image):
            body = "\n".join(json.dumps(one.tolist()) for one in image)
            told = plain.post("/invocations", content=body, headers={"content-type": "application/jsonlines", "accept": "application/jsonlines"}).text
            rows = [json.loads(line) for line in told.splitlines()]
            return {n: [np.reshape(np.float32(row[n]), (-1, 4) if n == "boxes" else -1) for row in rows] if n in RAGGED else np.array([row[n] for row in rows]) for n in OUTPUTS}
        def remote(image):
            tensor = triton.InferInput("image", image.shape, "FP32")
            tensor.set_data_from_numpy(image)
            told = stub.infer("detector", [tensor])
            return by_row({n: told.as_numpy(n) for n in OUTPUTS})
        ways = [lambda image: client.predict({"image": image}), lambda image: client.infer({"image": image}, binary=True), lambda image: client.infer({"image": image}, binary=False),
                lambda image: lists("/predict", "outputs", json={"inputs": image.tolist()}), lambda image: lists("/v1/models/detector:predict", "predictions", json={"instances": image.tolist()}),
                lambda image: lists("/invocations", "predictions", json={"inputs": image.tolist()}), lines, remote]

        def ask(way, each):
            image = pictures(*each)["image"]
            same(way(image), image)
        with ThreadPoolExecutor(8) as clients:
            list(clients.map(ask, *zip(*list(itertools.product(ways, EACH)) * 3)))
        assert plain.get("/v2/models/detector").json()["outputs"][0] == {"name": "boxes", "datatype": "FP32", "shape": [-1, 4], "parameters": {"ragged": "counts"}}
        assert plain.get("/v2/models/detector/config").json()["max_batch_size"] == 0
        refused = plain.post("/invocations", json={"inputs": EXAMPLE["image"].tolist()}, headers={"accept": "text/csv"})
        assert refused.status_code == 400 and "no form in CSV" in refused.json()["error"]
        schema = plain.get("/openapi.json").json()["paths"]["/predict"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        boxes = schema["properties"]["outputs"]["properties"]["boxes"]
        assert boxes["items"]["items"] == {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4} and "minItems" not in boxes["items"]
        found = compare_server(client, ragged, read_holdout(beside(ragged.path), ragged.digest)[0], "cpu", read_target({"counts": np.array([1, 0, 2, 1] * 2)}, np.array([1, 0, 2, 1] * 2)))
        assert found["golden"]["max_abs"] < 1e-5 and found["holdout"]["max_abs"] < 1e-5 and found["metrics"]["accuracy"]["container"] == 1


def test_A2_a_client_that_chooses_boxes_alone_has_those_of_each_picture(ragged):
    "Three boxes in three pictures, which are no row for each"
    with serve_local(ragged.path) as url, Client(url) as client:
        for names in (["scores"], ["scores", "boxes"], ["counts", "boxes"], ["counts"]):
            alone, whole = (client.infer({"image": EXAMPLE["image"]}, outputs=some) for some in (names, ()))
            assert list(alone) == names and all(np.array_equal(joined(alone)[n], joined(whole)[n]) for n in names), "its own lists, without the counts that nobody asked for"
            assert all(len(alone[n]) == 3 and isinstance(alone[n], list) == (n in RAGGED) for n in names)


def test_held_back_rows_are_kept_and_what_is_ragged_is_no_output_of_labels(ragged):
    groups, _ = read_holdout(beside(ragged.path), ragged.digest)
    assert list(groups["outputs"]) == ["counts"] and len(held_outputs(groups)["boxes"]) == 8, "as many boxes as pictures"
    checked = ragged.check(Detector().eval(), pictures([A, B], [], [D]))
    assert checked.passed and "3 rows, largest difference" in str(checked)
    more = held_outputs(groups) | {"counts": np.array([2, 0, 1, 1] + [1, 0, 2, 1])}
    from mlserve.package.trial.agreement import Agreement
    differs = Agreement(held_outputs(groups), more, ragged)
    assert not differs.passed and "row 0 has 2 of boxes and scores, expected 1" in differs.result.where
    assert np.isinf(differs.shares[[0, 2]]).all() and not differs.shares[[1, 3]].any()


class Miscounted(Detector):
    "It counts before it drops what is hidden"
    def forward(self, image):
        boxes, scores, _ = super().forward(image)
        return boxes, scores, (self.light(image) > 0.7).flatten(1).sum(1)


class Ranked(Detector):
    "The best of all pictures first"
    def forward(self, image):
        boxes, scores, counts = super().forward(image)
        best = scores.argsort(descending=True, stable=True)
        return boxes[best], scores[best], counts


def test_A2_counts_that_do_not_hold_are_refused(tmp_path):
    for example in (EXAMPLE, pictures([], [])):  # in which nothing is found, and which proves nothing of the counts
        with pytest.raises(UsageError, match="'counts' counts .* and there are"):
            save_package(Miscounted().eval(), tmp_path / "p", "detector", example, OUTPUTS, ragged=RAGGED)


def test_A2_boxes_in_another_order_than_their_pictures_are_refused(tmp_path):
    with pytest.raises(CheckFailed, match="depends on the rows beside it"):
        save_package(Ranked().eval(), tmp_path / "p", "detector", pictures([B], [C, A], [D]), OUTPUTS, ragged=RAGGED)


def test_A2_an_answer_that_is_counted_wrongly_reaches_nobody(ragged):
    life, _ = load_here(ragged)
    good = life.batcher.predict
    life.batcher.predict = lambda arrays: (told := good(arrays)) | {"counts": np.roll(told["counts"], 1) + (np.arange(len(told["counts"])) == 0)}
    with pytest.raises(ModelFailed, match="counts wrongly"):
        submitted(life, pictures([A], [A, B]), pictures([C]))


def test_E1_a_request_that_is_counted_wrongly_fails_alone(ragged):
    "Some pictures are more than the model can count; it counts those beside them rightly, and the server stays ready"
    life, _ = load_here(ragged)
    good, asked = life.batcher.predict, [pictures(*each) for each in ([[A], [B, C]], [[]], [[D], [A]], [[B]])]
    asked[2]["image"][0, 0, 0, 0] = 7
    life.batcher.predict = lambda arrays: (told := good(arrays)) | {"counts": told["counts"] + (arrays["image"][:, 0, 0, 0] == 7)}
    told = submitted(life, *asked, failures=True)
    assert [isinstance(one, ModelFailed) for one in told] == [False, False, True, False]
    for i in (0, 1, 3):
        same(by_row(told[i]), asked[i]["image"])
    assert "counts wrongly" in told[2].message and life.batcher.broken is None


def test_a_package_says_truly_what_counts(ragged, tmp_path):
    from mlserve.package.mlmodel import parse_mlmodel
    text = (ragged.path / "MLmodel").read_text()
    for wrong in ('"ragged": "boxes"', '"ragged": "number"', '"ragged": 1'):
        with pytest.raises(IntegrityError, match="'outputs'"):
            parse_mlmodel(text.replace('"ragged": "counts"', wrong).encode())


@pytest.mark.parametrize("each", [[[], []], [[A], [B]]], ids=["nothing", "one each"])
def test_what_is_found_by_chance_in_the_example_changes_nothing(each, tmp_path):
    saved = save_package(Detector().eval(), tmp_path / "p", "detector", pictures(*each), OUTPUTS, ragged=RAGGED)
    assert golden(load_package(saved.path))[1]["boxes"].shape == (sum(map(len, each)), 4)
    life, _ = load_here(saved)
    images = pictures([A, C], [], [B])["image"]
    same(by_row(submitted(life, {"image": images})[0]), images)


class Two(torch.nn.Module):
    "What is above zero in each row, and what is below: two kinds of things, each with counts of its own; of any length"
    def forward(self, x):
        return x[x > 0], (x > 0).sum(1), x[x < 0], (x < 0).sum(1, dtype=torch.int32), x.sum(1)


def test_each_ragged_output_has_its_own_counts_and_sizes_may_vary(tmp_path):
    rows = np.random.default_rng(0).normal(size=(5, 6)).round(2)
    saved = save_package(Two(), tmp_path / "p", "two", [{"x": rows}, {"x": rows[:2, :4]}], ["up", "ups", "down", "downs", "sum"], ragged={"up": "ups", "down": "downs"})
    assert [s.datatype for s in saved.outputs] == ["FP64", "INT64", "FP64", "INT32", "FP64"] and saved.inputs[0].free
    life, _ = load_here(saved)
    for given, told in zip((rows, rows[3:]), submitted(life, {"x": rows}, {"x": rows[3:]})):
        assert told["up"].tolist() == given[given > 0].tolist() and told["downs"].tolist() == (given < 0).sum(1).tolist()


def test_rows_that_belong_together_are_counted_too(tmp_path):
    saved = save_package(Ranked().eval(), tmp_path / "p", "detector", EXAMPLE, OUTPUTS, ragged=RAGGED, batch=False)
    life, _ = load_here(saved)
    told = submitted(life, EXAMPLE, pictures([A, B, C]))
    assert [t["counts"].tolist() for t in told] == [[2, 1, 0], [3]]


def test_an_onnx_file_that_ends_in_non_maximum_suppression(tmp_path):
    "Its first column is the picture; the lines of the tutorial make counts of it"
    exec(PAGE["6e7c2a00"] + "\n" + PAGE["6e7c2a01"], page := {})
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in (("boxes", ["n", 6, 4]), ("scores", ["n", 1, 6]))]
    limits = [helper.make_tensor("most", TensorProto.INT64, [1], [6]), *(helper.make_tensor(n, TensorProto.FLOAT, [1], [0.5]) for n in ("overlap", "least"))]
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "overlap", "least"], ["selected"])
    graph = helper.make_graph([node], "nms", tensors, [helper.make_tensor_value_info("selected", TensorProto.INT64, ["k", 3])], limits)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "nms.onnx")
    page["counted"](tmp_path / "nms.onnx", tmp_path / "m.onnx")
    random = np.random.default_rng(0)
    corners = random.random((7, 6, 2), np.float32) * 4
    asked = {"boxes": np.concatenate([corners, corners + 1], 2), "scores": random.random((7, 1, 6), np.float32)}
    asked["scores"][2] /= 9  # nothing in this picture
    names = ["found", "classes", "counts"]
    saved = save_package(tmp_path / "m.onnx", tmp_path / "p", "nms", asked, names, ragged={"found": "counts", "classes": "counts"})
    alone = [load_program(saved).run({n: a[i:i + 1] for n, a in asked.items()}, names) for i in range(7)]
    counts = [int(one["counts"][0]) for one in alone]
    assert counts[2] == 0 and len(set(counts)) > 2
    life, _ = load_here(saved)
    requests = [{n: a[some] for n, a in asked.items()} for some in ([0, 2], [1], [2], [3, 4, 5, 6, 2])]
    for some, told in zip(([0, 2], [1], [2], [3, 4, 5, 6, 2]), submitted(life, *requests)):
        assert told["counts"].tolist() == [counts[i] for i in some]
        assert (told["found"] == np.concatenate([alone[i]["found"] for i in some])).all()


class Tall:
    "A class of Python that answers any number for each row"
    classes_ = None

    def predict(self, x):
        return {"tall": x[x > 1], "counts": (x > 1).sum(1)}


def test_python_weights_and_pyfunc_give_each_row_its_own(tmp_path):
    import mlflow.pyfunc
    rows = np.float32([[1, 2, 3], [0, 0, 0], [5, 0, 0]])
    (tmp_path / "handler.py").write_text("class Tall:\n    def __init__(self, files=None): pass\n    def predict(self, x):\n        return {'tall': x[x > 1], 'counts': (x > 1).sum(1)}\n")
    saved = save_package(Tall(), tmp_path / "p", "tall", {"x": rows}, ["tall", "counts"], "python", handler=tmp_path / "handler.py", ragged={"tall": "counts"})
    told = mlflow.pyfunc.load_model(str(saved.path)).predict({"x": rows})
    assert [one.tolist() for one in told["tall"]] == [[2, 3], [], [5]]
    assert joined(told)["tall"].tolist() == [2, 3, 5]


def test_what_nobody_has_tried_is_refused(tmp_path):
    import pandas as pd
    from sklearn.linear_model import LogisticRegression
    frame = pd.DataFrame({"a": [0.0, 1, 2, 3]})
    for model, given, more in ((Detector().eval(), EXAMPLE, {"batch_axis": {"image": 1}}), (Detector().eval(), EXAMPLE, {"dtype": "float16"}), (LogisticRegression().fit(frame, [0, 0, 1, 1]), frame, {})):
        with pytest.raises(UsageError, match="with which it is not served") as e:
            save_package(model, tmp_path / "p", "detector", given, OUTPUTS, ragged=RAGGED, **more)
        assert "Detectors has the lines" in e.value.mend
