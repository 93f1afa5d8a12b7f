"""A model that takes bfloat16 is saved as it is: the wire has float32, or two bytes of V2's BF16, and the saved program rounds as torch does."""
import json

import httpx
import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from torch import nn

from mlserve.client import Client
from mlserve.errors import InvalidInput, MlserveError, Refused, UsageError
from mlserve.package import golden, load_package, load_program, save_package
from mlserve.package.trial.process import free_port
from mlserve.serving.server import serve_local
from mlserve.tensors import TensorSpec
from mlserve.wire.predict import decode_predict
from mlserve.wire.v2 import decode_infer

HALF = ml_dtypes.bfloat16
SPEC = TensorSpec("x", "FP32", (-1, 8), rounded="BF16")


class Coarse(nn.Module):
    "Two layers in bfloat16, and a mask of the same type"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16, dtype=torch.bfloat16), nn.Linear(16, 3, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x))) * mask


class Through(nn.Module):
    "It answers what it was given, as it was rounded"

    def forward(self, x):
        return x * 1


class Softened(nn.Module):
    def forward(self, x):
        return torch.softmax(x * 1.5, 1)


class Widened(nn.Module):
    "It computes in float32 what it takes in bfloat16"

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(8, 2)

    def forward(self, x):
        return self.line(x.float())


def example(rows=5):
    torch.manual_seed(1)
    return {"x": torch.randn(rows, 8).to(torch.bfloat16), "mask": torch.ones(rows, 1, dtype=torch.bfloat16)}


def fine(rows=5):
    "Numbers that bfloat16 does not have, ties among them"
    x = np.random.default_rng(2).normal(size=(rows, 8)).astype("f4")
    x[:, 0], x[:, 1], x[:, 2] = 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20
    return {"x": x, "mask": np.ones((rows, 1), "f4")}


def own(model, given):
    "What the model itself answers to its own type"
    with torch.inference_mode():
        return model(*[torch.from_numpy(a).to(torch.bfloat16) for a in given.values()]).float().numpy()


@pytest.mark.parametrize("way", ["live", "export", "script", "file"])
def test_a_model_in_bfloat16_is_saved_as_it_is(way, tmp_path):
    model = given = Coarse().eval()
    if way in ("script", "file"):
        given = torch.jit.script(model)
    if way == "file":
        torch.jit.save(given, tmp_path / "coarse.pt")
        given = tmp_path / "coarse.pt"
    held = example(40), np.zeros(40, int)
    package = save_package(given, tmp_path / "p", "coarse", example(), ["y"], format="export" if way == "export" else "torchscript", holdout=held)
    assert [str(s) for s in package.inputs] == ["x FP32 [n, 8], rounded to BF16", "mask FP32 [n, 1], rounded to BF16"]
    assert package.tolerance == {"rtol": 2e-2, "atol": 5e-3} and "rounded to BF16" in repr(package)
    arrays, expected = golden(package)
    assert {a.dtype for a in (*arrays.values(), *expected.values())} == {np.dtype("f4")} and np.array_equal(arrays["x"], example()["x"].float())
    assert np.array_equal(load_program(load_package(package.path)).run(fine(), ["y"])["y"], own(model, fine()))
    proofs = package.check(given, example(7))
    assert proofs.passed and "the live model, your rows" in str(proofs)


def test_V3_a_number_is_rounded_to_bfloat16_as_torch_does(tmp_path):
    x = {"x": fine()["x"]}
    package = save_package(Through(), tmp_path / "p", "through", {"x": example()["x"]}, ["y"])
    assert np.array_equal(load_program(package).run(x, ["y"])["y"], x["x"].astype(HALF).astype("f4"))


def test_V3_what_would_be_infinite_in_bfloat16_is_refused():
    "The largest number that JSON may have is the last that is rounded to the largest of bfloat16; a long list as well as a short one"
    last, first = np.nextafter(np.float32(2.0**128 - 2.0**119), np.float32(0)), np.float32(2.0**128 - 2.0**119)
    assert torch.tensor([last, first]).to(torch.bfloat16).isinf().tolist() == [False, True]
    for rows in (1, 8000):
        def read(value):
            text = json.dumps({"inputs": [[0.125] * 7 + [float(value)]] * rows}).encode()
            return decode_predict(text, [SPEC]).inputs["x"]
        assert (read(last)[:, 7] == last).all() and (read(-last)[:, 7] == -last).all()
        for value in (first, -first, np.float32(3.4e38)):
            with pytest.raises(InvalidInput, match="BF16 holds finite values up to 3.38953"):
                read(value)


