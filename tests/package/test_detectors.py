"""Detectors: what finds any number of things in a row is refused as it is, and right when it is filled up, over every wire and in every company."""
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
import torch
import tritonclient.grpc as triton
from onnx import TensorProto, helper
from test_invariance import load_here, submitted

from mlserve.client import Client
from mlserve.errors import UsageError
from mlserve.package import load_program, save_package
from mlserve.package.trial.process import free_port
from mlserve.serving.server import serve_local

TUTORIAL = Path(__file__).parents[2] / "nbs/tutorials/detectors.ipynb"
PAGE = {cell["id"]: "".join(cell["source"]) for cell in json.loads(TUTORIAL.read_text())["cells"]}
space: dict = {"__name__": "detectors"}
for part in ("6e7c0a03", "6e7c0a05", "6e7c0a06", "6e7c0a10"):  # what the reader is given
    exec(PAGE[part], space)
Detector, Filled, filled, pictures = (space[name] for name in ("Detector", "Filled", "filled", "pictures"))
A, B, C, D = (4, 4), (4, 11), (11, 8), (12, 3)
OUTPUTS = ["boxes", "scores", "counts"]
EXAMPLE = pictures([A, B], [C], [])


class AtLeastOne(torch.nn.Module):
    "Finds what is above zero, and the first value in any case"
    def forward(self, x):
        keep = (x > 0) | (torch.arange(3) == 0)
        return x[keep], keep.sum(1)


def expected(images, most=4):
    with torch.inference_mode():
        return {n: t.numpy() for n, t in zip(OUTPUTS, Filled(Detector().eval(), most)(torch.from_numpy(images)))}


def same(told, images):
    for name, want in expected(images).items():
        assert told[name].shape == want.shape and np.abs(told[name] - want).max(initial=0) < 1e-5, name


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    (folder / "handler.py").write_text(PAGE["6e7c0a13"].split("'''")[1])
    return save_package(Filled(Detector().eval(), 4), folder / "p", "detector", EXAMPLE, OUTPUTS, handler=folder / "handler.py")


@pytest.mark.parametrize("each", [([A, B], [C], []), ([A], [C]), ([A],)], ids=["two one none", "one each", "one picture"])
def test_A2_boxes_that_are_as_many_as_pictures_are_no_rows(each, tmp_path):
    with pytest.raises(UsageError, match=r"'counts' adds up to \d: it counts what belongs to each row") as e:
        save_package(Detector().eval(), tmp_path / "p", "detector", pictures(*each), OUTPUTS)
    assert "Detectors has the lines" in e.value.mend and not (tmp_path / "p").exists()


def test_A2_every_batch_that_is_tried_is_counted(tmp_path):
    "With `batch=False` nothing is asked beside other rows, and the example has as many as it has rows"
    with pytest.raises(UsageError, match="gave 6 rows of 'found' for a batch of 2"):
        save_package(AtLeastOne(), tmp_path / "p", "things", {"x": np.float32([[1, -1, -1], [2, -1, -1]])}, ["found", "counts"], batch=False)


def test_boxes_of_an_onnx_file_are_no_rows(tmp_path):
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in (("boxes", ["n", 3, 4]), ("scores", ["n", 1, 3]))]
    limits = [helper.make_tensor("most", TensorProto.INT64, [1], [3]), helper.make_tensor("overlap", TensorProto.FLOAT, [1], [0.5])]
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "overlap"], ["selected"])
    graph = helper.make_graph([node], "nms", tensors, [helper.make_tensor_value_info("selected", TensorProto.INT64, ["k", 3])], limits)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    boxes = np.tile(np.float32([0, 0, 1, 1]), (2, 3, 1))  # all in one place, so that one is left in each row
    for given in (boxes, boxes + np.float32([[[0] * 4], [[5] * 4], [[9] * 4]]).reshape(1, 3, 4)):
        with pytest.raises(UsageError, match="rows of 'selected' for a batch"):
            save_package(tmp_path / "m.onnx", tmp_path / "p", "nms", {"boxes": given, "scores": np.float32([[[0.9, 0.8, 0.7]]] * 2)}, ["selected"])


def test_what_is_over_the_number_is_cut_and_what_is_missing_is_zero():
    told = expected(pictures([], [A, B, C], [], [D])["image"], most=2)
    assert told["counts"].tolist() == [0, 2, 0, 1] and told["boxes"].shape == (4, 2, 4)
    assert not told["boxes"][[0, 2]].any() and not told["boxes"][3, 1].any() and told["boxes"][1].any(1).all()
    assert not expected(pictures([], [])["image"])["boxes"].any()


def test_a_filled_detector_is_saved_as_onnx(tmp_path):
    saved = save_package(Filled(Detector().eval(), 4), tmp_path / "p", "detector", EXAMPLE, OUTPUTS, "onnx")
    images = pictures([D], [], [A, B, D], [])["image"]
    same(load_program(saved).run({"image": images}, OUTPUTS), images)


def test_an_example_in_which_nothing_is_found_is_saved_and_served(tmp_path):
    life, _ = load_here(save_package(Filled(Detector().eval(), 4), tmp_path / "p", "detector", pictures([], []), OUTPUTS))
    image = pictures([A, C])["image"]
    same(submitted(life, {"image": image})[0], image)


def test_pictures_of_several_clients_share_a_call_and_each_has_its_own_boxes(package):
    life, _ = load_here(package)
    asked = [pictures(*each)["image"] for each in ([[A]], [[]], [[A, B], [C]], [[D], [], [A, C, D]], [[]] * 40, [[B, C]])]
    for image, told in zip(asked, submitted(life, *({"image": image} for image in asked))):
        same(told, image)


def test_a_detector_is_answered_over_every_wire_to_clients_at_once(package):
    each = [[[A]], [[], [A, B]], [[C], [], [A, B, C]], [[]]]
    port = free_port()
    with serve_local(package.path, grpc_port=port) as url, Client(url) as client, triton.InferenceServerClient(f"127.0.0.1:{port}") as stub, httpx.Client(base_url=url, trust_env=False) as plain:
        def rows(image):
            told = plain.post("/v1/models/detector:predict", json={"instances": image.tolist()}).json()["predictions"]
            return {n: np.array([row[n] for row in told]) for n in OUTPUTS}
        def remote(image):
            tensor = triton.InferInput("image", image.shape, "FP32")
            tensor.set_data_from_numpy(image)
            told = stub.infer("detector", [tensor])
            return {n: told.as_numpy(n) for n in OUTPUTS}
        ways = [client.predict, lambda given: client.infer(given, binary=True), lambda given: client.infer(given, binary=False), lambda given: rows(given["image"]), lambda given: remote(given["image"])]

        def ask(i):
            image = pictures(*each[i % 4])["image"]
            same(ways[i // 4 % 5]({"image": image}), image)
        with ThreadPoolExecutor(8) as clients:
            list(clients.map(ask, range(80)))
        lists = plain.post("/handle", json=pictures([C], [], [A, B])["image"][:, 0].tolist()).json()
        assert [len(found) for found in lists] == [1, 0, 2] and lists[0][0]["corners"] == [6, 9, 11, 14]
        csv = plain.post("/invocations", content=b"1,2\n", headers={"content-type": "text/csv"})
        assert csv.status_code == 400, csv.text
