"""Packages and model files that somebody else made: read whole, with limits, and refused by a sentence."""
import json
import math
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlserve.package.arrays import save_tensors
from mlserve.package.export.confined import ConfinedProgram, ProofLimits
from mlserve.errors import IntegrityError, MlserveError, Refused
from mlserve.package.lock import parse_lock, write_lock
from mlserve.package.mlmodel import parse_mlmodel
from mlserve.package import golden, load_environment, load_package, save_package
from mlserve.tensors import DATATYPES

X = np.random.default_rng(0).random((3, 4), np.float32)


# ---- W11: a foreign model has limits

def onnx_file(path, nodes, functions=(), initializers=()):
    import onnx
    from onnx import TensorProto, helper
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], list(initializers))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("bomb", 1)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=list(functions)), path)
    return path


def function_bomb(path):
    "Functions that each call the one below eight times: 8^12 nodes when they are written out"
    from onnx import helper
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("bomb", 1)]
    names = [f"f{n}" for n in range(12)]
    functions = [helper.make_function("bomb", "f0", ["a"], ["b"], [helper.make_node("Sin", ["a"], ["b"])], opsets)]
    for below, name in zip(names, names[1:]):
        calls = [helper.make_node(below, [f"t{n}" if n else "a"], [f"t{n + 1}" if n < 7 else "b"], domain="bomb") for n in range(8)]
        functions.append(helper.make_function("bomb", name, ["a"], ["b"], calls, opsets))
    return onnx_file(path, [helper.make_node(names[-1], ["x"], ["y"], domain="bomb")], functions)


def endless_loop(path):
    from onnx import TensorProto, helper
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Sin", ["v"], ["v2"])], "body",
                             [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("c", TensorProto.BOOL, []), helper.make_tensor_value_info("v", TensorProto.FLOAT, None)],
                             [helper.make_tensor_value_info("c2", TensorProto.BOOL, []), helper.make_tensor_value_info("v2", TensorProto.FLOAT, None)])
    return onnx_file(path, [helper.make_node("Loop", ["", "yes", "x"], ["y"], body=body)], initializers=[helper.make_tensor("yes", TensorProto.BOOL, [], [True])])


def large_constant(path):
    "A few bytes that ask for 4.8 GB"
    from onnx import TensorProto, helper
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1_200_000, 1000])
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["big"], value=one), helper.make_node("ReduceMax", ["big"], ["most"], keepdims=0), helper.make_node("Add", ["x", "most"], ["y"])]
    return onnx_file(path, nodes, initializers=[shape])


@pytest.mark.parametrize("bomb, limits", [(function_bomb, {"seconds": 10, "memory": 2**28}), (endless_loop, {"seconds": 6}), (large_constant, {"memory": 2**29})])
def test_a_foreign_onnx_without_end_is_refused_within_its_limits(bomb, limits, tmp_path, monkeypatch):
    monkeypatch.setattr(ConfinedProgram.__init__, "__defaults__", (ProofLimits(**limits),))
    file = bomb(tmp_path / "bomb.onnx")
    assert file.stat().st_size < 20_000
    start = time.monotonic()
    with pytest.raises(Refused, match=r"'bomb.onnx' is refused. It (took too|ended)") as e:
        save_package(file, tmp_path / "p", "bomb", {"x": X}, ["y"], format="onnx")
    assert e.value.code == 8 and time.monotonic() - start < 60 and not (tmp_path / "p").exists()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [c for c in children if b"serve_confined" in Path(f"/proc/{c}/cmdline").read_bytes()]


def test_an_honest_file_has_room_within_the_limits(tmp_path):
    "Saved, and the same as in this process"
    file = onnx_file(tmp_path / "sine.onnx", [__import__("onnx").helper.make_node("Sin", ["x"], ["y"])])
    package = save_package(file, tmp_path / "p", "sine", {"x": X}, ["y"], format="onnx")
    assert np.allclose(golden(package)[1]["y"], np.sin(X))