def test_V3_two_bytes_of_triton_s_client_are_the_upper_half():
    x = fine()["x"].astype(HALF)
    asked = triton.InferInput("x", list(x.shape), "BF16")
    asked.set_data_from_numpy(x, binary_data=True)
    body, length = triton.InferenceServerClient.generate_request_body([asked])
    assert np.array_equal(decode_infer(bytes(body), [SPEC], [SPEC], header=str(length)).inputs["x"], x.astype("f4"))


def test_a_client_is_told_where_bfloat16_is_not_taken():
    x = fine()["x"].astype(HALF)
    asked = triton.InferInput("x", list(x.shape), "BF16")
    asked.set_data_from_numpy(x, binary_data=True)
    body, length = triton.InferenceServerClient.generate_request_body([asked])
    plain = TensorSpec("x", "FP32", (-1, 8))
    with pytest.raises(InvalidInput, match="'BF16'; the model takes FP32, which holds each number of BF16"):
        decode_infer(bytes(body), [plain], [plain], header=str(length))
    with pytest.raises(InvalidInput, match="is BF16, which has no JSON form in V2; send it as binary"):
        decode_infer(b'{"inputs": [{"name": "x", "datatype": "BF16", "shape": [1, 8], "data": [1, 2, 3, 4, 5, 6, 7, 8]}]}', [SPEC], [SPEC])
    with pytest.raises(MlserveError, match="80 bytes; shape .* of BF16 needs 160"):
        decode_infer(bytes(body).replace(b"[5,8]", b"[10,8]"), [SPEC], [SPEC], header=str(length + 1))
    with pytest.raises(MlserveError, match="would take 160 bytes; the limit is 100"):
        decode_infer(bytes(body), [SPEC], [SPEC], 100, header=str(length))


def asked_of(client, x, mask, datatype):
    "The two inputs as Triton's client takes them"
    made = []
    for name, array in (("x", x), ("mask", mask)):
        made.append(client.InferInput(name, list(array.shape), datatype))
        made[-1].set_data_from_numpy(array)
    return made


def test_every_door_answers_as_the_model_itself(tmp_path):
    model, given, port = Coarse().eval(), fine(), free_port()
    package = save_package(model, tmp_path / "p", "coarse", example(), ["y"])
    want = own(model, given)
    halves = [a.astype(HALF) for a in given.values()]
    with serve_local(package.path, grpc_port=port) as url, Client(url) as client:
        assert np.array_equal(client.predict(given)["y"], want) and np.array_equal(client.infer(given, binary=False)["y"], want)
        assert np.array_equal(client.infer(given, binary=True)["y"], want)
        for sent in ({n: a.astype(HALF) for n, a in given.items()}, {n: torch.from_numpy(a).to(torch.bfloat16) for n, a in given.items()}):
            assert np.array_equal(client.infer(sent, binary=True)["y"], want) and np.array_equal(client.infer(sent, binary=False)["y"], want)
            assert np.array_equal(client.predict(sent)["y"], want)
        assert [entry["parameters"] for entry in client.metadata()["inputs"]] == [{"rounded": "BF16"}] * 2
        assert "The model rounds it to BF16." in httpx.get(f"{url}/openapi.json").text
        for door, address in ((triton, url.removeprefix("http://")), (triton_grpc, f"127.0.0.1:{port}")):
            with door.InferenceServerClient(address) as foreign:
                for arrays, datatype in ((halves, "BF16"), (list(given.values()), "FP32")):
                    told = foreign.infer("coarse", asked_of(door, *arrays, datatype)).as_numpy("y")
                    assert told.dtype == np.float32 and np.array_equal(told, want), (door.__name__, datatype)


