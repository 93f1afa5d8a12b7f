"""GPUs that cannot be had, do not compute or are lost, on a machine without one: `fake_cuda.c` stands in for the driver's libraries.

Rows E9 and E14 of the table of faults. What is refused is asked of the library in this process, and of the real server, whose exit code and last line count."""
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from commands import TESTS, last_json
from fake_server import OOM, STICKY, WAIT
from servers import Server, until

from mlserve.errors import GpuRefused, gpu_reasons
from mlserve.serving.model.device import Device, claim, cuda_driver
from mlserve.serving.model.driver import Signs, look
from mlserve.serving.model.framework import built_for
from mlserve.serving.model.probe import open_probe, run_probe, take_room

NO_GPU = pytest.mark.skipif(bool(look().nodes), reason="a GPU is here, and these are of a machine without one")
HOST = Signs(nodes=("nvidia-uvm", "nvidia0", "nvidia1", "nvidiactl"))


def build(folder):
    "A libcuda.so.1 and a libnvidia-ml.so.1 that are ours, in a folder"
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "make test-tools installs a compiler"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", folder / "libcuda.so.1", TESTS / "fake_cuda.c"], check=True)
    shutil.copy(folder / "libcuda.so.1", folder / "libnvidia-ml.so.1")
    return folder


def load(folder, monkeypatch):
    "The library in this process, and what it is told"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    library = ctypes.CDLL(str(folder / "libcuda.so.1"))
    library.told = lambda words: monkeypatch.setenv("FAKE_CUDA", words)
    return library


def serving_on(folder, package, tmp_path):
    "The real server with a pretended model on a pretended GPU, and the file by which the GPU is broken"
    faults = tmp_path / "faults"
    faults.write_text("")
    server = Server(package, tmp_path, device="cuda", threads=1, prove_seconds=0.3, hang_seconds=2, LD_LIBRARY_PATH=folder, FAKE_CUDA_FILE=faults)
    server.faults = faults
    return server


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def lib(stand_in, monkeypatch):
    return load(stand_in, monkeypatch)


@pytest.fixture
def on_gpu(stand_in, double, tmp_path):
    with serving_on(stand_in, double, tmp_path) as server:
        yield server


def prove(lib, device="cuda", needed=1, seen=HOST, is_split=lambda: False):
    return open_probe(claim(device, needed, partial(cuda_driver, lib), seen, is_split), lib)


def test_a_gpu_that_computes_is_claimed_and_proved(lib):
    lib.told("count=2 driver=12080 capability=89 total=80000")
    device = claim("cuda:1", 2, partial(cuda_driver, lib), HOST)
    assert device == Device("cuda", 1, "Pretended 1", 80000, 2, "12.8", "8.9", "00000000:02:00.0")
    probe = open_probe(device, lib)
    assert all(run_probe(probe) < 1 for _ in range(20)) and probe.runs == 21


