"""Model formats beyond their pages: planted payloads in every loader, links out of the package, MLflow over HTTP, no torch where none is needed."""
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from commands import TESTS, run
from torch import nn

from mlserve.errors import CheckFailed, IntegrityError, InvalidInput, MlserveError, Refused, UsageError
from mlserve.package.programs import FORMATS, read_program
from mlserve.package.lock import write_lock
from mlserve.package import golden, load_package, load_program, save_package
from mlserve.serving.model.device import claim
from mlserve.serving.model import load_model
from mlserve.tensors import compare

CLASS = '''import torch
class Net(torch.nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.line = torch.nn.Linear(size, 3)
    def forward(self, a, b): return {"sum": self.line(a) + b, "best": self.line(a).argmax(1)}
'''
EXAMPLE = {"a": np.random.default_rng(0).random((5, 4), np.float32), "b": np.ones((5, 3), np.float32)}


def net(source=CLASS, **arguments):
    space = {}
    exec(source, space)
    torch.manual_seed(0)
    return space["Net"](**arguments).eval()


def save(folder, format, model=None, outputs=("sum", "best"), **more):
    "A package of the small net with two named inputs and two outputs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(CLASS)
    if format == "safetensors":
        more = {"handler": folder / "net.py", "arguments": {"size": 4}} | more
    return save_package(net() if model is None else model, folder / format, "net", EXAMPLE, list(outputs), format=format, **more)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    return {f: save(folder, f) for f in FORMATS}


@pytest.fixture
def trap(tmp_path):
    "An object that makes a file when it is unpickled, and the file"
    mark = tmp_path / "the-trap-was-sprung"

    class Trap:
        def __reduce__(self):
            return Path.touch, (mark,)
    return Trap(), mark


# ---- the formats agree

def test_every_format_gives_the_same_named_outputs(packages):
    inputs, expected = golden(packages["torchscript"])
    assert list(inputs) == ["a", "b"] and sorted(expected) == ["best", "sum"]
    for package in packages.values():
        for threads in (1, 2):
            model = load_model(package, claim("cpu"), threads)
            for rows in (1, 2, 5):
                got = model.predict({k: v[:rows] for k, v in inputs.items()})
                assert compare({k: v[:rows] for k, v in expected.items()}, got, **package.tolerance).passed
        assert [s.name for s in package.outputs] == ["sum", "best"] and package.outputs[1].datatype == "INT64"


def test_inputs_are_taken_by_name_whatever_their_order(packages):
    for package in packages.values():
        model = load_model(package, claim("cpu"))
        swapped = model.predict(dict(reversed(EXAMPLE.items())))
        assert compare(model.predict(EXAMPLE), swapped, 0, 0).passed


@pytest.mark.parametrize("dtype,rtol", [(torch.float16, 1e-2), (torch.float32, 1e-4), (torch.float64, 1e-7)])
def test_the_tolerance_follows_the_type(dtype, rtol, tmp_path):
    class Twice(nn.Module):
        def forward(self, x):
            return x * 2
    for format in ("torchscript", "export", "onnx"):
        package = save_package(Twice(), tmp_path / "p", "twice", {"x": torch.rand(3, 2).to(dtype)}, ["y"], format=format)
        assert package.tolerance["rtol"] == rtol


def test_saving_leaves_the_notebooks_random_numbers_alone(tmp_path):
    model = net()
    for format in FORMATS:
        torch.manual_seed(7)
        before = torch.random.get_rng_state()
        save(tmp_path, format, model)
        assert torch.equal(torch.random.get_rng_state(), before), format


def test_another_process_gives_the_same_digest(packages, tmp_path):
    "TorchScript numbers the classes that its process has seen, so it is left out: this process has seen others"
    program = ("import sys; sys.path[:0] = sys.argv[1].split(); from pathlib import Path; from test_formats import save\n"
               "for f in sys.argv[3:]: print(save(Path(sys.argv[2]), f).digest)")
    formats = [f for f in FORMATS if f != "torchscript"]
    done = run(sys.executable, "-c", program, f"{TESTS} {Path(__file__).parent}", tmp_path, *formats)
    assert done.stdout.split() == [packages[f].digest for f in formats], done.stderr


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_that_counts_on_its_batch_is_not_saved(format, tmp_path):
    source = CLASS.replace("self.line(a) + b", "(self.line(a) + b).reshape(5, 3)")
    (tmp_path / "net.py").write_text(source)
    with pytest.raises((UsageError, CheckFailed)):
        save(tmp_path / "p", format, net(source), **({"handler": tmp_path / "net.py"} if format == "safetensors" else {}))
    assert not (tmp_path / "p" / format).exists()


def test_weights_that_disagree_with_their_class_are_not_saved(tmp_path):
    "The class in the handler computes something else than the live module"
    (tmp_path / "other.py").write_text(CLASS.replace("+ b", "- b"))
    with pytest.raises(CheckFailed, match="saved model and the live one"):
        save(tmp_path / "p", "safetensors", handler=tmp_path / "other.py")
    (tmp_path / "none.py").write_text("import torch\n")
    with pytest.raises(MlserveError, match="no class 'Net'"):
        save(tmp_path / "p", "safetensors", handler=tmp_path / "none.py")


# ---- text

@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    "An ONNX file that takes text and gives text and a number"
    import onnx
    from onnx import TensorProto, helper
    file = tmp_path_factory.mktemp("text") / "text.onnx"
    nodes = [helper.make_node("StringConcat", ["text", "mark"], ["loud"]),
             helper.make_node("LabelEncoder", ["text"], ["score"], domain="ai.onnx.ml", keys_strings=["good", "bad"], values_floats=[1.0, -1.0], default_float=0.0)]
    mark = helper.make_tensor("mark", TensorProto.STRING, [1], [b"!"])
    graph = helper.make_graph(nodes, "text", [helper.make_tensor_value_info("text", TensorProto.STRING, ["n", 2])],
                              [helper.make_tensor_value_info("loud", TensorProto.STRING, ["n", 2]), helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 2])], [mark])
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 4)]), file)
    return file