def test_sizes_vary_and_a_state_is_carried_in_bfloat16(tmp_path):
    class Fading(nn.Module):
        def forward(self, x, state, rate):
            state = state * rate + x
            return state.sum(0), state
    x = example()["x"]
    package = save_package(Softened(), tmp_path / "p", "soft", [{"x": x}, {"x": x[:, :5]}], ["y"])
    assert str(package.inputs[0]) == "x FP32 [n, length 1–32], rounded to BF16"
    given = {"x": x, "state": torch.ones(2, 5, 8, dtype=torch.bfloat16), "rate": torch.tensor(0.5, dtype=torch.bfloat16)}
    package = save_package(Fading(), tmp_path / "q", "fading", given, ["y", "next"], batch_axis={"state": 1, "next": 1, "rate": None})
    got = load_program(package).run(golden(package)[0], ["y", "next"])
    assert np.array_equal(got["y"], Fading()(*given.values())[0].float()) and got["next"].shape == (5, 2, 8)


def test_onnx_is_taken_where_onnxruntime_computes_and_else_refused_with_a_sentence(tmp_path):
    x = {"x": example()["x"]}
    model = Widened().eval()
    package = save_package(model, tmp_path / "p", "wide", x, ["y"], format="onnx")
    got = load_program(package).run({"x": fine()["x"]}, ["y"])["y"]
    assert np.allclose(got, own(model, {"x": fine()["x"]}), atol=1e-5)
    with pytest.raises(Refused, match="no kernel on cpu for Mul") as e:
        save_package(Softened(), tmp_path / "q", "soft", x, ["y"], format="onnx")
    assert "'torchscript' or 'export'" in e.value.mend and not (tmp_path / "q").exists()


def test_an_array_of_ml_dtypes_is_an_example_too(tmp_path):
    x = fine()["x"].astype(HALF)
    package = save_package(Softened(), tmp_path / "p", "soft", {"x": x}, ["y"], holdout=({"x": x}, np.zeros(5, int)))
    assert package.inputs[0].rounded == "BF16" and np.array_equal(golden(package)[0]["x"], x.astype("f4"))


@pytest.mark.parametrize("change,sentence", [
    ({"inputs": {"x": example()["x"].float(), "mask": example()["mask"]}}, "'x' is float32, the model's weights are bfloat16. Give it in that type, torch.as_tensor"),
    ({"inputs": {"mask": example()["mask"], "x": example()["x"]}}, "forward takes x, mask; inputs gives mask, x"),
    ({"inputs": [example(), {"x": example()["x"].float(), "mask": example()["mask"]}]}, "the same in each"),
    ({"format": "safetensors"}, "'x' is bfloat16 with format='safetensors'; it is allowed with a live torch module"),
    ({"model": "model.onnx", "format": "onnx"}, "'x' is bfloat16 with format='onnx'"),
    ({"dtype": "float16"}, "dtype is 'float16', and the model's weights are bfloat16"),
    ({"model": Widened(), "dtype": "bfloat16"}, "'x' is bfloat16 with dtype='bfloat16'"),
])
def test_what_cannot_be_rounded_is_refused(change, sentence, tmp_path):
    with pytest.raises(UsageError) as e:
        save_package(**{"model": Coarse().eval(), "path": tmp_path / "p", "name": "coarse", "inputs": example(), "outputs": ["y"]} | change)
    assert sentence in str(e.value) and not (tmp_path / "p").exists()


def test_inputs_in_another_order_are_found_behind_an_adapter(tmp_path):
    class Two(nn.Module):
        def forward(self, x, state):
            return x + state.sum(0), state
    given = {"state": np.ones((2, 4, 3), "f4"), "x": np.ones((4, 3), "f4")}
    for model in (Two(), torch.jit.script(Two())):
        with pytest.raises(UsageError, match="forward takes x, state; inputs gives state, x"):
            save_package(model, tmp_path / "p", "two", given, ["y", "next"], batch_axis={"state": 1, "next": 1})


# ---- other types that do not hold a number


def test_V3_the_function_of_mlflow_holds_each_number_or_refuses_it(tmp_path):
    "Without its schema, which it has when it is loaded by its folder; NumPy's cast wraps 300 to 44"
    from mlserve.serving.model import _load_pyfunc
    saved = save_package(torch.nn.Identity(), tmp_path / "p", "same", {"x": np.int8([[1], [2]])}, ["y"])
    function = _load_pyfunc(str(saved.path))
    assert function.predict({"x": np.array([[100]])})["y"].tolist() == [[100]]
    for wrong in ([[300]], [[2.5]], [[2**70]]):
        with pytest.raises(InvalidInput, match="'x' holds"):
            function.predict({"x": np.array(wrong)})