def test_a_scripted_file_without_end_is_refused(tmp_path, monkeypatch):
    class Endless(torch.nn.Module):
        def forward(self, x):
            while bool((x < 2).all()):
                x = x * 1
            return x
    torch.jit.script(Endless()).save(str(tmp_path / "endless.pt"))
    monkeypatch.setattr(ConfinedProgram.__init__, "__defaults__", (ProofLimits(seconds=12),))
    with pytest.raises(Refused, match="took too long for .*; allowed are 12 s"):
        save_package(tmp_path / "endless.pt", tmp_path / "p", "endless", {"x": X}, ["y"])


# ---- a package is read whole

@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return save_package(torch.nn.Linear(4, 2), tmp_path_factory.mktemp("foreign") / "p", "net", {"x": X}, ["y"])


def ours(package):
    return json.loads((package.path / "MLmodel").read_text())["flavors"]["mlserve"]


def rewritten(package, tmp_path, **files):
    "A copy of a package with some files changed, and locked again"
    import shutil
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(package.path, folder)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    write_lock(folder)
    return folder


SPEC = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
WRONG = {"file": ([], "../model.pt", "model.onnx", 1), "name": ("", "A b", None, ["x"]), "format": ("pickle", None, []), "tolerance": (None, {}, {"rtol": math.inf, "atol": 0}, {"rtol": True, "atol": 0}, {"rtol": -1, "atol": 0}, {"rtol": 10**400, "atol": 0}),
         "inputs": ([], None, [SPEC, SPEC], [{}], [SPEC | {"shape": []}], [SPEC | {"shape": [-1, 0]}], [SPEC | {"datatype": "BF16"}], [SPEC | {"name": ""}], {"x": SPEC}), "outputs": ([SPEC, SPEC], "y"),
         "handler": ("../x.py", 1, "model.pt"), "module": (1, {"class": "os.system", "arguments": {}}, {"class": "Net"}), "batch": (1, None), "nonfinite": ("yes", True), "providers": (None, "cuda", ["tensorrt"], ["tensorrt", "cuda"]), "unknown": (1,)}


@pytest.mark.parametrize("key, value", [(k, v) for k, vs in WRONG.items() for v in vs], ids=str)
def test_a_wrong_field_of_mlmodel_is_refused(key, value, package, tmp_path):
    text = json.dumps({"flavors": {"mlserve": ours(package) | {key: value}}}).encode()
    with pytest.raises(IntegrityError, match="MLmodel") as e:
        load_package(rewritten(package, tmp_path, MLmodel=text))
    assert e.value.code == 5 and len(str(e.value)) < 400


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["FP32", "x", "strings", "model.pt", "handler.py"]),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["rtol", "atol", "name", "datatype", "shape", "class", "arguments"]) | st.text(max_size=4), inner, max_size=4), max_leaves=12)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from([*WRONG]), value=JSON)
def test_whatever_stands_in_mlmodel_is_read_or_refused(package, key, value):
    try:
        found = parse_mlmodel(json.dumps({"flavors": {"mlserve": ours(package) | {key: value}}}).encode())
    except MlserveError as e:
        assert e.code in (5, 8)
    else:
        assert key != "unknown" and found[key] == value


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=60) | st.sampled_from([b"[" * 10**5, b'{"flavors":' * 10**4, b"{}", b'{"flavors": {"mlserve": []}}', b"\xff"]))
def test_bytes_that_are_no_mlmodel_are_refused(data):
    with pytest.raises(IntegrityError):
        parse_mlmodel(data)


def arrays(**change):
    return {"inputs": {"x": X}, "outputs": {"y": np.zeros((3, 2), np.float32)}} | change


WRONG_GOLDEN = {
    "no rows": arrays(inputs={"x": X[:0]}, outputs={"y": np.zeros((0, 2), np.float32)}), "other rows": arrays(outputs={"y": np.zeros((2, 2), np.float32)}),
    "another name": arrays(inputs={"z": X}), "one too many": arrays(inputs={"x": X, "z": X}), "another type": arrays(inputs={"x": X.astype(np.float64)}),
    "another shape": arrays(outputs={"y": np.zeros((3, 3), np.float32)}), "no outputs": {"inputs": {"x": X}}, "another group": arrays(labels={"y": np.zeros(3)}), "a single value": arrays(inputs={"x": np.float32(1)}),
}