def test_text_goes_in_and_out_as_bytes(text_model, tmp_path):
    words = np.array([[b"good", "schön".encode()], [b"bad", b""]], object)
    package = save_package(text_model, tmp_path / "p", "text", {"text": words}, ["loud", "score"], format="onnx")
    assert (package.inputs[0].datatype, package.outputs[0].datatype) == ("BYTES", "BYTES")
    inputs, expected = golden(package)
    assert (inputs["text"] == words).all()
    assert expected["loud"].tolist() == [[b"good!", "schön!".encode()], [b"bad!", b"!"]]
    got = load_model(package, claim("cpu")).predict(inputs)
    assert compare(expected, got, **package.tolerance).passed
    with pytest.raises(InvalidInput, match="not UTF-8"):
        load_model(package, claim("cpu")).predict({"text": np.array([[b"\xff", b""]], object)})
    import mlflow
    answer = mlflow.pyfunc.load_model(str(package.path)).predict({"text": np.array([["good", "day"]], object)})
    assert answer["loud"].tolist() == [["good!", "day!"]] and answer["score"].tolist() == [[1, 0]]


# ---- nothing is unpickled

def pickles(trap):
    "The same trap in everything that pickles"
    saved, npy, npz, zipped = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(trap, saved)
    torch.save(trap, zipped, _use_new_zipfile_serialization=False)
    np.save(npy, np.array([trap], object), allow_pickle=True)
    np.savez(npz, np.array([trap], object))
    import joblib
    packed = io.BytesIO()
    joblib.dump(trap, packed, compress=3)
    return {"pickle": pickle.dumps(trap), "old pickle": pickle.dumps(trap, 0), "torch.save": saved.getvalue(), "legacy torch.save": zipped.getvalue(),
            "npy": npy.getvalue(), "npz": npz.getvalue(), "joblib": packed.getvalue()}


def test_the_trap_is_real(trap):
    "Without our care these payloads do run"
    payloads = pickles(trap[0])
    for read in (lambda: pickle.loads(payloads["pickle"]), lambda: torch.load(io.BytesIO(payloads["torch.save"]), weights_only=False),
                 lambda: np.load(io.BytesIO(payloads["npy"]), allow_pickle=True)):
        read()
        assert trap[1].exists()
        trap[1].unlink()


@pytest.mark.parametrize("format", FORMATS)
def test_a_pickle_under_any_name_is_refused_unread(format, packages, trap, tmp_path):
    from dataclasses import replace
    package = packages[format]
    for kind, payload in pickles(trap[0]).items():
        file = tmp_path / FORMATS[format]
        file.write_bytes(payload)
        with pytest.raises(Refused, match=re.escape(file.name)) as e:
            read_program(file, format, build=net)
        assert e.value.code == 8, kind
        with pytest.raises((Refused, UsageError)):
            save(tmp_path / "p", format, file)
        with pytest.raises(Refused):
            load_model(replace(package, path=tmp_path, handler=None, module=None), claim("cpu"))
    assert not trap[1].exists() and not (tmp_path / "p" / format).exists()


def test_golden_data_that_is_a_pickle_is_refused(packages, trap):
    package = packages["onnx"]
    good = (package.path / "golden.safetensors").read_bytes()
    for payload in pickles(trap[0]).values():
        (package.path / "golden.safetensors").write_bytes(payload)
        with pytest.raises(IntegrityError):
            golden(package)
    (package.path / "golden.safetensors").write_bytes(good)
    assert not trap[1].exists()


def rewrite(source, target, change):
    "The same archive with its entries changed"
    with zipfile.ZipFile(source) as z:
        entries = {i.filename.split("/", 1)[1]: z.read(i) for i in z.infolist()}
    change(entries)
    with zipfile.ZipFile(target, "w") as z:
        for name, data in entries.items():
            z.writestr("model/" + name, data)


def payloads(trap, mark):
    "Every way in which a torch.export archive could run code: {name: change of its entries}"
    def saved():
        file = io.BytesIO()
        torch.save(trap, file)
        return file.getvalue()

    def as_json(entries, name, change):
        data = json.loads(entries[name])
        change(data)
        entries[name] = json.dumps(data).encode()

    def weight(e):
        def change(d):
            first = next(iter(d["config"].values()))
            first["use_pickle"] = True
            e["data/weights/" + first["path_name"]] = saved()
        as_json(e, "data/weights/model_weights_config.json", change)

    def constant(name, data):
        def change(e):
            e[f"data/constants/{name}"] = data
            entry = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}
            as_json(e, "data/constants/model_constants_config.json", lambda d: d["config"].update(c=entry))
        return change
    command = f"__import__('pathlib').Path({str(mark)!r}).touch()"

    def graph(old, new):
        def change(e):
            text = e["models/model.json"].decode()
            assert re.search(old, text)
            e["models/model.json"] = re.sub(old, lambda m: new, text).encode()
        return change
    enum = json.dumps(json.dumps([1, {"type": "builtins.dict", "context": json.dumps({"__enum__": True, "fqn": "antigravity:X", "name": "X"}), "children_spec": []}]))
    return {
        "example inputs": lambda e: e.update({"data/sample_inputs/model.pt": saved()}),
        "a weight": weight,
        "a constant": constant("tensor_0", saved()),
        "an opaque constant": constant("opaque_obj_0", pickle.dumps(trap)),
        "a size": graph(r"Symbol\('s\d+'[^\"]*", command),
        "an operator": graph(r"torch\.ops\.aten\.linear\.default", "torch.serialization.os.system"),
        "an operator that opens files": graph(r"torch\.ops\.aten\.linear\.default", "torch.ops.aten.from_file.default"),
        "a name": graph(r'"linear"', json.dumps(f"x):\n  {command}\ndef g(")),
        "a tree": graph(r'"in_spec": "(?:[^"\\]|\\.)*"', f'"in_spec": {enum}'),
        "a native library": lambda e: e.update({"data/aotinductor/model/model.so": b"\x7fELF"}),
        "the older form": lambda e: (e.clear(), e.update({"version": b"8.20", "serialized_exported_program.json": b"{}", "serialized_state_dict.pt": saved(),
                                                         "serialized_constants.pt": saved(), "serialized_example_inputs.pt": saved()})),
    }


