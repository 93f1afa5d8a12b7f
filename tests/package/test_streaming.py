"""A model that carries state: its batch is not first, a request has one sampling rate, and two clients never see each other's stream."""
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_invariance import load_here, submitted

from mlserve.client import Client
from mlserve.errors import CheckFailed, InvalidInput, UsageError
from mlserve.package import golden, load_program, save_package
from mlserve.serving.server import serve_local

AXES = {"state": 1, "next_state": 1, "sr": None}
OUTPUTS = ["speech", "next_state"]


class Voice(torch.nn.Module):
    "An LSTM of two layers, as a voice-activity model has it: a chunk, the state `[2, batch, 8]`, a sampling rate"

    def __init__(self):
        super().__init__()
        self.cell, self.head = torch.nn.LSTM(16, 4, 2), torch.nn.Linear(4, 1)

    def forward(self, chunk: torch.Tensor, state: torch.Tensor, sr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, memory = state.chunk(2, 2)
        out, (hidden, memory) = self.cell((chunk / torch.where(sr == 16000, 1.0, 2.0)).unsqueeze(0), (hidden.contiguous(), memory.contiguous()))
        return torch.sigmoid(self.head(out[0])), torch.cat((hidden, memory), 2)


class Choosing(Voice):
    "The same, which decides by a number"

    def forward(self, chunk: torch.Tensor, state: torch.Tensor, sr: int) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, memory = state.chunk(2, 2)
        if sr != 16000:
            chunk = chunk / 2
        out, (hidden, memory) = self.cell(chunk.unsqueeze(0), (hidden.contiguous(), memory.contiguous()))
        return torch.sigmoid(self.head(out[0])), torch.cat((hidden, memory), 2)


def voice(cls=Voice):
    torch.manual_seed(0)
    return cls().eval()


def example(rows=4):
    random = np.random.default_rng(0)
    return {"chunk": random.normal(size=(rows, 16)).astype("f4"), "state": random.normal(size=(2, rows, 8)).astype("f4"), "sr": 16000}


def alone(model, chunk, state, sr):
    "What the original answers, in its own shapes"
    with torch.inference_mode():
        return [t.numpy() for t in model(torch.from_numpy(chunk), torch.from_numpy(state), sr)]


def save(model, path, **more):
    return save_package(model, path, name="voice", inputs=example(), outputs=OUTPUTS, **({"batch_axis": AXES} | more))


def stream(url, model, binary, chunks=50, exact=True):
    "Two clients in turn, each with its own state and rate, beside the original alone"
    random = np.random.default_rng(1)
    states = {sr: np.zeros((1, 2, 8), "f4") for sr in (16000, 8000)}
    with Client(url) as client:
        for _ in range(chunks):
            for sr, state in states.items():
                chunk = random.normal(size=(1, 16)).astype("f4")
                given = {"chunk": chunk, "state": state, "sr": sr}
                told = client.infer(given, binary=True) if binary else client.predict(given)
                speech, after = alone(model, chunk, np.moveaxis(state, 0, 1).copy(), torch.tensor(sr))
                compared = np.array_equal if exact else lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-5)
                assert compared(told["speech"], speech) and compared(told["next_state"], np.moveaxis(after, 1, 0))
                states[sr] = told["next_state"]
    assert not np.array_equal(*states.values())


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_two_streams_keep_their_own_state_and_rate(format, tmp_path):
    model = voice()
    package = save(model, tmp_path / "p", format=format)
    assert [str(s) for s in package.inputs] == ["chunk FP32 [n, 16]", "state FP32 [n, 2, 8]", "sr INT64 [n], one value a request"]
    with serve_local(package.path) as url:
        for binary in (False, True):
            stream(url, model, binary, exact=format == "torchscript")
        with Client(url) as client:
            assert client.metadata()["inputs"][2]["parameters"] == {"shared": True}
            arrays, _ = golden(package)
            with pytest.raises(InvalidInput, match="several values in one request"):
                client.infer(arrays | {"sr": np.array([16000, 16000, 8000, 16000])})
            with pytest.raises(InvalidInput, match="several values in one request"):
                client.predict(arrays | {"sr": np.array([16000, 16000, 8000, 16000])})


@pytest.mark.parametrize("file", [False, True], ids=["live", "file"])
def test_a_script_that_decides_by_a_number_is_saved_whole(file, tmp_path):
    script = torch.jit.script(voice(Choosing))
    given = script
    if file:
        torch.jit.save(script, tmp_path / "voice.pt")
        given = tmp_path / "voice.pt"
    program = load_program(save(given, tmp_path / "p", format="torchscript"))
    for rows, sr in ((1, 16000), (2, 8000), (5, 16000)):
        arrays = example(rows)
        expected = alone(script, arrays["chunk"], arrays["state"], sr)
        told = program.run({"chunk": arrays["chunk"], "state": np.moveaxis(arrays["state"], 1, 0), "sr": np.full(rows, sr)}, OUTPUTS)
        assert np.array_equal(told["speech"], expected[0]) and np.array_equal(told["next_state"], np.moveaxis(expected[1], 1, 0))


