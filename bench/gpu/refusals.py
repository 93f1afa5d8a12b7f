"""Every refusal that a process can provoke: it must end with 9 and a sentence, and never serve on the CPU instead."""
import ctypes
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from gpu.models import CNN
from gpu.serving import Server

MASKS = [("no GPU is visible", {"CUDA_VISIBLE_DEVICES": ""}, {}), ("a mask of -1", {"CUDA_VISIBLE_DEVICES": "-1"}, {}),
         ("a mask with an unknown UUID", {"CUDA_VISIBLE_DEVICES": "GPU-00000000-0000-0000-0000-000000000000"}, {}),
         ("a wrong index", {}, {"device": "cuda:7"}), ("two GPUs required", {}, {"required_gpus": 2})]
FOREIGN = ("no kernels for this architecture: the driver must not use those that are built in", {"CUDA_FORCE_PTX_JIT": "1"}, {})
HOLDER = """
import sys, torch
leave, held = int(sys.argv[1]) << 20, []
torch.zeros(1, device='cuda')
for step in (1 << 30, 1 << 26, 1 << 22):
    while torch.cuda.mem_get_info()[0] > leave + step:
        try: held.append(torch.empty(step, dtype=torch.uint8, device='cuda'))
        except torch.OutOfMemoryError: break
print(torch.cuda.mem_get_info()[0] >> 20, flush=True)
sys.stdin.read()
"""
NEWER = b""".version 7.0
.target sm_%d
.address_size 64
.visible .entry nothing() { ret; }
"""


class Holder:
    "Another process that holds all memory of the GPU but so many MiB; in a rehearsal one that holds nothing"

    def __init__(self, r, leave):
        code = HOLDER if r.gpu else "import sys; print(0, flush=True); sys.stdin.read()"
        self.process = subprocess.Popen([sys.executable, "-c", code, str(leave)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.free = self.process.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.process.communicate()


def refused(r, what, package, env, settings, may_serve=False):
    "Start a server that must refuse; whether it did, and after how long"
    with Server(r, package.path, env, **{"device": "cuda"} | settings) as server:
        if may_serve:
            try:
                seconds = server.ready(30)
                r.row("refusals", case=what, ended="ready", seconds=seconds, said="it fits, and serves")
                return None
            except RuntimeError:
                pass
        code, said = server.ended(25)
        seconds = time.perf_counter() - server.began
        reason = ", ".join(e.get("reason", "") for e in server.events("gpu_refused"))
    r.row("refusals", case=what, ended="it did not end" if code is None else code, seconds=seconds, reason=reason,
          said=str(said.get("error", said))[:400])
    return code == 9, seconds


def onnx(r):
    "An ONNX package on a GPU with an onnxruntime that was built for CPUs"
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as e:
        return r.note(f"ONNX without CUDA: not run, {e}")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return r.note("ONNX without CUDA: not run, this onnxruntime has CUDA")
    from mlserve.errors import GpuRefused
    from mlserve.package.programs import read_program
    package, start = CNN.package(r.work, "onnx"), time.perf_counter()
    try:
        read_program(package.path / package.file, "onnx", "cuda:0")
        done, said = "loaded", ""
    except GpuRefused as e:
        done, said = e.code, str(e)
    seconds = time.perf_counter() - start
    r.row("refusals", case="ONNX on a GPU, onnxruntime without CUDA (in process)", ended=done, seconds=seconds, said=said)
    return done == 9, seconds


def foreign(r):
    "A framework whose kernels are not for this GPU"
    return refused(r, FOREIGN[0], CNN.package(r.work), *FOREIGN[1:])


def crowded(r, leave):
    "A GPU whose memory another process holds, but for so many MiB"
    with Holder(r, leave) as holder:
        return refused(r, f"another process left {holder.free} MiB", CNN.package(r.work), {}, {}, may_serve=r.gpu and leave > 1000)


def newer_kernel(r):
    "What the driver itself answers to a kernel for a newer architecture"
    if r.rehearsed("the driver's library is not here: a kernel of a newer architecture"):
        return
    import torch
    torch.zeros(1, device="cuda")
    driver, module = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    for target in (52, 90, 100, 120):
        code = driver.cuModuleLoadData(ctypes.byref(module), (NEWER.replace(b"7.0", b"8.7") % target) + b"\0")
        r.row("a kernel for another architecture, loaded by the driver", target=f"sm_{target}", cuModuleLoadData=code)


def run(r):
    package, seen = CNN.package(r.work), []
    if not r.gpu:
        r.note("rehearsed: there is no driver here, so each case is refused for that")
    with ThreadPoolExecutor(r.several(len(MASKS), 1)) as pool:
        seen += pool.map(lambda case: r.tried(refused, r, case[0], package, *case[1:]), MASKS)
    for case in (onnx, foreign, partial(crowded, leave=150), partial(crowded, leave=1200), newer_kernel):
        seen.append(r.tried(case, r))
        if known := [s for s in seen if s]:
            r.target("refused", sum(ok for ok, _ in known) / len(known))
            r.target("refused_seconds", max(s for _, s in known))
