"""Sizes that vary: texts of any length and images of any size are proved at several, bounded, and served as if each were alone."""
import json

import numpy as np
import pytest
import torch
from test_invariance import load_here, submitted
from torch import nn

from mlserve.errors import CheckFailed, InvalidInput, Refused, UsageError
from mlserve.package.holdout import beside, read_holdout
from mlserve.package import golden_pairs, load_package, load_program, save_package
from mlserve.release.check.comparison import compare_server
from mlserve.serving.batching.scheduler import Batcher
from mlserve.wire.predict import decode_predict
from mlserve.wire.v2 import decode_infer


class Encoder(nn.Module):
    "One layer of a transformer on tokens and a mask; position embeddings end at 48"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(50, 8, padding_idx=0), nn.Embedding(48, 8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def tokens(self, ids, mask):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        score = self.q(x) @ self.k(x).transpose(1, 2) / 8**0.5
        return x + torch.softmax(score + (mask[:, None, :] == 0) * -1e9, -1) @ self.v(x)

    def forward(self, ids, mask):
        x, seen = self.tokens(ids, mask), mask[..., None]
        return self.out((x * seen).sum(1) / seen.sum(1).clamp(min=1)), self.out(x)


class Pooled(nn.Module):
    "A convolution and a mean over the picture, which needs five pixels each way"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(3, 4, 5, stride=2), nn.Linear(4, 2)

    def forward(self, image):
        x = self.conv(image).relu()
        return self.out(x.mean((2, 3))), x


class Frozen(Encoder):
    "Python takes the length of the example into the trace"
    def forward(self, ids, mask):
        return self.words(ids).sum(1) / int(ids.shape[1])


class Unmasked(Encoder):
    "Averages what was filled in as well"
    def forward(self, ids, mask):
        return self.out(self.words(ids) + 1).mean(1)


def texts(rows, length, seed=0):
    random = np.random.default_rng(seed)
    mask = (np.arange(length) < random.integers(length // 2 + 1, length + 1, (rows, 1))).astype(np.int64)
    return {"ids": random.integers(1, 50, (rows, length)) * mask, "mask": mask}


def saved(folder, format=None, model=Encoder, outputs=("label", "each"), **more):
    given = {"padding": {"ids": 0, "mask": 0}} | more
    return save_package(model(), folder / "text", "text", [texts(4, 12), texts(3, 7, 1)], list(outputs), format, **given)


def watched(life):
    "The shapes of the calls that a model gets, from a batcher that takes all that came together, however quick the machine is"
    calls, forward = [], life.model.forward
    life.batcher = Batcher(lambda arrays: (calls.append(arrays["ids"].shape), forward(arrays))[1], 32, inline=True, padding=life.batcher.padding)
    return calls


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return {format: saved(tmp_path_factory.mktemp(format), format) for format in ("torchscript", "export", "onnx")}


@pytest.mark.parametrize("format", ["torchscript", "export", "onnx"])
def test_A1_a_text_of_any_length_is_answered_as_by_the_live_model(packages, format):
    package, live = packages[format], Encoder().eval()
    assert [s.shape for s in (*package.inputs, *package.outputs)] == [(-1, -1), (-1, -1), (-1, 8), (-1, -1, 8)]
    assert str(package.inputs[0].free[1]) == "length 1–48" and package.outputs[1].free[1].name == "length"
    assert [len(given["ids"][0]) for given, _ in golden_pairs(package)] == [12, 7, 1, 48]
    program = load_program(package)
    for length in (1, 2, 5, 31, 48):
        given = texts(3, length, length)
        expected = live(*map(torch.from_numpy, given.values()))
        for got, want in zip(program.run(given, ["label", "each"]).values(), expected):
            assert np.abs(got - want.detach().numpy()).max() < 1e-5


def test_A1_a_length_that_a_trace_took_from_the_example_is_refused(tmp_path):
    with pytest.raises(CheckFailed, match="otherwise than the live model at length 7"):
        saved(tmp_path, model=Frozen, outputs=["y"], padding=None)


def test_A1_an_export_whose_code_fixes_a_length_is_refused(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.sum(1) if x.shape[1] == 6 else x.sum(1) * 2
    with pytest.raises((Refused, CheckFailed)):
        save_package(Fixed(), tmp_path / "fixed", "fixed", [{"x": torch.rand(2, 6)}, {"x": torch.rand(2, 4)}], ["y"], "export")


def test_A2_padding_that_changes_an_answer_is_refused(tmp_path):
    with pytest.raises(CheckFailed, match="Padded to length 48, rows of length 12 are answered otherwise than alone"):
        saved(tmp_path, model=Unmasked, outputs=["y"])


def test_A2_requests_of_unequal_length_share_a_call_and_each_is_answered_as_alone(packages):
    (life, _), live = load_here(packages["torchscript"]), Encoder().eval()
    calls = watched(life)
    requests = [texts(1, length, length) for length in (9, 12, 16, 30, 10, 3)]
    for given, got in zip(requests, submitted(life, *requests)):
        label, each = (t.detach().numpy() for t in live(*map(torch.from_numpy, given.values())))
        assert np.abs(got["label"] - label).max() < 1e-5 and np.abs(got["each"] - each).max() < 1e-5
    assert sorted(calls) == [(1, 3), (1, 30), (4, 16)]


def test_requests_are_batched_by_length_without_padding(tmp_path):
    life, _ = load_here(saved(tmp_path, padding=None))
    calls = watched(life)
    submitted(life, *(texts(1, length, length) for length in (9, 12, 9, 12)))
    assert sorted(calls) == [(2, 9), (2, 12)]


def test_the_wire_bounds_a_size_and_holds_inputs_to_one_length(packages):
    specs, outputs = packages["torchscript"].inputs, packages["torchscript"].outputs
    ones = {"ids": [[1] * 5], "mask": [[1] * 5]}
    assert decode_predict(json.dumps({"inputs": ones}).encode(), specs).inputs["ids"].shape == (1, 5)
    for given, words in (({"ids": [[1] * 49], "mask": [[1] * 49]}, "length 49; allowed are 1 to 48"), (ones | {"mask": [[1] * 4]}, "the same in all")):
        with pytest.raises(InvalidInput, match=words):
            decode_predict(json.dumps({"inputs": given}).encode(), specs)
        entries = [{"name": n, "datatype": "INT64", "shape": [1, len(v[0])], "data": v[0]} for n, v in given.items()]
        with pytest.raises(InvalidInput, match=words):
            decode_infer(json.dumps({"inputs": entries}).encode(), specs, outputs)


def test_a_served_text_says_its_sizes_and_refuses_what_is_longer(packages, tmp_path):
    import httpx
    server = packages["onnx"].serve()
    try:
        meta = httpx.get(f"{server.url}/v2/models/text").json()
        assert meta["inputs"][0]["shape"] == [-1, -1] and meta["inputs"][0]["parameters"] == {"sizes": "length 1–48"}
        for length in (2, 17):
            given = texts(2, length, length)
            answer = httpx.post(f"{server.url}/predict", json={"inputs": {n: a.tolist() for n, a in given.items()}}).json()["outputs"]
            expected = Encoder().eval()(*map(torch.from_numpy, given.values()))
            assert np.abs(np.array(answer["each"]) - expected[1].detach().numpy()).max() < 1e-5
        long = httpx.post(f"{server.url}/predict", json={"inputs": {n: a.tolist() for n, a in texts(1, 49).items()}})
        assert long.status_code == 400 and "allowed are 1 to 48" in long.text
        assert "length 1–48" in httpx.get(f"{server.url}/openapi.json").text
    finally:
        server.stop()


@pytest.mark.parametrize("format", ["torchscript", "export", "onnx"])
def test_an_image_of_any_size_is_answered_as_by_the_live_model(format, tmp_path):
    images = [{"image": torch.rand(2, 3, *size)} for size in ((16, 16), (9, 14))]
    package = save_package(Pooled(), tmp_path / "image", "image", images, ["scores", "map"], format)
    assert str(package.inputs[0].free) and [str(size) for size in package.inputs[0].free.values()] == ["height 9–64", "width 14–64"]
    assert package.outputs[1].shape == (-1, 4, -1, -1) and not package.outputs[1].free
    given = np.random.rand(2, 3, 33, 20).astype("f4")
    expected = Pooled().eval()(torch.from_numpy(given))[1].detach().numpy()
    assert np.abs(load_program(package).run({"image": given}, ["scores", "map"])["map"] - expected).max() < 1e-5


def test_a_package_stays_what_it_was_and_proves_itself(packages):
    package = packages["torchscript"]
    assert load_package(package.path, package.digest) == package and package.padding == {"ids": 0, "mask": 0}
    proofs = package.check(Encoder())
    assert proofs.passed, proofs
    assert {"golden rows, length 7", "golden rows, length 1", "golden rows, length 48"} <= {proof.name for proof in proofs}


@pytest.mark.parametrize("more, words", [({"dynamic": {"ids": {1: "length"}}}, "does not name"),
                                         ({"dynamic": {"ids": {1: ("length", 64)}, "mask": {1: "length"}}}, "does not answer length 64"),
                                         ({"padding": {"ids": 0}}, "each input that varies: ids, mask"),
                                         ({"padding": {"ids": 0.5, "mask": 0}}, "a number that int64 holds"),
                                         ({"batch": False}, "batch=False")])
def test_sizes_that_cannot_be_meant_are_refused(more, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        saved(tmp_path, **more)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    "A package with held-back rows of unequal lengths, and the rows"
    rows = [texts(1, length, length) for length in (3, 9, 3, 48, 20, 9)]
    return saved(tmp_path_factory.mktemp("held"), holdout=(rows, np.arange(6) % 2)), rows


def test_A1_held_back_rows_of_unequal_lengths_are_answered_each_at_its_own(held):
    package, rows = held
    groups, _ = read_holdout(beside(package.path), package.digest)
    assert groups["inputs"]["ids"].shape == (6, 48) and groups["sizes"]["length"].tolist() == [3, 9, 3, 48, 20, 9]
    for i, given in enumerate(rows):
        label, each = Encoder().eval()(*map(torch.from_numpy, given.values()))
        assert np.abs(groups["outputs"]["label"][i] - label[0].detach().numpy()).max() < 1e-5
        assert np.abs(groups["outputs"]["each"][i, :each.shape[1]] - each[0].detach().numpy()).max() < 1e-5
    assert [proof for proof in package.check() if proof.name == "held-back rows" and "6 rows" in proof.found]


def test_a_server_is_compared_at_every_size(held):
    package, _ = held
    server = package.serve()
    try:
        found = compare_server(server._client, package, read_holdout(beside(package.path), package.digest)[0], "cpu")
        assert found["rows"] == 6 and found["holdout"]["max_abs"] < 1e-5
    finally:
        server.stop()