def test_no_part_of_an_exported_archive_can_run_code(packages, trap, tmp_path):
    good = packages["export"].path / "model.pt2"
    rewrite(good, tmp_path / "model.pt2", lambda e: None)
    read_program(tmp_path / "model.pt2", "export")  # the rewriting itself harms nothing
    for what, change in payloads(*trap).items():
        rewrite(good, tmp_path / "model.pt2", change)
        with pytest.raises(Refused, match="model.pt2"):
            read_program(tmp_path / "model.pt2", "export")
        assert not trap[1].exists(), what


@pytest.mark.parametrize("what", ["example inputs", "a weight", "an opaque constant", "a size"])
def test_torchs_own_loader_would_have_run_it(what, packages, trap, tmp_path):
    "The guard is needed: without it these four do run"
    rewrite(packages["export"].path / "model.pt2", tmp_path / "model.pt2", payloads(*trap)[what])
    try:
        torch.export.load(tmp_path / "model.pt2")
    except Exception:
        pass
    assert trap[1].exists()


def test_example_inputs_of_tensors_only_are_allowed(tmp_path):
    "What torch.export.save writes by itself is taken, since torch restores it with `weights_only`"
    batch = torch.export.Dim("batch")
    program = torch.export.export(nn.Linear(4, 2), (torch.rand(3, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "theirs.pt2")
    package = save_package(tmp_path / "theirs.pt2", tmp_path / "p", "theirs", {"x": torch.rand(3, 4)}, ["y"], format="export")
    assert (package.path / "model.pt2").read_bytes() == (tmp_path / "theirs.pt2").read_bytes()


# ---- W11: programs that reach out of the model, and weights that are not there

class Reads(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, x):
        return torch.from_file(self.path, False, 4, dtype=torch.float32) + x


class Writes(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, x):
        if float(x.sum()) < 1e9:
            torch.save(x, self.path)
        return x


class Prints(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, x):
        print("forged", self.path)
        return x


class Other(Prints):
    "The forward is honest; another method is not"

    def forward(self, x):
        return x

    @torch.jit.export
    def debug(self, x):
        print("forged", self.path)
        return x


@torch.jit.script
def spy(x, path: str):
    return x + torch.from_file(path, False, 4, dtype=torch.float32)


class Calls(Prints):
    def forward(self, x):
        return spy(x, self.path)


class Forks(Prints):
    "In a submodule, in a forked function"

    def __init__(self, path):
        super().__init__(path)
        self.inner = Writes(path)

    def forward(self, x):
        return torch.jit.wait(torch.jit.fork(self.inner, x))


class Trusts(Prints):
    "An operator that takes positions in memory without a look at them"

    def forward(self, x):
        return torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64) + 10**9, torch.ones(1), [4, 4]).to_dense() + x


@pytest.mark.parametrize("kind", [Reads, Writes, Prints, Other, Calls, Forks, Trusts])
def test_a_program_that_reaches_out_of_the_model_is_refused_before_it_runs(kind, packages, tmp_path, capfd):
    "At save, live and from a file, and at the start of a server"
    from dataclasses import replace
    (tmp_path / "secret").write_bytes(np.ones(4, np.float32).tobytes())
    path = tmp_path / ("secret" if kind in (Reads, Calls) else "written")
    module = torch.jit.script(kind(str(path)))
    module.save(str(tmp_path / "model.pt"))
    for model in (module, tmp_path / "model.pt"):
        with pytest.raises(Refused, match="which is not on the list") as e:
            save_package(model, tmp_path / "p", "net", {"x": torch.ones(3, 4)}, ["y"])
        assert e.value.code == 8
    with pytest.raises(Refused, match="which is not on the list"):
        load_model(replace(packages["torchscript"], path=tmp_path), claim("cpu"))
    assert not (tmp_path / "written").exists() and not (tmp_path / "p").exists() and "forged" not in capfd.readouterr().out


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    "A TorchScript file with a default, and with layers that unpack their weights while they are loaded"
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, torch.qint8)

        def forward(self, x, k: int = 3):
            return self.line(x) + k
    file = tmp_path_factory.mktemp("scripted") / "adds.pt"
    torch.jit.script(Adds().eval()).save(str(file))
    return file


def unchecked():
    "Programs of operators that trust sizes, strides or indices with memory: {name: what one does with x}"
    ops = torch.ops.aten

    class Aliases(nn.Module):
        def forward(self, x):
            return ops._reshape_alias(x, [1024], [1])

    class Writes(nn.Module):
        def forward(self, x):
            at = torch.full([1, 1, 1, 1], 1000000000, dtype=torch.int64)
            return ops.max_pool2d_with_indices_backward(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 2, 2), [2, 2], [2, 2], [0, 0], [1, 1], False, at)

    class Segments(nn.Module):
        def forward(self, x):
            return torch.segment_reduce(x.ravel(), "sum", lengths=torch.tensor([1000000000]), unsafe=True)

    class Loss(nn.Module):
        def forward(self, x):
            return ops.ctc_loss(torch.zeros(5, 1, 3), torch.full([1, 2], 1000000000, dtype=torch.int64), torch.tensor([5]), torch.tensor([2]), 0, 0, False)

    class Normalises(nn.Module):
        def forward(self, x):
            one = torch.ones(1)
            return ops.native_batch_norm(torch.ones(2, 5000000, 1), one, one, one, one, False, 0.1, 1e-5)[0]

    class Sparse(nn.Module):
        def forward(self, x):
            sparse = x.to_sparse().coalesce()
            sparse.indices().fill_(1000000000)
            return sparse.to_dense()

    class Attends(nn.Module):
        def forward(self, x):
            return ops._scaled_dot_product_flash_attention_for_cpu(torch.ones(4, 8, 300, 8), torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8))[0]

    class Resizes(nn.Module):
        def forward(self, x):
            return x.clone().resize_([1024])
    return {m.__name__: m for m in (Aliases, Writes, Segments, Loss, Normalises, Sparse, Attends, Resizes)}