@pytest.mark.parametrize("what", WRONG_GOLDEN)
def test_golden_data_that_is_not_the_packages_is_refused(what, package, tmp_path):
    save_tensors(tmp_path / "golden", **WRONG_GOLDEN[what])
    folder = rewritten(package, tmp_path, **{"golden.safetensors": (tmp_path / "golden").read_bytes()})
    with pytest.raises(IntegrityError, match="golden.safetensors") as e:
        golden(load_package(folder))
    assert e.value.code == 5


@pytest.mark.parametrize("header", [b"{" * 10**5, json.dumps({"__metadata__": {"bytes": "[" * 10**5}}).encode(), b'{"inputs/x": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4]}}',
                                    b'{"inputs/x": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}, "__metadata__": {"bytes": "{\\"inputs/x\\": [-1]}"}}'])
def test_a_golden_file_that_lies_is_refused(header, package, tmp_path):
    folder = rewritten(package, tmp_path, **{"golden.safetensors": len(header).to_bytes(8, "little") + header + b"1234"})
    with pytest.raises(IntegrityError, match="golden.safetensors"):
        golden(load_package(folder))


def test_a_tolerance_within_which_any_answer_lies_is_refused(package, tmp_path):
    "Zeros are within it, and a server that gives them would be ready"
    largest = float(np.abs(golden(package)[1]["y"]).max())
    for atol in (largest, 1e30):
        text = json.dumps({"flavors": {"mlserve": ours(package) | {"tolerance": {"rtol": 0, "atol": atol}}}}).encode()
        with pytest.raises(Refused, match="a tenth of the largest 'y'") as e:
            golden(load_package(rewritten(package, tmp_path, MLmodel=text)))
        assert e.value.code == 8
    for rtol, code in ((1, 5), (0.05, 0)):
        text = json.dumps({"flavors": {"mlserve": ours(package) | {"tolerance": {"rtol": rtol, "atol": largest / 20}}}}).encode()
        folder = rewritten(package, tmp_path, MLmodel=text)
        if not code:
            golden(load_package(folder))
            continue
        with pytest.raises(IntegrityError, match="tolerance"):
            load_package(folder)


def test_the_default_tolerance_fits_answers_of_any_size(tmp_path):
    "Zeros and what is no number included"
    for size in (0, 1e-6, 1e6, math.nan):
        class Scaled(torch.nn.Module):
            def forward(self, x):
                return x.half() * size
        package = save_package(Scaled(), tmp_path / "p", "net", {"x": X}, ["y"], nonfinite="strings")
        assert golden(package)[1]["y"].dtype == np.float16


def test_files_that_are_read_whole_have_a_limit(package, tmp_path):
    for name in ("MLmodel", "environment.json"):
        folder = rewritten(package, tmp_path, **{name: b" " * (5 * 2**20)})
        with pytest.raises(Refused, match=f"'{name}' .* 4194304 bytes"):
            load_environment(load_package(folder))
    for name in ("MLmodel", "environment.json"):
        with pytest.raises(IntegrityError, match=name):
            load_environment(load_package(rewritten(package, tmp_path, **{name: b"[" * 10**5})))


def test_a_lock_of_gigabytes_on_a_volume_costs_no_memory(package, tmp_path):
    folder = rewritten(package, tmp_path)
    with open(folder / "package.lock", "r+b") as f:
        f.truncate(3 * 2**30)
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\nfrom mlserve.errors import Refused\nfrom mlserve.package import load_package\n" \
           "try: load_package(sys.argv[1])\nexcept Refused as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    assert "more than the 4194304 bytes" in done.stdout, done.stderr


# ---- names of files