REFUSALS = [  # what the library is told, what is asked, the reason, words of the sentence and of the mend
    ("cuInit=34", {}, "no_driver_library", "stub.*LD_LIBRARY_PATH"),
    ("cuInit=36", {}, "driver_too_old", "cuInit answered 36.*Update the driver"),
    ("cuInit=100", {}, "too_few_gpus", "1 GPU is required, but none is visible.*--gpus all"),
    ("cuInit=100", {"seen": Signs()}, "no_device_nodes", "no node /dev/nvidia.*--gpus all"),
    ("cuInit=100", {"seen": Signs(given="void")}, "masked", "NVIDIA_VISIBLE_DEVICES is 'void'"),
    ("cuInit=100", {"seen": Signs(HOST.nodes, mask="-1")}, "masked", "CUDA_VISIBLE_DEVICES is '-1'.*Unset"),
    ("cuInit=100", {"seen": Signs(HOST.nodes, mask="MIG-11c29e81")}, "mig", "MIG-11c29e81.*nvidia-smi -L"),
    ("cuInit=100", {"is_split": lambda: True}, "mig", "MIG mode.*nvidia-smi mig"),
    ("mig=1", {"needed": 2}, "mig", "one MIG instance at most.*MLSERVE_REQUIRED_GPUS=1"),
    ("count=2", {"needed": 4}, "too_few_gpus", "4 GPUs are required, but 2 are visible"),
    ("count=2", {"device": "cuda:2"}, "too_few_gpus", "cuda:2 was asked for, but 2 are visible"),
    ("cuInit=304", {}, "driver_refused", "device cgroup"),
    ("cuInit=802", {}, "system_not_ready", "fabricmanager"),
    ("cuInit=803", {}, "driver_mismatch", "kernel module"),
    ("cuInit=804", {}, "forward_compatibility", "compat"),
    ("cuInit=805", {}, "mps", "MPS daemon.*nvidia-cuda-mps-control"),
    ("cuDevicePrimaryCtxRetain=807", {}, "mps", "no clients just now"),
    ("cuDevicePrimaryCtxRetain=46", {}, "busy", "exclusive mode.*nvidia-smi -c DEFAULT"),
    ("cuDevicePrimaryCtxRetain=2", {}, "allocation_failed", "out of memory.*who else"),
    ("cuMemAlloc_v2=2", {}, "allocation_failed", "cuMemAlloc_v2 answered 2 .out of memory.*who else"),
    ("cuModuleLoadData=209", {}, "no_kernel_image", "no code for this architecture"),
    ("cuModuleLoadData=221", {}, "no_kernel_image", "ptxjitcompiler.*compute"),
    ("cuModuleLoadData=223", {}, "no_kernel_image", "CUDA_DISABLE_PTX_JIT"),
    ("cuMemcpyHtoDAsync_v2=1", {}, "allocation_failed", "cuMemcpyHtoDAsync_v2 answered 1"),
    ("cuLaunchKernel=719", {}, "kernel_failed", "cuLaunchKernel answered 719.*Xid"),
    ("cuStreamSynchronize=700", {}, "kernel_failed", "illegal address"),
    ("wrong=1", {}, "wrong_result", "1 of 1024 results.*dcgmi"),
    ("idle=1", {}, "wrong_result", "1023 of 1024 results"),
]


@pytest.mark.parametrize("words, asked, reason, said", REFUSALS, ids=lambda v: v if isinstance(v, str) and "=" in v else "")
def test_E14_each_refusal_has_its_reason_its_sentence_and_its_mend(lib, words, asked, reason, said):
    lib.told(words)
    with pytest.raises(GpuRefused) as e:
        prove(lib, **asked)
    assert e.value.reason == reason and reason in gpu_reasons and re.search(said, str(e.value)) and e.value.mend, e.value


def test_E14_memory_is_really_taken(lib):
    lib.told("free=1000 most=700")
    probe = open_probe(Device("cuda", name="small"), lib)
    take_room(probe, 400 << 20)
    for weights, reason in ((500, "allocation_failed"), (800, "too_little_memory")):
        with pytest.raises(GpuRefused, match=f"needs at least {weights + 256} MiB of small .* 1000 are free") as e:
            take_room(probe, weights << 20)
        assert e.value.reason == reason


def test_E14_control_a_gpu_that_is_only_listed_is_taken_for_one_that_computes(lib, monkeypatch):
    from mlserve.serving.model import probe
    monkeypatch.setattr(probe, "run_probe", lambda probe: 0.0)
    for words in ("wrong=1", "idle=1", "cuLaunchKernel=719", "cuStreamSynchronize=700"):
        lib.told(words)
        assert prove(lib)


def starved(seconds=0.2):
    "How many times as long as alone a process takes just now, since others have the cores"
    began, used = time.monotonic(), time.process_time()
    while time.process_time() - used < seconds:
        pass
    return max(1, (time.monotonic() - began) / seconds)


def serve(stand_in, package, words="", **settings):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLSERVE_", "NVIDIA_", "CUDA_"))}
    env |= {"LD_LIBRARY_PATH": str(stand_in), "FAKE_CUDA": words, "MLSERVE_PACKAGE": str(package), "MLSERVE_PORT": "0", "MLSERVE_HOST": "127.0.0.1", "MLSERVE_DEVICE": "cuda"}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "mlserve.serving.server"], env=env | settings, capture_output=True, text=True, timeout=60)
    return done, last_json(done.stderr), time.monotonic() - began