@pytest.mark.parametrize("kind", unchecked())
def test_an_operator_that_trusts_its_arguments_with_memory_is_refused(kind, tmp_path):
    "Before it runs: run, each reads or writes memory of the process, or ends it"
    torch.jit.script(unchecked()[kind]()).save(str(tmp_path / "model.pt"))
    with pytest.raises(Refused, match="which is not on the list"):
        read_program(tmp_path / "model.pt", "torchscript")


def test_an_exported_graph_that_reads_behind_its_weight_is_refused(tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.w.view(1, 4) + x
    torch.export.save(torch.export.export(Views(), (torch.ones(1, 4),)), str(tmp_path / "good.pt2"))
    read_program(tmp_path / "good.pt2", "export")

    def alias(entries):
        graph = json.loads(entries["models/model.json"])
        node = next(n for n in graph["graph_module"]["graph"]["nodes"] if "view" in n["target"])
        node["target"] = "torch.ops.aten._reshape_alias.default"
        node["inputs"].append({"name": "stride", "arg": {"as_ints": [4, 1]}, "kind": 1})
        node["inputs"][1]["arg"] = {"as_ints": [1024, 4]}
        entries["models/model.json"] = json.dumps(graph).encode()
    rewrite(tmp_path / "good.pt2", tmp_path / "model.pt2", alias)
    with pytest.raises(Refused, match="the operator .aten::_reshape_alias., which is not on the list"):
        read_program(tmp_path / "model.pt2", "export")


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, mode="sum")

    def forward(self, x):
        words = torch.zeros_like(x, dtype=torch.int64).ravel()
        return self.bag(words[:3], torch.stack([words[0], (x.ravel()[0] * 0).long() + words[1] + x.ravel()[1].long()]))


class Packs(nn.Module):
    def forward(self, x):
        sizes = torch.stack([torch.full_like(x.ravel()[0], 2), x.ravel()[0] * 0 + x.ravel()[1]]).long()
        return torch.ops.aten._pad_packed_sequence(torch.ones(4, 3), sizes, True, 0.0, 0)[0]


class Weighs(nn.Module):
    def forward(self, x):
        return torch._weight_norm(torch.ones(100000, 300), x.ravel()[:1].reshape(1, 1), 0)


class Empty(nn.Module):
    def forward(self, x):
        return torch.empty([64, 64]) + torch.empty_like(x).sum() + x.new_empty([64]).sum()


@pytest.mark.parametrize("kind", [Bag, Packs, Weighs, Empty])
@pytest.mark.parametrize("format", ["torchscript", "export"])
def test_operators_that_honest_models_need_cannot_reach_beyond_their_tensors(kind, format, tmp_path):
    "A negative offset, batch sizes that fall below zero, a norm of one number for many rows, and memory that nobody wrote"
    x = torch.tensor([[1.0, 2.0, 3.0]])
    file = tmp_path / FORMATS[format]
    if format == "torchscript":
        torch.jit.script(kind().eval()).save(str(file))
    elif kind is Packs:
        pytest.skip("packed sequences have no form in torch.export")
    else:
        torch.export.save(torch.export.export(kind().eval(), (x,)), str(file))
    program = read_program(file, format)
    for value in (2.0, -(10.0**8)):
        try:
            answer = program.run({"x": np.array([[1, value, 3]], np.float32)}, ["y"])["y"]
        except MlserveError:
            continue
        assert np.isfinite(answer).all() and (kind is not Empty or not answer.any())


def test_weight_norm_bags_and_packed_sequences_answer_as_before(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.bag = nn.LSTM(4, 3, batch_first=True), nn.EmbeddingBag(9, 3)
            self.line = torch.nn.utils.weight_norm(nn.Linear(4, 3))

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, (x[:, :, 0] > 0).sum(1).cpu(), batch_first=True, enforce_sorted=False)
            padded = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=5)[0]
            return padded + self.line(x) + self.bag((x[:, :, 1] * 9).long()).unsqueeze(1)
    x = torch.rand(4, 5, 4)
    for row, length in enumerate((5, 2, 4, 1)):
        x[row, length:, 0] = 0
    net = Net().eval()
    torch.jit.trace(net, x).save(str(tmp_path / "model.pt"))
    answer = read_program(tmp_path / "model.pt", "torchscript").run({"x": x.numpy()}, ["y"])["y"]
    assert np.allclose(answer, net(x).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", ["torchscript", "export"])
def test_a_module_that_was_asked_with_gradients_is_saved(format, tmp_path):
    "After training, weight_norm keeps a weight that deepcopy refuses"
    net, x = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 3)), nn.ReLU()), torch.rand(4, 4)
    net(x).sum().backward()
    wanted, kept = net(x).detach().numpy(), net[0].weight
    package = save_package(net, tmp_path / "p", "net", {"x": x}, ["y"], format=format)
    assert np.allclose(load_program(package).run({"x": x.numpy()}, ["y"])["y"], wanted, atol=1e-6) and net[0].weight is kept


def test_a_record_of_places_in_the_source_is_held_against_its_bytes(scripted, tmp_path):
    "Torch reads it only when it writes an error: a text of 2 GB that is not there took seconds and the memory"
    def change(entries):
        for name in [n for n in entries if n.endswith(".debug_pkl")]:
            entries[name] = b"\x80\x02(X\xff\xff\xff\x7fab."
    rewrite(scripted, tmp_path / "adds.pt", change)
    with pytest.raises(Refused, match="adds.pt"):
        read_program(tmp_path / "adds.pt", "torchscript")