@pytest.mark.parametrize("name", [b"a\nb", b"a\x01b", b"caf\xe9", "a\u2028b".encode(), b"a\x7f"])
def test_a_name_that_is_no_plain_text_is_refused_at_save_and_in_a_lock(name, tmp_path):
    (tmp_path / "words").mkdir()
    with open(os.fsencode(tmp_path / "words") + b"/" + name, "w"):
        pass
    with pytest.raises(Refused, match="plain paths in UTF-8") as e:
        save_package(torch.nn.Linear(4, 2), tmp_path / "p", "net", {"x": X}, ["y"], files=[tmp_path / "words"])
    assert e.value.code == 8 and not (tmp_path / "p").exists()
    with pytest.raises((Refused, IntegrityError)):
        parse_lock(name + b" 0 " + b"0" * 64 + b"\n")


def test_folders_in_folders_have_an_end_though_no_lock_names_them(package, tmp_path):
    "An empty folder is in no lock, and a walk that recurses ends the server with RecursionError"
    folder = rewritten(package, tmp_path)
    nested = [folder]
    for _ in range(1200):
        nested.append(nested[-1] / "a")
        nested[-1].mkdir()
    try:
        with pytest.raises(Refused, match="32 parts") as e:
            load_package(folder)
        assert e.value.code == 8
    finally:
        for inner in reversed(nested[1:]):
            inner.rmdir()
    load_package(folder)


def test_a_folder_that_may_not_be_read_is_no_file(package, tmp_path, monkeypatch):
    "Kubernetes mounts volumes that have lost+found, of root alone"
    folder = rewritten(package, tmp_path)
    (folder / "lost+found").mkdir()
    good = os.listdir
    def listdir(path):
        if os.fspath(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return good(path)
    monkeypatch.setattr(os, "listdir", listdir)
    load_package(folder)


def test_a_lock_of_long_names_costs_what_it_holds():
    "Each prefix of each name was made: 1.4 GB for 4 MiB"
    line = b"/a" * 31 + b" 1 " + b"0" * 64 + b"\n"
    lock = b"".join(b"%05d" % i + line for i in range(4 * 2**20 // (len(line) + 5)))
    tracemalloc.start()
    try:
        assert len(parse_lock(lock)) == lock.count(b"\n")
        assert tracemalloc.get_traced_memory()[1] < 8 * len(lock)
    finally:
        tracemalloc.stop()
    with pytest.raises(Refused, match="32 parts"):
        parse_lock(b"a/" + lock)


def test_what_a_lock_names_has_a_limit_before_it_is_hashed(package, tmp_path):
    "A sparse file of 16 TB takes no disk, and a day to hash"
    folder = rewritten(package, tmp_path)
    with open(folder / "package.lock", "a") as f:
        f.write(f"large {2**38} {'0' * 64}\n")
    with pytest.raises(Refused, match=f"allowed are {2**38}") as e:
        load_package(folder)
    assert e.value.code == 8


def test_sizes_are_compared_before_anything_is_hashed(package, tmp_path, monkeypatch):
    "Six gigabytes of zeros are hashed for half a minute"
    folder = rewritten(package, tmp_path)
    with open(folder / "a", "wb") as large, open(folder / "package.lock", "a") as lock:
        large.truncate(6 * 2**30)
        lock.write(f"a {6 * 2**30} {'0' * 64}\nz 1 {'0' * 64}\n")
    (folder / "z").write_text("zz")
    monkeypatch.setattr("mlserve.package.lock.file_hash", lambda file: pytest.fail(f"{file} is hashed"))
    with pytest.raises(IntegrityError, match="'z' .* expected 1 bytes, got 2 bytes"):
        load_package(folder)


@pytest.mark.parametrize("name", ["MLmodel", "package.lock", "golden.safetensors", "environment.json", "handler.py", "registered_model_meta", "mlmodel", "files/words", "model.onnx"])
def test_weights_of_an_onnx_file_cannot_take_the_packages_own_names(name, tmp_path):
    from onnx import TensorProto, helper
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value=name)
    (tmp_path / "files").mkdir()
    (tmp_path / name).write_bytes(bytes(16))
    file = onnx_file(tmp_path / "net.onnx", [helper.make_node("Add", ["x", "w"], ["y"])], initializers=[weights])
    with pytest.raises(Refused, match="name of the package's own") as e:
        save_package(file, tmp_path / "p", "net", {"x": X}, ["y"], format="onnx")
    assert e.value.code == 8


@pytest.mark.parametrize("name", ["*/_ORT_MEM_ADDR_/*", "*/_ORT_NATIVE_ENDIAN_MEM_ADDR_/*"])
def test_weights_at_an_address_in_memory_are_refused(name, tmp_path):
    "The runtime's own mark for data that is in its process already, at the offset; here a file has that name"
    from onnx import TensorProto, helper
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value=name)
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(bytes(16))
    file = onnx_file(tmp_path / "net.onnx", [helper.make_node("Add", ["x", "w"], ["y"])], initializers=[weights])
    with pytest.raises(Refused, match="address in memory"):
        save_package(file, tmp_path / "p", "net", {"x": X}, ["y"], format="onnx")


def test_a_tensor_in_two_pieces_is_refused(tmp_path):
    "A protocol buffer joins what comes twice: the one piece has the shape, the other the data"
    from onnx import TensorProto, helper

    from mlserve.package.programs.external_data import external_files
    file = onnx_file(tmp_path / "net.onnx", [helper.make_node("Constant", [], ["y"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.0]))])
    assert external_files(file) == []
    import onnx
    model = onnx.load(file)
    value = model.graph.node[0].attribute[0].t
    whole, shape, data = value.SerializeToString(), TensorProto(dims=[1 << 20]).SerializeToString(), TensorProto(name="v", data_type=TensorProto.FLOAT, raw_data=bytes(4)).SerializeToString()

    def field(number, data):
        size = len(data)
        return bytes([number << 3 | 2]) + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + data
    attribute = model.graph.node[0].attribute[0].SerializeToString().replace(field(5, whole), field(5, shape) + field(5, data))
    node = model.graph.node[0]
    node.ClearField("attribute")
    node = node.SerializeToString() + field(5, attribute)
    model.graph.ClearField("node")
    graph = field(1, node) + model.graph.SerializeToString()
    model.ClearField("graph")
    file.write_bytes(model.SerializeToString() + field(7, graph))
    assert list(onnx.load(file).graph.node[0].attribute[0].t.dims) == [1 << 20]
    with pytest.raises(Refused, match="in pieces"):
        external_files(file)