@pytest.mark.parametrize("file", [False, True], ids=["live", "file"])
def test_V3_a_number_with_a_fraction_is_no_int(file, tmp_path):
    given = torch.jit.script(voice(Choosing))
    if file:
        torch.jit.save(given, tmp_path / "voice.pt")
        given = tmp_path / "voice.pt"
    with pytest.raises(UsageError, match="forward takes 'sr' as int; the example of 'sr' is float64, of which the fraction would be cut"):
        save_package(given, tmp_path / "p", "voice", example() | {"sr": 2.7}, OUTPUTS, batch_axis=AXES)


def test_a_size_that_varies_is_counted_with_the_rows_first(tmp_path):
    given = {"x": np.ones((4, 3), "f4"), "state": np.random.default_rng(0).normal(size=(2, 4, 3)).astype("f4")}
    axes = {"state": 1, "next_state": 1}
    with pytest.raises(UsageError, match="dimension 3 of 'state'; allowed are 1 to 2, as 0 is the batch: dynamic counts with the rows first"):
        save_package(Blended(), tmp_path / "p", "m", given, OUTPUTS, batch_axis=axes, dynamic={"state": {3: "width"}})


def test_batch_axis_of_a_table_is_refused_with_what_it_is_for(tmp_path):
    import pandas as pd
    from sklearn.linear_model import LinearRegression
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0, 4.0]})
    with pytest.raises(UsageError, match="batch_axis is given with a table, whose rows come first; it is for modules of torch"):
        save_package(LinearRegression().fit(frame, frame["a"]), tmp_path / "p", "line", frame, batch_axis={"a": 1})


def graph_file(path, rank=True, default=False):
    "A graph with a state, whose rank it may not tell, and which may have a default"
    import onnx
    from onnx import helper as h
    def value(name, shape):
        return h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    constants = [onnx.numpy_helper.from_array(np.array([0]), "first")] + [onnx.numpy_helper.from_array(np.zeros((2, 1, 3), "f4"), "state")] * default
    nodes = [h.make_node("Mul", ["state", "state"], ["next_state"]), h.make_node("ReduceSum", ["next_state", "first"], ["sum"], keepdims=0), h.make_node("Add", ["sum", "x"], ["speech"])]
    graph = h.make_graph(nodes, "g", [value("x", ["n", 3]), value("state", [2, "n", 3] if rank else None)], [value("speech", ["n", 3]), value("next_state", [2, "n", 3])], constants)
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_graph_that_tells_no_rank_is_refused_and_a_default_goes_with_what_is_moved(tmp_path):
    given = {"x": np.ones((4, 3), "f4"), "state": np.random.default_rng(0).normal(size=(2, 4, 3)).astype("f4")}
    axes = {"state": 1, "next_state": 1}
    with pytest.raises(UsageError, match="the graph does not say how many dimensions it has"):
        save_package(graph_file(tmp_path / "loose.onnx", rank=False), tmp_path / "p", "m", given, OUTPUTS, batch_axis=axes)
    package = save_package(graph_file(tmp_path / "default.onnx", default=True), tmp_path / "p", "m", given, OUTPUTS, batch_axis=axes)
    got = load_program(package).run({"x": given["x"], "state": given["state"].swapaxes(0, 1).copy()}, OUTPUTS)
    assert np.array_equal(got["next_state"].swapaxes(0, 1), given["state"] ** 2)


class Mixed(torch.nn.Module):
    "Its state has the batch second, and nothing that would complain of another order"

    def forward(self, chunk, state):
        state = state * 0.5 + chunk.mean()
        return chunk + state.sum(0), state


def test_A2_a_state_whose_batch_nobody_declared_is_refused(tmp_path):
    given = {"chunk": np.ones((2, 3), "f4"), "state": np.random.default_rng(0).normal(size=(2, 2, 3)).astype("f4")}
    with pytest.raises((CheckFailed, UsageError), match="Nothing was saved|another batch size"):
        save_package(Mixed(), tmp_path / "p", name="mixed", inputs=given, outputs=OUTPUTS)
    with pytest.raises(UsageError, match="differ in rows") as e:
        save_package(voice(), tmp_path / "p", name="mixed", inputs=example() | {"sr": np.full(4, 16000)}, outputs=OUTPUTS)
    assert e.value.mend == "If the batch is dimension 1 of 'state', say batch_axis={'state': 1}."
    with pytest.raises(UsageError, match="'sr' is a single value") as e:
        save(voice(), tmp_path / "p", batch_axis={"state": 1})
    assert "batch_axis={'sr': None}" in e.value.mend
    with pytest.raises(UsageError, match="gave 2 rows of 'next_state'") as e:
        save(voice(), tmp_path / "p", batch_axis={"state": 1, "sr": None})
    assert "batch_axis={'next_state': 1}" in e.value.mend