def early(mark):
    "Changes of a program's text after which it would do something while it is loaded"
    made = f'torch.from_file("{mark}", True, 4, dtype=0)'
    return {"a default": ("k: int=3", f"k: Tensor={made}"), "a default by another name": ("k: int=3", f'k: Tensor=getattr(torch, "from_" "file")("{mark}", True, 4, dtype=0)'),
            "a state": ("ops.quantized.linear_prepack(", f'{made}\n    _99 = ops.quantized.linear_prepack('), "a print": ("ops.quantized.linear_prepack(", 'print("forged")\n    _99 = ops.quantized.linear_prepack('),
            "a native class": ("ops.quantized.linear_prepack(", "__torch__.torch.classes.profiling._ScriptProfile()\n    _99 = ops.quantized.linear_prepack(")}


def changed(source, target, old, new):
    "The archive with a text of its code replaced"
    def change(entries):
        for name in [n for n in entries if n.endswith(".py")]:
            entries[name] = re.sub(rf"_?\w* = {re.escape(old)}" if old.startswith("ops") else re.escape(old),
                                   lambda m: ("_98 = " if old.startswith("ops") else "") + new, entries[name].decode()).encode()
    rewrite(source, target, change)
    with zipfile.ZipFile(target) as z:
        assert any(new.encode() in z.read(n) for n in z.namelist()), "the change did not happen"


@pytest.mark.parametrize("what", early("x"))
def test_code_that_runs_while_it_is_loaded_is_refused_from_its_text(what, scripted, tmp_path, capfd):
    read_program(scripted, "torchscript")
    changed(scripted, tmp_path / "adds.pt", *early(tmp_path / "made")[what])
    with pytest.raises(Refused, match="adds.pt"):
        read_program(tmp_path / "adds.pt", "torchscript")
    assert not (tmp_path / "made").exists() and "forged" not in capfd.readouterr().out


@pytest.mark.parametrize("what", ["a default", "a default by another name"])
def test_torchs_own_loader_would_have_run_that_too(what, scripted, tmp_path):
    changed(scripted, tmp_path / "adds.pt", *early(tmp_path / "made")[what])
    torch.jit.load(str(tmp_path / "adds.pt"))
    assert (tmp_path / "made").exists()


def honest():
    "Modules of many kinds, traced, scripted and quantized"
    x, words, sequence = torch.rand(2, 3, 32, 32), torch.randint(0, 9, (2, 7)), torch.rand(2, 5, 8)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    yield "a convolution", conv, (x,)
    yield "an embedding", nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(28, 2)), (words,)
    yield "an encoder", nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), (sequence,)
    yield "attention", nn.MultiheadAttention(8, 2, batch_first=True), (sequence, sequence, sequence)
    yield "resizing", nn.Upsample(scale_factor=2.0, mode="bilinear"), (x,)
    yield "dynamic int8", torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 4)), {nn.Linear}, torch.qint8), (sequence,)
    yield "dynamic float16", torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 4)), {nn.Linear}, torch.float16), (sequence,)
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    prepared = prepare_fx(conv.eval(), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    yield "static int8", convert_fx(prepared), (x,)
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2Model, ViTConfig, ViTForImageClassification
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    yield "BERT", BertForSequenceClassification(BertConfig(vocab_size=99, **small)), (words,)
    yield "GPT-2", GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99, bos_token_id=0, eos_token_id=0)), (words,)
    yield "ViT", ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **small)), (x,)


@pytest.mark.filterwarnings("ignore")
def test_programs_of_many_kinds_are_on_the_list(tmp_path):
    ran = 0
    for what, module, example in honest():
        module.eval()
        for make in (lambda: torch.jit.trace(module, example, strict=False, check_trace=False), lambda: torch.jit.script(module)):
            try:
                with torch.no_grad():
                    program = make()
            except Exception:  # not every module can be scripted
                continue
            program.save(str(tmp_path / "model.pt"))
            program = read_program(tmp_path / "model.pt", "torchscript").module
            with torch.no_grad():
                program(*example)
            ran += 1
    assert ran >= 15


def shorter(package, target):
    "The model of a package with less data than its description says"
    good, format = package.path / package.file, package.format
    if format == "torchscript":
        rewrite(good, target, lambda e: e.update({"data/0": e["data/0"][:1]}))
    elif format == "export":
        rewrite(good, target, lambda e: e.update({"data/weights/weight_0": e["data/weights/weight_0"][:4]}))
    elif format == "onnx":
        import onnx
        model = onnx.load(good)
        weights = next(t for t in model.graph.initializer if t.raw_data)
        weights.raw_data = weights.raw_data[:4]
        target.write_bytes(model.SerializeToString())
    else:
        target.write_bytes(good.read_bytes()[:-4])
    return target


@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_shorter_than_they_say_are_refused(format, packages, tmp_path):
    package = packages[format]
    file = shorter(package, tmp_path / package.file)
    with pytest.raises(Refused, match=file.name) as e:
        read_program(file, format, build=net)
    assert e.value.code == 8
    with pytest.raises((Refused, UsageError)):
        save(tmp_path / "p", format, file)


def test_torch_would_have_answered_with_memory_that_is_not_the_models(packages, tmp_path):
    loaded = torch.jit.load(str(shorter(packages["torchscript"], tmp_path / "model.pt")))
    assert next(loaded.parameters()).untyped_storage().nbytes() > 1


@pytest.mark.parametrize("what, change", {
    "an empty weight": lambda e: e.update({"data/weights/weight_0": b""}),
    "a larger shape": lambda e: e.update({"data/weights/model_weights_config.json": e["data/weights/model_weights_config.json"].replace(b'"as_int": 3', b'"as_int": 3000')}),
    "a description that is none": lambda e: e.update({"data/weights/model_weights_config.json": b"[" * 10**5})}.items())
def test_an_exported_archive_that_lies_about_its_weights_is_refused(what, change, packages, tmp_path):
    rewrite(packages["export"].path / "model.pt2", tmp_path / "model.pt2", change)
    with pytest.raises(Refused, match="model.pt2"):
        read_program(tmp_path / "model.pt2", "export")