@pytest.mark.parametrize("what, fields", {"beyond the end": {"offset": "1000000", "length": "16"}, "shorter than the shape": {"length": "4"}, "negative": {"offset": "-16", "length": "16"}, "no number": {"offset": "x"}}.items())
def test_weights_outside_their_file_are_refused(what, fields, tmp_path):
    from onnx import TensorProto, helper
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": "w.bin"} | fields).items():
        weights.external_data.add(key=key, value=value)
    (tmp_path / "w.bin").write_bytes(bytes(16))
    file = onnx_file(tmp_path / "net.onnx", [helper.make_node("Add", ["x", "w"], ["y"])], initializers=[weights])
    with pytest.raises(Refused, match="'w' is described as 4 items"):
        save_package(file, tmp_path / "p", "net", {"x": X}, ["y"], format="onnx")


def test_every_type_of_onnx_that_numpy_has_is_measured_rightly(tmp_path):
    "Raw and listed data of honest tensors pass"
    from onnx import helper, numpy_helper

    from mlserve.package.programs.external_data import external_files
    tensors = []
    for dtype in {d for d in DATATYPES.values() if d != object}:
        a = np.arange(6).reshape(2, 3).astype(dtype)
        tensors += [numpy_helper.from_array(a, f"raw {dtype}"), helper.make_tensor(f"listed {dtype}", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), a.shape, a.flatten().tolist())]
    tensors += [helper.make_tensor("text", 8, [2], [b"a", b""]), helper.make_tensor("none", 1, [0, 3], []), helper.make_tensor("single", 7, [], [-5])]
    assert external_files(onnx_file(tmp_path / "net.onnx", [helper.make_node("Sin", ["x"], ["y"])], initializers=tensors)) == []