@pytest.mark.parametrize("words, settings, reason, said", [
    pytest.param("", {"LD_LIBRARY_PATH": ""}, "no_driver_library", "no NVIDIA driver here.*--gpus all", marks=NO_GPU),
    pytest.param("count=0", {}, "no_device_nodes", "no node /dev/nvidia", marks=NO_GPU),
    pytest.param("count=0", {"NVIDIA_VISIBLE_DEVICES": "none"}, "masked", "NVIDIA_VISIBLE_DEVICES is 'none'", marks=NO_GPU),
    ("count=2", {"CUDA_VISIBLE_DEVICES": "1,-1", "MLSERVE_REQUIRED_GPUS": "2"}, "masked", "2 GPUs are required, but 1 is visible: CUDA_VISIBLE_DEVICES is '1,-1'"),
    ("count=2", {"MLSERVE_REQUIRED_GPUS": "3"}, "too_few_gpus", "3 GPUs are required, but 2 are visible"),
    ("cuInit=803", {}, "driver_mismatch", "Restart the host"),
    ("cuLaunchKernel=719", {}, "kernel_failed", "cuLaunchKernel answered 719"),
    ("wrong=1", {}, "wrong_result", "computes wrongly"),
    ("free=100", {}, "too_little_memory", "needs at least 256 MiB of Pretended 0 .0 of weights., and 100 are free"),
    pytest.param("", {}, "cpu_build", "torch that is installed is built for the CPU.*device = .cuda.", marks=pytest.mark.skipif(built_for("torch") != "", reason="this torch is built for CUDA")),
], ids=lambda v: v if isinstance(v, str) and v in gpu_reasons else "")
def test_E14_the_server_is_refused_a_gpu_with_nine_and_a_reason(stand_in, double, words, settings, reason, said):
    "In less than five seconds, before the model is loaded; torch is not even imported, but for its own refusal"
    for _ in range(3):
        done, last, seconds = serve(stand_in, double, words, **settings)
        if in_time := seconds < 5 * starved():
            break
    assert (done.returncode, last["code"], last["reason"]) == (9, 9, reason), done.stderr
    assert re.search(said, last["error"]) and in_time, f"{seconds:.1f} s"
    events = [json.loads(line) for line in done.stderr.splitlines() if '"event": "gpu_refused"' in line]
    assert [(e["level"], e["reason"]) for e in events] == [("error", reason)]


def test_E14_a_driver_that_does_not_answer_is_given_up(stand_in, double, monkeypatch):
    from mlserve.serving.model import probe
    monkeypatch.setattr(probe, "claim", lambda *a: time.sleep(5))
    monkeypatch.setattr(probe, "in_time", partial(probe.in_time, seconds=0.1))
    with pytest.raises(GpuRefused) as e:
        probe.claim_and_prove("cuda")
    assert e.value.reason == "no_answer"


def test_E14_onnxruntime_without_its_provider_is_refused(monkeypatch, tmp_path):
    import onnxruntime as ort

    from mlserve.package.programs.onnx_program import read_onnx
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", lambda *a, **k: SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"]))
    with pytest.raises(GpuRefused, match="active with CPUExecutionProvider only") as e:
        read_onnx(tmp_path / "model.onnx", "cuda:0", 1)
    assert e.value.reason == "provider_inactive"