class Blended(torch.nn.Module):
    "One stream's state leaks into another's"

    def forward(self, chunk, state):
        state = state * 0.5 + state.mean(1, keepdim=True)
        return chunk + state.sum(0), state


def test_A2_a_state_that_is_mixed_between_rows_is_refused(tmp_path):
    given = {"chunk": np.ones((4, 3), "f4"), "state": np.random.default_rng(0).normal(size=(2, 4, 3)).astype("f4")}
    with pytest.raises(CheckFailed, match="differ|beside"):
        save_package(Blended(), tmp_path / "p", name="blended", inputs=given, outputs=OUTPUTS, batch_axis={"state": 1, "next_state": 1})


def test_A2_requests_of_another_rate_never_share_a_call(tmp_path):
    model = voice()
    package = save(model, tmp_path / "p")
    arrays, _ = golden(package)
    rates = 16000, 8000, 16000, 8000
    rows = [{name: a[i:i + 1] for name, a in arrays.items()} | {"sr": np.array([sr])} for i, sr in enumerate(rates)]
    life, _ = load_here(package, max_batch=4)
    for row, sr, told in zip(rows, rates, submitted(life, *rows)):
        speech, _ = alone(model, row["chunk"], np.moveaxis(row["state"], 0, 1).copy(), torch.tensor(sr))
        assert np.allclose(told["speech"], speech, atol=1e-6), "answered at another rate"


def test_the_proofs_are_made_again_with_the_live_model(tmp_path):
    proofs = save(voice(), tmp_path / "p").check(voice())
    assert proofs.passed and "the live model, golden rows" in str(proofs)


class Parts(NamedTuple):
    y: torch.Tensor
    h: torch.Tensor
    c: torch.Tensor


class InParts(torch.nn.Module):
    def forward(self, x: torch.Tensor, s: torch.Tensor) -> Parts:
        return Parts(x + s.sum(0), s * 2, s * 100)


def test_parts_of_a_named_tuple_go_by_their_names(tmp_path):
    x, s = np.ones((4, 3), np.float32), np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    package = save_package(torch.jit.script(InParts()), tmp_path / "p", "m", {"x": x, "s": s}, ["y", "c", "h"], batch_axis={"s": 1, "h": 1, "c": 1})
    answers = load_program(package).run({"x": x[:1], "s": np.ones((1, 2, 3), np.float32)}, ["y", "c", "h"])
    assert answers["c"].max() == 100 and answers["h"].max() == 2


@pytest.mark.parametrize("inner", ["carried", "state"])
def test_a_loop_of_a_graph_keeps_the_values_that_are_its_own(tmp_path, inner):
    "The body of a loop may call its own value as the graph calls another"
    import onnx
    import onnxruntime
    from onnx import helper as h
    def value(name, shape, kind=onnx.TensorProto.FLOAT):
        return h.make_tensor_value_info(name, kind, shape)
    body = h.make_graph([h.make_node("Add", [inner, "x"], ["sum"]), h.make_node("Identity", ["on"], ["on_again"])], "body",
                        [value("i", [], onnx.TensorProto.INT64), value("on", [], onnx.TensorProto.BOOL), value(inner, [2, "n", 3])],
                        [value("on_again", [], onnx.TensorProto.BOOL), value("sum", [2, "n", 3])])
    nodes = [h.make_node("Loop", ["five", "", "state"], ["next"], body=body), h.make_node("ReduceSum", ["next", "first"], ["y"], keepdims=0)]
    constants = [onnx.numpy_helper.from_array(np.array(v), name) for name, v in (("five", 5), ("first", [0]))]
    graph = h.make_graph(nodes, "g", [value("x", ["n", 3]), value("state", [2, "n", 3])], [value("y", ["n", 3]), value("next", [2, "n", 3])], constants)
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    x, state = np.random.default_rng(0).normal(size=(4, 3)).astype("f4"), np.random.default_rng(1).normal(size=(2, 4, 3)).astype("f4")
    y, after = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(["y", "next"], {"x": x, "state": state})
    package = save_package(tmp_path / "m.onnx", tmp_path / "p", "m", {"x": x, "state": state}, ["y", "next"], batch_axis={"state": 1, "next": 1})
    got = load_program(package).run({"x": x, "state": state.swapaxes(0, 1).copy()}, ["y", "next"])
    assert np.array_equal(got["y"], y) and np.array_equal(got["next"].swapaxes(0, 1), after)


def test_a_name_for_what_goes_in_and_comes_out_is_refused_where_a_graph_cannot_have_it(tmp_path):
    x, s = np.ones((4, 3), np.float32), np.ones((2, 4, 3), np.float32)
    with pytest.raises(UsageError, match="an input and an output") as e:
        save_package(InParts(), tmp_path / "p", "m", {"x": x, "s": s}, ["y", "s", "c"], batch_axis={"s": 1, "c": 1}, format="onnx")
    assert "next_s" in str(e.value)
