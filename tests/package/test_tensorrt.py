"""TensorRT as a choice of an ONNX package, on a machine without one: an onnxruntime that says what it was asked for, and a library of TensorRT of a few bytes."""
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import torch

from mlserve.errors import GpuRefused, IntegrityError, LocalResource, Refused, UsageError
from mlserve.package import load_package, load_program, save_package
from mlserve.package.lock import write_lock
from mlserve.package.programs import onnx_program
from mlserve.package.programs.onnx_program import CUDA, TENSORRT, Engines, OnnxProgram, load_tensorrt, read_onnx
from mlserve.serving.model.device import Device
from mlserve.tensors import TensorSpec

BOTH = ("tensorrt", "cuda")
X = np.random.default_rng(0).random((5, 4), np.float32)
H100 = Device("cuda", 1, "H100", driver="13.0", capability="9.0")
NVIDIA = "import ctypes, glob, os\nfor f in glob.glob(os.path.dirname(__file__) + '/*.so*'): ctypes.CDLL(f)\n"


def wheel(site, name, version):
    "NVIDIA's wheel in a folder: a library with its name, which its package loads"
    folder = site / "tensorrt_libs"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(NVIDIA)
    (folder / "x.c").write_text(f"int getInferLibVersion(void) {{ return {version}; }}")
    subprocess.run([shutil.which("cc") or "gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, folder / "x.c"], check=True)


class Runtime:
    "What stands in for onnxruntime: its sessions, and which providers become active"

    def __init__(self, home, monkeypatch):
        self.home, self.made, self.during = home, [], lambda folder: None
        self.built = self.loaded = [TENSORRT, CUDA, "CPUExecutionProvider"]
        (home / "capi").mkdir(parents=True)
        monkeypatch.setattr(ort, "__file__", str(home / "__init__.py"))
        monkeypatch.setattr(ort, "get_available_providers", lambda: self.built)
        monkeypatch.setattr(ort, "preload_dlls", lambda: None)
        monkeypatch.setattr(ort, "InferenceSession", self.session)
        self.needs("libnvinfer.so.4242")

    def needs(self, library):
        (self.home / "capi/libonnxruntime_providers_tensorrt.so").write_bytes(b"\x7fELF\0libcudart.so.13\0" + library.encode() + b"\0libnvonnxparser.so.10\0")

    def session(self, file, options, providers):
        self.made.append(providers)
        for name, given in providers:
            if name == TENSORRT and name in self.loaded:
                open(given["trt_engine_cache_path"] + "/a.engine", "wb").close()
                self.during(given["trt_engine_cache_path"])
        return SimpleNamespace(get_providers=lambda: self.loaded)


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    wheel(tmp_path / "site", "libnvinfer.so.4242", 101601)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.delitem(sys.modules, "tensorrt_libs", raising=False)
    yield Runtime(tmp_path / "onnxruntime", monkeypatch)
    sys.modules.pop("tensorrt_libs", None)


@pytest.fixture
def engines(tmp_path):
    inputs = (TensorSpec("image", "FP32", (-1, 3, 8)), TensorSpec("age", "INT64", (-1,)), TensorSpec("word", "BYTES", (-1, 1)))
    return Engines(tmp_path / "cache", "sha256:0123", "H100 9.0", "13.0", 32, inputs)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return save_package(torch.nn.Linear(4, 2), tmp_path_factory.mktemp("tensorrt") / "p", "net", {"x": X}, ["y"], format="onnx", providers=BOTH)


def left(engines):
    "What the cache has: names in it, hidden ones too"
    folder = engines.cache / "tensorrt"
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


# ---- the session

def read(tmp_path, engines=None):
    return read_onnx(tmp_path / "model.onnx", "cuda:1", 2, engines)


def test_tensorrt_comes_before_cuda_with_a_cache_and_a_profile(runtime, engines, tmp_path):
    program = read(tmp_path, engines)
    [[(first, options), second]] = runtime.made
    folder = options.pop("trt_engine_cache_path")
    assert first == TENSORRT and second == (CUDA, {"device_id": 1, "use_tf32": 0})
    assert options == {"device_id": 1, "trt_engine_cache_enable": True, "trt_timing_cache_enable": True, "trt_timing_cache_path": folder,
                       "trt_profile_min_shapes": "image:1x3x8,age:1", "trt_profile_opt_shapes": "image:32x3x8,age:32", "trt_profile_max_shapes": "image:32x3x8,age:32"}
    assert (program.device, program.provider) == ("cuda:1", TENSORRT)


def test_without_the_choice_cuda_is_asked_for_alone(runtime, tmp_path):
    assert read(tmp_path).provider == CUDA and runtime.made == [[(CUDA, {"device_id": 1, "use_tf32": 0})]]
    assert not (tmp_path / "cache").exists() and os.environ["NVIDIA_TF32_OVERRIDE"] == "1"


def test_the_libraries_come_out_of_nvidias_wheel_and_tell_their_version(runtime):
    assert load_tensorrt() == "101601" and os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


def test_E14_a_library_of_another_major_version_is_refused(runtime, engines, tmp_path):
    runtime.needs("libnvinfer.so.4343")
    with pytest.raises(GpuRefused, match="needs libnvinfer.so.4343: .*cannot open.*tensorrt-cu13-libs") as e:
        read(tmp_path, engines)
    assert e.value.reason == "provider_inactive" and not runtime.made and not left(engines)


def test_E14_an_onnxruntime_that_was_built_without_tensorrt_is_refused(runtime, engines, tmp_path):
    runtime.built = [CUDA, "CPUExecutionProvider"]
    with pytest.raises(GpuRefused, match="this onnxruntime is built without it.*providers") as e:
        read(tmp_path, engines)
    assert e.value.reason == "provider_inactive" and not runtime.made
    assert read(tmp_path).provider == CUDA


@pytest.mark.parametrize("loaded, missing", [([CUDA, "CPUExecutionProvider"], TENSORRT), (["CPUExecutionProvider"], f"{TENSORRT}, {CUDA}")], ids=["cuda", "neither"])
def test_E14_tensorrt_that_is_not_active_is_refused_by_name(runtime, engines, tmp_path, loaded, missing):
    runtime.loaded = loaded
    with pytest.raises(GpuRefused) as e:
        read(tmp_path, engines)
    assert e.value.message == f"onnxruntime was asked for {missing} and is active with {', '.join(loaded)} only."
    assert e.value.reason == "provider_inactive" and "remove it" in e.value.mend and not left(engines)


def test_a_package_for_tensorrt_is_not_loaded_without_it(package):
    with pytest.raises(UsageError, match="tensorrt"):
        load_program(package, "cuda:0")


def profiled(tmp_path, ran):
    "A session that ran so many nodes by each provider"
    events = [{"cat": "Node", "args": {"provider": p, "op_name": "TRTKernel"}} for p, n in ran.items() for _ in range(n)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/profile.json").write_text(json.dumps(events))
    return SimpleNamespace(run=lambda *args: [], end_profiling=lambda: str(tmp_path / "run/profile.json"), get_providers=lambda: [TENSORRT, CUDA, "CPUExecutionProvider"])


def test_a_provider_that_fails_in_a_run_is_not_replaced_by_the_next_one(package):
    session, made_again = ort.InferenceSession(str(package.path / package.file), providers=["CPUExecutionProvider"]), []

    def fails(*args):
        raise ort.capi.onnxruntime_pybind11_state.EPFail("the GPU is gone")
    session._sess, session.set_providers = SimpleNamespace(run=fails), made_again.append
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.EPFail):
        OnnxProgram(session, "cuda:0").run({"x": np.ones((1, 4), "f4")}, ["y"])
    assert not made_again


def test_placement_tells_how_many_nodes_tensorrt_ran(tmp_path):
    found = OnnxProgram(profiled(tmp_path, {TENSORRT: 2, CUDA: 1}), "cuda:0", TENSORRT).placement({}, ["y"])
    assert found == {"providers": [TENSORRT, CUDA, "CPUExecutionProvider"], "nodes": {TENSORRT: 2, CUDA: 1}, "fell_back": []}


def test_E14_a_graph_of_which_nothing_ran_by_tensorrt_is_refused(tmp_path):
    with pytest.raises(GpuRefused, match=f"{TENSORRT} is active, and every node of the model fell back to {CUDA}") as e:
        OnnxProgram(profiled(tmp_path, {CUDA: 3}), "cuda:0", TENSORRT).placement({}, ["y"])
    assert e.value.reason == "provider_inactive"


def test_E14_control_what_was_asked_for_is_taken_for_what_is_there(runtime, engines, tmp_path, monkeypatch):
    runtime.needs("libnvinfer.so.4343")
    runtime.built = runtime.loaded = ["CPUExecutionProvider"]
    monkeypatch.setattr(onnx_program, "_needed", lambda: "libnvinfer.so.4242")
    monkeypatch.setattr(onnx_program, "_check_built", lambda wanted: None)
    monkeypatch.setattr(onnx_program, "_gpu_session", lambda file, threads, wanted, mend: ort.InferenceSession(file, None, wanted))
    assert read(tmp_path, engines).provider == TENSORRT
    assert OnnxProgram(profiled(tmp_path, {CUDA: 3}), "cuda:0").placement({}, ["y"])["nodes"] == {CUDA: 3}


# ---- the cache

def test_an_engine_is_built_once_and_kept_whole(runtime, engines, tmp_path):
    folder = engines.home(ort.__version__, "101601")
    for _ in range(2):
        read(tmp_path, engines)
    built, found = ([options["trt_engine_cache_path"] for name, options in made if name == TENSORRT][0] for made in runtime.made)
    assert built != found == str(folder) and left(engines) == [folder.name]
    assert [p.name for p in folder.iterdir()] == ["a.engine"] and folder.stat().st_mode & 0o777 == 0o755


def test_a_build_that_fails_leaves_nothing(runtime, engines, tmp_path):
    def killed(folder):
        raise RuntimeError("out of memory")
    runtime.during = killed
    with pytest.raises(RuntimeError):
        read(tmp_path, engines)
    assert left(engines) == []


def test_what_killed_builds_left_is_removed_a_day_later(runtime, engines, tmp_path):
    folder = engines.home(ort.__version__, "101601")
    others = [folder.with_name(name) for name in (f".{folder.name}-killed", f".{folder.name}-building", ".0123456789abcdef0123-killed")]
    for other in others:
        other.mkdir(parents=True)
    for other in (others[0], others[2]):
        os.utime(other, (0, 0))
    read(tmp_path, engines)
    assert left(engines) == sorted([folder.name, others[1].name, others[2].name])


def test_a_replica_that_was_quicker_is_believed(runtime, engines, tmp_path):
    folder = engines.home(ort.__version__, "101601")

    def other(_):
        folder.mkdir()
        (folder / "theirs.engine").touch()
    runtime.during = other
    assert read(tmp_path, engines).provider == TENSORRT
    assert left(engines) == [folder.name] and [p.name for p in folder.iterdir()] == ["theirs.engine"]


def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_built(runtime, engines, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(LocalResource, match="cannot be written: .* each start, which takes minutes.*MLSERVE_CACHE") as e:
        read(tmp_path, engines)
    assert e.value.code == 7 and not runtime.made


@pytest.mark.parametrize("part", ["package", "gpu", "driver", "rows", "runtime", "tensorrt"])
def test_each_part_of_the_key_gives_another_folder(engines, part):
    versions = {"runtime": "1.31.1", "tensorrt": "101601"}
    first = engines.home(**versions)
    if part in versions:
        other = engines.home(**versions | {part: "1.32.0"})
    else:
        other = replace(engines, **{part: 64 if part == "rows" else "other"}).home(**versions)
    assert other != first and other.parent == first.parent == engines.cache / "tensorrt" and engines.home(**versions) == first


def test_a_server_builds_for_its_package_its_gpu_and_its_batches(package, tmp_path, monkeypatch):
    from mlserve.serving import model
    asked = []
    program = OnnxProgram(profiled(tmp_path, {TENSORRT: 1}), "cuda:1", TENSORRT)
    monkeypatch.setattr(model, "check_framework", lambda *a: None)
    monkeypatch.setattr(model, "load_program", lambda *a: asked.append(a[-1]) or program)
    monkeypatch.setattr(OnnxProgram, "run", lambda *a: {})
    loaded = model.load_model(package, H100, 1, tmp_path / "cache", 3)
    assert asked == [Engines(tmp_path / "cache", package.digest, "H100 9.0", "13.0", 5, package.inputs)]  # five golden rows
    assert loaded.placement["nodes"] == {TENSORRT: 1}
    assert model._engines(package, H100, tmp_path, 64).rows == 64
    assert model._engines(package, Device("cpu"), tmp_path, 64) is model._engines(replace(package, providers=("cuda",)), H100, tmp_path, 64) is None


# ---- the package

def test_the_choice_stands_in_mlmodel_and_the_cpu_knows_nothing_of_it(package, tmp_path):
    assert json.loads((package.path / "MLmodel").read_text())["flavors"]["mlserve"]["providers"] == list(BOTH)
    assert load_package(package.path).providers == package.providers == BOTH
    assert load_program(package).session.get_providers() == ["CPUExecutionProvider"]
    plain = save_package(torch.nn.Linear(4, 2), tmp_path / "p", "net", {"x": X}, ["y"], format="onnx", providers=("cuda",))
    assert plain.providers == ("cuda",) and '"providers"' not in (plain.path / "MLmodel").read_text()


@pytest.mark.parametrize("given, said", [
    ({"providers": BOTH}, "format='torchscript'; it is allowed with 'onnx'"),
    ({"providers": BOTH, "format": "onnx", "batch": False}, "batch=False; it is allowed where requests may share"),
    ({"providers": ("cuda", "tensorrt"), "format": "onnx"}, r"allowed are \('cuda',\) and \('tensorrt', 'cuda'\).*comes after it"),
    ({"providers": "tensorrt", "format": "onnx"}, "providers is 'tensorrt'; allowed are"),
    ({"providers": ("tensorrt",), "format": "onnx"}, "allowed are"),
    ({"providers": None, "format": "onnx"}, "allowed are"),
], ids=["format", "batch", "order", "text", "alone", "None"])
def test_what_cannot_be_meant_is_refused_at_save(given, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        save_package(torch.nn.Linear(4, 2), tmp_path / "p", "net", {"x": X}, ["y"], **given)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("change", [{"providers": ["tensorrt"]}, {"providers": ["cuda", "tensorrt"]}, {"providers": "cuda"}, {"providers": None}, {"batch": False},
                                    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]}], ids=str)
def test_an_mlmodel_that_asks_for_what_tensorrt_does_not_do_is_refused(change, package, tmp_path):
    folder = shutil.copytree(package.path, tmp_path / "copy")
    described = json.loads((folder / "MLmodel").read_text())
    described["flavors"]["mlserve"] |= change
    (folder / "MLmodel").write_text(json.dumps(described))
    write_lock(folder)
    with pytest.raises(IntegrityError, match="MLmodel was not written by save_package: the field 'providers'"):
        load_package(folder)


# ---- the image

def test_the_lock_of_a_gpu_has_tensorrt_where_the_package_asks_for_it(package):
    from mlserve.release.lock.dependencies import requirements_of
    plain = replace(package, providers=("cuda",))
    assert set(requirements_of(package, device="cuda")) - set(requirements_of(plain, device="cuda")) == {"tensorrt-cu13-libs<11,>=10.13"}
    assert requirements_of(package, device="cpu") == requirements_of(plain, device="cpu")
    own = requirements_of(package, ["tensorrt_cu12_libs==10.9.0.34"], device="cuda")
    assert [line for line in own if line.startswith("tensorrt")] == ["tensorrt_cu12_libs==10.9.0.34"]


def test_an_index_without_nvidias_wheels_is_told_with_the_way_to_one():
    from mlserve.release.lock.pip import refusal
    found = refusal("ERROR: Could not find a version that satisfies the requirement tensorrt-cu13-libs<11,>=10.13 (from versions: none)\nERROR: No matching distribution found for tensorrt-cu13-libs<11,>=10.13")
    assert isinstance(found, Refused) and "extra-index-url" in found.mend


def test_a_version_that_is_not_published_for_gpus_is_refused_with_what_to_do(tmp_path, monkeypatch):
    from mlserve.release.lock.dependencies import constraints_of, lock
    from mlserve.release.lock.pip import Target
    for version in ("1.30.0", "1.31.1"):
        with zipfile.ZipFile(tmp_path / f"onnxruntime_gpu-{version}-py3-none-any.whl", "w") as z:
            z.writestr(f"onnxruntime_gpu-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: {version}\nProvides-Extra: cuda\nProvides-Extra: cudnn\n")
            z.writestr(f"onnxruntime_gpu-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            z.writestr(f"onnxruntime_gpu-{version}.dist-info/RECORD", "")
    for name, value in dict(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path), PIP_CONFIG_FILE=os.devnull).items():
        monkeypatch.setenv(name, value)

    def locked(trained, allow=()):
        return lock(["onnxruntime-gpu[cuda,cudnn]"], constraints_of({"packages": {"onnxruntime": trained}}, allow, "cuda"), Target()).packages

    assert locked("1.30.0") == {"onnxruntime-gpu": "1.30.0"}
    with pytest.raises(Refused, match="no onnxruntime-gpu 1.32.0 for the image; the newest is 1.31.1") as e:
        locked("1.32.0")
    assert "that of onnxruntime in training" in e.value.mend and "put 'onnxruntime' into `allow`" in e.value.mend
    assert locked("1.32.0", ["onnxruntime"]) == {"onnxruntime-gpu": "1.31.1"}


def test_an_image_for_a_gpu_has_a_place_for_engines_in_every_delivery():
    from mlserve.release.check.container import gpu_options
    from mlserve.release.image.dockerfile import ImageSpec, render
    for delivery in ("baked", "volume", "store", "registry"):
        assert "normalize /out var/cache/mlserve var/cache/cuda\n" in render(ImageSpec("python:3.11", "cuda", delivery))
    assert "var/cache" not in render(ImageSpec("python:3.11"))
    assert [m["Target"] for m in gpu_options("cuda:1")["mounts"]] == ["/var/cache/mlserve"]


def test_a_check_grants_the_memory_that_a_package_is_read_and_built_in(package, tmp_path):
    from mlserve.release.check import _options
    from mlserve.release.check.container import Limits
    pair = SimpleNamespace(name="net", version="1", image="registry.test/net@sha256:" + "a" * 64)
    large = replace(package, path=tmp_path)
    with (tmp_path / "model.onnx").open("wb") as f:
        f.truncate(3 * 10**9)

    def memory(package, device):
        options = _options(pair, package, device, "baked", Limits())
        assert options["mem_limit"] == options["memswap_limit"]
        return options["mem_limit"]

    assert memory(package, "cpu") < 2.01 * 2**30 and memory(large, "cpu") > 2 * 3 * 10**9 + 2**30
    assert memory(replace(large, providers=("cuda",)), "cuda") == memory(large, "cpu")
    assert memory(large, "cuda:0") > 5 * 3 * 10**9 + 4 * 2**30 and memory(package, "cuda") > 5 * 2**30


def test_the_line_that_starts_an_image_keeps_its_engines(package, tmp_path):
    from mlserve.release.pipeline import _options
    for delivery in ("baked", "volume", "registry"):
        assert _options(package, delivery, "cuda").count("-v mlserve-cache:/var/cache/mlserve ") == 1
    assert "mlserve-cache" not in _options(package, "baked", "cpu") + _options(replace(package, providers=("cuda",)), "baked", "cuda")


def test_a_check_believes_an_engine_of_tensorrt():
    from mlserve.release.check.comparison import placed_on_gpu
    placement = {"providers": [TENSORRT, CUDA], "nodes": {TENSORRT: 1}, "fell_back": []}
    assert placed_on_gpu({"model_devices": ["cuda:0"], "placement": placement}) == placement