@pytest.mark.parametrize("said, reason", [
    ("CUDA out of memory. Tried to allocate 2.00 GiB.", "too_little_memory"),
    ("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "too_little_memory"),
    ("Available memory of 1048576 is smaller than requested bytes of 4194304", "too_little_memory"),
    ("CUDA error: no kernel image is available for execution on the device", "no_kernel_image"),
    ("Missing key(s) in state_dict", None)], ids=["torch", "cuBLAS", "onnxruntime", "architecture", "the model's own"])
def test_E14_a_gpu_that_cannot_hold_the_model_while_it_is_loaded_is_refused(double, monkeypatch, said, reason):
    "In the words of whichever library met it; what is the model's own is told as that, and names the file"
    from mlserve.errors import ModelFailed
    from mlserve.package import load_package, programs
    from mlserve.serving import model

    def full(*args):
        raise RuntimeError(said)
    monkeypatch.setattr(programs, "read_torch", full)
    monkeypatch.setattr(model, "check_framework", lambda *args: None)
    with pytest.raises(GpuRefused if reason else ModelFailed, match=re.escape(said) if reason else "model.pt cannot be loaded on cuda:0") as e:
        model.load_model(load_package(double), Device("cuda", name="small"))
    assert not reason or (e.value.reason == reason and e.value.mend)


@pytest.mark.parametrize("ran, fell_back, reason", [({"CUDAExecutionProvider": ["Gemm", "Relu"], "CPUExecutionProvider": ["Shape"]}, ["Shape"], ""),
                                                   ({"CPUExecutionProvider": ["Gemm", "Shape"]}, [], "provider_inactive")], ids=["some nodes", "all nodes"])
def test_E14_nodes_of_onnxruntime_that_fell_back_are_named(tmp_path, ran, fell_back, reason):
    from mlserve.package.programs.onnx_program import OnnxProgram

    def end():
        events = [{"cat": "Node", "args": {"provider": p, "op_name": op}} for p, ops in ran.items() for op in ops]
        (tmp_path / "run" / "profile.json").write_text(json.dumps([{"cat": "Session", "args": {}}, *events]))
        return str(tmp_path / "run" / "profile.json")
    (tmp_path / "run").mkdir()
    outputs = [SimpleNamespace(name="y")]
    session = SimpleNamespace(get_outputs=lambda: outputs, run=lambda names, feeds, options: [np.zeros(1) for _ in names], end_profiling=end,
                              get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    if reason:
        with pytest.raises(GpuRefused, match="every node") as e:
            OnnxProgram(session, "cuda:0").placement({}, [])
        assert e.value.reason == reason
    else:
        found = OnnxProgram(session, "cuda:0").placement({}, [])
        assert found["fell_back"] == fell_back and found["nodes"] == {p: len(ops) for p, ops in ran.items()}
    assert not (tmp_path / "run").exists()


# E9: a GPU that is lost while it serves


def test_health_and_metrics_tell_the_gpu(on_gpu):
    health = on_gpu.http.get("/health").json()
    assert health["device"] | {"driver": "13.0", "name": "Pretended 0", "capability": "9.0", "count": 1} == health["device"]
    assert health["model_devices"] == ["cuda:0"] and health["placement"] == {"parameters": {"cuda:0": 1}, "outputs": {"y": "cuda:0"}, "memory_mb": 0}
    text = on_gpu.http.get("/metrics").text
    assert re.search(r'^mlserve_info{.*device="cuda:0",gpu="Pretended 0".*} 1.0$', text, re.M)
    assert "mlserve_gpu_temperature_celsius 61.0" in text and "mlserve_gpu_utilisation_ratio 0.97" in text and "mlserve_gpu_power_watts 350.0" in text
    assert 'mlserve_gpu_throttled{reason="thermal"} 0.0' in text and 'mlserve_gpu_ecc_errors_total{kind="uncorrected"} 0.0' in text
    on_gpu.faults.write_text("throttled=32 ecc=3 nvmlDeviceGetPowerUsage=3")
    text = on_gpu.http.get("/metrics").text
    assert 'mlserve_gpu_throttled{reason="thermal"} 1.0' in text and 'mlserve_gpu_ecc_errors_total{kind="corrected"} 3.0' in text and "gpu_power" not in text


@pytest.mark.parametrize("fault, reason", [("cuStreamSynchronize=719", "kernel_failed"), ("cuLaunchKernel=999", "driver_refused"), ("wrong=1", "wrong_result"), ("hang=1", "no_answer")])
def test_E9_a_gpu_that_is_lost_while_nobody_asks_ends_the_server(on_gpu, fault, reason):
    on_gpu.faults.write_text(fault)
    assert on_gpu.ended(10) == 70, on_gpu.events()
    assert on_gpu.last()["code"] == 70 and "The GPU is lost" in on_gpu.last()["error"]
    assert [json.loads(line)["reason"] for line in on_gpu.events().splitlines() if '"gpu_lost"' in line] == [reason]


def test_E9_who_waits_for_a_lost_gpu_is_told_503(on_gpu):
    import concurrent.futures
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(on_gpu.predict, [1, WAIT + 5])
        time.sleep(0.5)
        on_gpu.faults.write_text("cuStreamSynchronize=719")
        assert waiting.result().status_code == 503
    assert on_gpu.ended(10) == 70


def test_E9_an_error_of_cuda_ends_the_server_when_the_gpu_no_longer_computes(on_gpu):
    assert on_gpu.predict([1, STICKY]).status_code == 500 and on_gpu.predict([1, 0]).status_code == 200  # it was this request's own
    on_gpu.faults.write_text("cuMemcpyHtoDAsync_v2=710")
    assert on_gpu.predict([1, STICKY]).status_code == 503
    assert on_gpu.ended(10) == 70


def test_E9_memory_of_the_gpu_that_runs_out_is_503_and_counted(on_gpu):
    before = on_gpu.metric("out_of_memory_total")
    assert on_gpu.predict([1, OOM]).status_code == 503 and on_gpu.predict([1, 0]).status_code == 200
    until(lambda: on_gpu.metric("out_of_memory_total") >= before + 1)
    assert on_gpu.http.get("/v2/health/ready").status_code == 200