def test_an_archive_that_inflates_or_says_two_things_is_refused(packages, tmp_path):
    "1.6 MB that become 1.6 GB are refused by their sizes, before a byte is inflated"
    good = packages["torchscript"].path / "model.pt"
    with zipfile.ZipFile(good) as z:
        pairs = [(i, z.read(i)) for i in z.namelist()]

    def archive(*more, **how):
        with zipfile.ZipFile(tmp_path / "model.pt", "w", **how) as z:
            for name, data in [*pairs, *more]:
                z.writestr(name, data)
        return tmp_path / "model.pt"
    read_program(archive(), "torchscript")
    root = pairs[0][0].split("/")[0]
    for file in (lambda: archive((f"{root}/data/99", bytes(16 * 10**7)), compression=zipfile.ZIP_DEFLATED), lambda: archive((f"{root}/extra/x", b""), (f"{root}/Extra/x", b"")),
                 lambda: archive((f"{root}/code/zeros.py", bytes(10**8)), compression=zipfile.ZIP_DEFLATED), lambda: archive(("other/data.pkl", b""))):
        path = file()
        import tracemalloc
        tracemalloc.start()
        with pytest.raises(Refused, match="model.pt"):
            read_program(path, "torchscript")
        assert tracemalloc.get_traced_memory()[1] < 5e6
        tracemalloc.stop()


# ---- ONNX reads nothing outside its package

@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    "A package whose ONNX file keeps its weights beside it"
    import onnx
    module, tmp_path = nn.Linear(64, 32).eval(), tmp_path_factory.mktemp("linear")
    torch.onnx.export(module, (torch.rand(2, 64),), tmp_path / "m.onnx", dynamic_shapes=({0: torch.export.Dim("n")},), input_names=["x"], output_names=["y"], verbose=False)
    model = onnx.load(tmp_path / "m.onnx")
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    package = save_package(tmp_path / "m.onnx", tmp_path / "p", "linear", {"x": torch.rand(2, 64)}, ["y"], format="onnx")
    assert (package.path / "weights.bin").stat().st_size > 64 * 32 * 4 - 1
    return package


@pytest.fixture
def outside(linear, tmp_path):
    "A copy of that package, and a file that is not its own"
    shutil.copytree(linear.path, tmp_path / "p")
    (tmp_path / "secret.bin").write_bytes((linear.path / "weights.bin").read_bytes())
    return load_package(tmp_path / "p"), tmp_path / "secret.bin"


def relocate(package, place):
    import onnx
    model = onnx.load(package.path / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(place)
    (package.path / "model.onnx").write_bytes(model.SerializeToString())


def test_weights_beside_the_model_travel_and_load(outside):
    package, _ = outside
    assert load_program(package).run({"x": np.ones((7, 64), np.float32)}, ["y"])["y"].shape == (7, 32)


def lead_outside(case, package, secret):
    "Make the weights of a package lie outside of it, in one of five ways"
    own = package.path / "weights.bin"
    if case in ("symlink", "hardlink"):
        own.unlink()
        own.symlink_to(secret) if case == "symlink" else os.link(secret, own)
    else:
        relocate(package, {"..": "../secret.bin", "absolute": secret, "device": "/dev/zero"}[case])


@pytest.mark.parametrize("case", ["..", "absolute", "symlink", "hardlink", "device"])
def test_onnx_weights_outside_the_package_are_refused_before_a_session(case, outside, monkeypatch):
    import onnxruntime
    package, secret = outside
    lead_outside(case, package, secret)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: pytest.fail("a session was built"))
    with pytest.raises(Refused, match="model.onnx") as e:
        load_program(package)
    assert e.value.code == 8
    assert "secret" not in str(e.value) or case in ("..", "absolute")


@pytest.mark.parametrize("case,code", [("..", 8), ("absolute", 8), ("hardlink", 8), ("device", 8), ("symlink", 8)])
def test_the_server_ends_with_the_code_of_the_refusal(case, code, outside):
    "A package that was locked with such a file is refused by the server too; a symbolic link already by its lock"
    package, secret = outside
    lead_outside(case, package, secret)
    if case != "symlink":
        write_lock(package.path)
    done = run(sys.executable, "-m", "mlserve.serving.server", env={"MLSERVE_PACKAGE": str(package.path), "MLSERVE_DEVICE": "cpu", "MLSERVE_PORT": "0"}, timeout=120)
    assert done.returncode == code, done.stderr[-2000:]
    assert "model.onnx" in done.stderr or "weights.bin" in done.stderr


