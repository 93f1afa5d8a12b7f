"""Which machine this is, and what is installed on it."""
import importlib.metadata
import os
import platform
import subprocess

import torch

from gpu.models import synced

NAMES = ["torch", "numpy", "triton", "onnxruntime", "safetensors", "fastapi", "starlette", "uvicorn", "uvloop", "httptools", "orjson", "pydantic",
         "prometheus-client", "httpx", "nvidia-ml-py", "litserve"]


def printed(*command):
    "What a command prints, or why it does not"
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL).stdout.strip()
    except (OSError, subprocess.SubprocessError) as e:
        return f"unknown ({type(e).__name__})"


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run(r):
    r.row("machine", what="commit", value=printed("git", "rev-parse", "HEAD"))
    r.row("machine", what="Python, system", value=f"{platform.python_version()}, {platform.platform()}")
    r.row("machine", what="cores", value=len(os.sched_getaffinity(0)))
    r.row("machine", what="torch's CUDA, cuDNN", value=f"{torch.version.cuda}, {torch.backends.cudnn.version() if torch.version.cuda else None}")
    for name in NAMES:
        r.row("machine", what=name, value=version(name))
    if r.rehearsed("there is no GPU to describe"):
        return
    p = torch.cuda.get_device_properties(0)
    r.row("machine", what="GPU", value=f"{p.name}, {p.total_memory >> 20} MiB, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors")
    r.row("machine", what="torch is built for", value=" ".join(torch.cuda.get_arch_list()))
    r.row("machine", what="driver", value=printed("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"))
    fields = "memory.used,utilization.gpu,temperature.gpu,clocks_event_reasons.active,ecc.errors.uncorrected.volatile.total,mig.mode.current"
    r.row("machine", what=f"nvidia-smi: {fields}", value=printed("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"))
    before = torch.cuda.mem_get_info()[0]
    torch.zeros(1, device="cuda").add_(1)
    synced(r)()
    r.row("machine", what="free memory before and after the first kernel, MiB", value=f"{before >> 20}, {torch.cuda.mem_get_info()[0] >> 20}")