def test_onnx_places_are_found_wherever_a_graph_can_hide_them(tmp_path):
    "In a branch of an If, in a function, in a sparse tensor, in a list of tensors"
    from mlserve.package.programs.external_data import external_files
    from onnx import TensorProto, helper

    def tensor(name="t"):
        t = TensorProto(name=name, dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
        t.external_data.add(key="location", value="../outside")
        return t
    constant = helper.make_node("Constant", [], ["c"], value=tensor())
    branch = helper.make_graph([constant], "branch", [], [])
    sparse = helper.make_graph([], "g", [], [])
    sparse.sparse_initializer.add().values.CopyFrom(tensor())
    listed = helper.make_node("X", [], ["c"])
    listed.attribute.add(name="many").tensors.add().CopyFrom(tensor())
    default = helper.make_function("d", "f", [], ["c"], [constant], [helper.make_opsetid("", 20)])
    plain = helper.make_graph([], "g", [], [])
    models = {"an initialiser": helper.make_model(helper.make_graph([], "g", [], [], [tensor()])), "a constant": helper.make_model(helper.make_graph([constant], "g", [], [])),
              "a branch": helper.make_model(helper.make_graph([helper.make_node("If", ["i"], ["o"], then_branch=branch, else_branch=plain)], "g", [], [])),
              "a sparse tensor": helper.make_model(sparse), "a list": helper.make_model(helper.make_graph([listed], "g", [], [])),
              "a function": helper.make_model(plain, functions=[default])}
    for what, model in models.items():
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(Refused, match="not a plain name"):
            external_files(tmp_path / "m.onnx")
        assert what


def test_the_walk_through_onnx_survives_any_bytes(packages, tmp_path):
    from mlserve.package.programs.external_data import external_files
    good = (packages["onnx"].path / "model.onnx").read_bytes()
    numbers = np.random.default_rng(0)
    for n in range(300):
        data = bytearray(good[:numbers.integers(1, len(good))] if n % 2 else good)
        for at in numbers.integers(0, len(data), 3):
            data[at] = numbers.integers(256)
        (tmp_path / "m.onnx").write_bytes(data)
        try:
            external_files(tmp_path / "m.onnx")
        except Refused:
            pass


# ---- no torch where none is needed

def test_the_serving_wing_imports_no_framework():
    program = ("import importlib, pathlib, sys, mlserve.serving as s\n"
               "for f in pathlib.Path(s.__file__).parent.glob('*.py'): importlib.import_module(f'mlserve.serving.{f.stem}')\n"
               "print(sorted({'torch', 'onnxruntime', 'onnx', 'mlflow', 'pandas'} & set(sys.modules)))")
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_an_onnx_package_is_served_where_torch_cannot_be_imported(packages):
    program = ("import sys; sys.modules['torch'] = None\n"
               "from mlserve.package import load_package\nfrom mlserve.serving.model.device import claim\n"
               "from mlserve.serving.model import load_model\nfrom mlserve.serving.model.warmup import prove, warm\n"
               "p = load_package(sys.argv[1]); m = load_model(p, claim('cpu'), 1); warm(m, p, 4); print(prove(m, p).passed, m.devices())")
    done = run(sys.executable, "-c", program, packages["onnx"].path)
    assert done.stdout.strip() == "True ['cpu']", done.stderr
    done = run(sys.executable, "-c", program, packages["export"].path)
    assert done.returncode and "needs torch, which is not installed" in done.stderr


# ---- what comes along

HANDLER = """from pathlib import Path
import numpy as np

def preprocess(numbers: list[float]) -> dict:
    offset = float((Path(__file__).parent/"files"/"words"/"offset.txt").read_text())
    a = np.array([numbers], np.float32) + np.float32(offset)
    return {"a": a, "b": np.zeros((1, 3), np.float32)}

def postprocess(outputs: dict, request) -> int:
    return int(outputs["best"][0])
"""


def test_a_handler_and_its_files_travel_in_every_format(tmp_path, trap):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "offset.txt").write_text("0.5")
    for format in ("onnx", "safetensors"):
        (tmp_path / "handler.py").write_text(HANDLER + (CLASS if format == "safetensors" else ""))
        package = save(tmp_path / "p", format, handler=tmp_path / "handler.py", files=[tmp_path / "words"])
        assert package.handler == "handler.py" and "files/words/offset.txt" in (package.path / "package.lock").read_text()
        model = load_model(load_package(package.path, package.digest), claim("cpu"))
        arrays = model.handler.prepare([0.0, 1.0, 2.0, 3.0], package.inputs)
        assert arrays["a"].tolist() == [[0.5, 1.5, 2.5, 3.5]]
        assert model.handler.respond(model.predict(arrays), None) in (0, 1, 2)
    (tmp_path / "words" / "vocabulary").write_bytes(pickle.dumps(trap[0]))
    with pytest.raises(Refused, match="vocabulary"):
        save(tmp_path / "q", "onnx", handler=tmp_path / "handler.py", files=[tmp_path / "words"])
    assert not trap[1].exists() and not (tmp_path / "q" / "onnx").exists()


# ---- what is given

class Sum(nn.Module):
    def forward(self, ids, mask):
        return ids + 2 * mask


def given(**more):
    return {"model": nn.Linear(4, 2), "name": "net", "inputs": {"x": torch.rand(3, 4)}, "outputs": ["y"]} | more


@pytest.mark.parametrize("change,sentence", [
    ({"inputs": [torch.rand(3, 4)]}, "inputs is of type list; a dictionary"),
    ({"inputs": torch.rand(3, 4)}, "inputs is of type Tensor; a dictionary"),
    ({"inputs": {}}, "inputs is empty"),
    ({"inputs": {3: torch.rand(3, 4)}}, "An input is named 3"),
    ({"inputs": {"x": [[1.0, 2.0], [3.0]]}}, "Example 'x' (list) cannot become an array"),
    ({"inputs": {"x": torch.ones(3, 4, dtype=torch.float8_e4m3fn)}}, "Example 'x' (torch.float8_e4m3fn) cannot become an array. Give numbers of a type that NumPy has"),
    ({"inputs": {"x": torch.tensor(3.0)}}, "Example 'x' is a single value"),
    ({"inputs": {"x": None}}, "Example 'x' is a single value"),
    ({"inputs": {"x": ["a", "b"]}}, "Example 'x' holds text; a torch module takes numbers. Let a handler"),
    ({"inputs": {"x": [[0.5] * 4]}}, "Example 'x' is float64, the model's weights are float32. Give np.asarray(x, 'float32')."),
    ({"inputs": {"x": [[1] * 4]}}, "Example 'x' is int64, the model's weights are float32."),
    ({"outputs": "y"}, "outputs is of type str; a list of names"),
    ({"output": ["y"]}, "save_package has no argument 'output'; it has model, path, name, inputs, outputs, "),
    ({"batch_axes": {"x": 1}}, "Did you mean 'batch_axis'?"),
    ({"outputs": None}, "outputs is of type NoneType"),
    ({"outputs": [1]}, "An output is named 1"),
    ({"outputs": ["y", "y"]}, "Two of the outputs are named 'y'"),
    ({"outputs": ["y", "z"]}, "The model gave 1 of the 2 outputs named y, z"),
    ({"model": "net", "outputs": ["y"]}, "There is no model file net"),
    ({"model": net(), "inputs": EXAMPLE}, "The model gave sum, best; outputs names y."),
    ({"tolerance": 1e-3}, "tolerance is of type float; a dictionary of rtol and atol"),
    ({"tolerance": {"rtol": 1e-3}}, "needs rtol and atol"),
    ({"tolerance": {"rtol": "a little", "atol": 0}}, "rtol is 'a little'"),
    ({"tolerance": {"rtol": float("nan"), "atol": 0}}, "rtol is nan"),
    ({"tolerance": {"rtol": 1, "atol": 0}}, "rtol is 1; a number from 0 to 0.1 is allowed"),
    ({"tolerance": {"rtol": 0, "atol": 1e30}}, "atol is 1e+30; a tenth of the largest"),
    ({"tolerance": {"rtol": 0, "atol": float("inf")}}, "atol is inf"),
    ({"name": 3}, "name is of type int; text is allowed"),
    ({"path": 3}, "path is of type int"),
    ({"files": "net.py"}, "files is of type str; a list of paths"),
    ({"arguments": {"size": np.int64(3)}, "format": "safetensors", "handler": "net.py"}, "arguments cannot be written as JSON"),
    ({"handler": 3}, "The handler is 3; allowed are True"),
    ({"format": "ONNX"}, "Did you mean 'onnx'?"),
    ({"format": "pt"}, "The format 'pt' is not known"),
    ({"format": ["onnx"]}, "is not known"),
])
def test_what_cannot_be_saved_gets_a_sentence(change, sentence, tmp_path):
    with pytest.raises(MlserveError) as e:
        save_package(**{"path": tmp_path / "p", **given(**change)})
    assert sentence in str(e.value) and len(str(e.value)) < 300
    assert e.value.code in (2, 7, 8) and not (tmp_path / "p").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_swapped_inputs_are_not_saved(format, tmp_path):
    (tmp_path / "net.py").write_text("import torch\nclass Sum(torch.nn.Module):\n    def forward(self, ids, mask): return ids + 2 * mask\n")
    more = {"format": format, "outputs": ["y"], "handler": tmp_path / "net.py" if format == "safetensors" else None}
    ids, mask = torch.rand(3, 4), torch.ones(3, 4)
    with pytest.raises(UsageError, match="forward takes ids, mask; inputs gives mask, ids. Give the inputs in that order"):
        save_package(Sum(), tmp_path / "p", "net", {"mask": mask, "ids": ids}, **more)
    for names in (("ids", "mask"), ("a", "b")):
        if format != "safetensors":
            save_package(Sum(), tmp_path / "p", "net", dict(zip(names, (ids, mask))), **more)


def test_a_file_of_torch_is_held_to_the_order_of_its_forward(tmp_path):
    ids, mask = torch.rand(3, 4), torch.ones(3, 4)
    for format in ("torchscript", "export"):
        package = save_package(Sum(), tmp_path / "p", "net", {"ids": ids, "mask": mask}, ["y"], format=format)
        file = shutil.copy(package.path / FORMATS[format], tmp_path)
        if format == "torchscript":
            with pytest.raises(UsageError, match="forward takes ids, mask"):
                save_package(file, tmp_path / "q", "net", {"mask": mask, "ids": ids}, ["y"])
        save_package(file, tmp_path / "q", "net", {"ids": ids, "mask": mask}, ["y"], format=format)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean()


class Total(nn.Module):
    def forward(self, x):
        return x.sum(0)


class Root(nn.Module):
    def forward(self, x):
        return (x - 0.5).sqrt()


class Spread(nn.Module):
    def forward(self, x):
        return x / x.std(0)


@pytest.mark.parametrize("model,sentence", [(Mean(), "gave a single value of 'y' for a batch of 3; the first dimension"),
    (Total(), "gave 4 rows of 'y' for a batch of 3; the first dimension"), (Root(), "The model gives NaN on the example at y[0, 0]")])
def test_an_answer_that_cannot_be_recorded_gets_a_sentence(model, sentence, tmp_path):
    with pytest.raises(MlserveError) as e:
        save_package(model, tmp_path / "p", "net", {"x": torch.zeros(3, 4)}, ["y"])
    assert sentence in str(e.value)


def test_nan_on_another_batch_size_is_named_too(tmp_path):
    with pytest.raises(CheckFailed, match="NaN on the example in a batch of 1|The same rows"):
        save_package(Spread(), tmp_path / "p", "net", {"x": torch.rand(3, 4)}, ["y"])


def test_a_model_of_scikit_learn_is_told_the_way(tmp_path):
    Forest = type("Forest", (), {"__module__": "sklearn.ensemble"})
    with pytest.raises(UsageError, match=r"type Forest.*Convert it and give the path of the .onnx file, format='onnx'"):
        save_package(Forest(), tmp_path / "p", "net", {"x": torch.rand(3, 4)}, ["y"])


# ---- MLflow

@pytest.mark.parametrize("format", FORMATS)
def test_mlflow_loads_every_format_and_shows_its_example(format, packages):
    import mlflow
    package = packages[format]
    inputs, expected = golden(package)
    described = mlflow.models.Model.load(str(package.path))
    assert described.signature.inputs.input_names() == ["a", "b"]
    example = described.load_input_example(str(package.path))
    assert (example["a"] == inputs["a"][:1]).all() and example["a"].dtype == np.float32
    model = mlflow.pyfunc.load_model(str(package.path))
    assert compare(expected, model.predict(inputs), **package.tolerance).passed
    assert load_package(package.path, package.digest) == package  # reading left it as it was


def test_mlflow_serves_the_same_answers_over_http(packages, tmp_path):
    package = packages["onnx"]
    inputs, expected = golden(package)
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = open(tmp_path / "log", "w")
    command = [Path(sys.executable).parent / "mlflow", "models", "serve", "-m", str(package.path), "-h", "127.0.0.1", "-p", str(port), "--env-manager", "local"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                if httpx.get(url + "/ping", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.25)
        answer = httpx.post(url + "/invocations", json={"inputs": {k: v.tolist() for k, v in inputs.items()}}, trust_env=False, timeout=60)
        assert answer.status_code == 200, answer.text
        got = {k: np.asarray(v, expected[k].dtype) for k, v in answer.json()["predictions"].items()}
        assert compare(expected, got, **package.tolerance).passed
        example = httpx.post(url + "/invocations", content=(package.path / "serving_input_example.json").read_text(), headers={"content-type": "application/json"}, trust_env=False)
        assert example.status_code == 200
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)
