"""Requests a second at saturation beside the model's own loop; the CPU beside the GPU; LitServe on the same model."""
import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from gpu.models import CNN, encoder, free, synced, tensors
from gpu.proof import forward_seconds, loaded
from gpu.record import timed
from gpu.serving import Server, body_of, load, packed, stop
from mlserve.package.trial.process import free_port


def heavy(r):
    "The encoder at the first length of rows at which 32 of them take 5 ms"
    if not r.gpu:
        return encoder(r)
    for tokens in (128, 256, 512):
        kind = encoder(r, tokens)
        module, inputs = kind.module().to(r.device), tensors(kind, 32, r.device)
        with torch.inference_mode():
            seconds = timed(lambda: module(*inputs), synced(r))
        r.row("32 rows on the device", model=kind.name, milliseconds=1000 * seconds)
        if seconds >= 0.005:
            break
    return kind


def latencies(r, kind):
    "One call by batch size, arrays in and arrays out, on the CPU and on the device"
    package = kind.package(r.work)
    cpu, gpu = loaded(package, "cpu"), loaded(package, r.device)
    for n in (1, 8, 32):
        rows = kind.rows(n)
        slow, fast = forward_seconds(cpu, rows), forward_seconds(gpu, rows)
        r.row("CPU and GPU, arrays in and out", model=kind.name, rows=n, cpu_ms=1000 * slow, gpu_ms=1000 * fast, times_as_fast=slow / fast)
    free(r)


def own_loop(r, kind, batch):
    "Rows a second of the model alone: arrays in and out, and with everything on the device"
    model, rows, inputs = loaded(kind.package(r.work), r.device), kind.rows(batch), tensors(kind, batch, r.device)
    arrays = batch / forward_seconds(model, rows, r.several(1.0, 0.3))
    with torch.inference_mode():
        device = batch / timed(lambda: model.program.module(*inputs), synced(r), r.several(1.0, 0.3))
    free(r)
    return arrays, device


def processor_seconds(pid):
    "Seconds of the processor that a process and its children used; no number where /proc does not tell"
    total, pids = 0, [pid]
    while pids:
        p = pids.pop()
        try:
            total += sum(map(int, Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
            pids += Path(f"/proc/{p}/task/{p}/children").read_text().split()
        except OSError:
            return float("nan")
    return total / os.sysconf("SC_CLK_TCK")


def crowds(r):
    "Connections at once"
    return r.several((64, 192), (8,))


def saturation(r, kind):
    "Requests of one row from many connections; the best of two crowds"
    best, seconds = None, r.several(5, 1.5)
    with Server(r, kind.package(r.work).path, max_batch=32, queue=1024) as server:
        server.ready(90)
        batch = server.events("capacity")[-1]["max_batch"]
        request = packed(*body_of(kind, kind.rows(1)))
        for connections in crowds(r):
            before = processor_seconds(server.process.pid)
            found = load(r, server.port, request, connections, seconds)
            spent = (processor_seconds(server.process.pid) - before) / max(1, found["requests_a_second"] * seconds)
            r.row("mlserve at saturation", model=kind.name, max_batch=batch, graphs=server.events("warmed")[-1]["graphs"], server_cpu_us=1e6 * spent, **found)
            best = max(best or 0, found["requests_a_second"])
    arrays, device = own_loop(r, kind, batch)
    r.row("beside the model's own loop", model=kind.name, batch=batch, requests_a_second=best, own_loop=arrays, own_loop_on_the_device=device,
          ratio=best / arrays, ratio_on_the_device=best / device)
    return best, best / arrays


def litserve(r, kind):
    "Requests a second of LitServe with the same TorchScript file"
    try:
        import litserve  # noqa: F401
    except ImportError as e:
        return r.note(f"LitServe: not run, {e}")
    port, package, rows = free_port(), kind.package(r.work), kind.rows(1)
    body = json.dumps({n: base64.b64encode(a.tobytes()).decode() for n, a in rows.items()}).encode()
    env = os.environ | {"LIT_MODEL": str(package.path / package.file), "LIT_PORT": str(port), "LIT_DEVICE": "cuda" if r.gpu else "cpu",
                        "LIT_INPUTS": json.dumps({n: [list(a.shape[1:]), str(a.dtype)] for n, a in rows.items()})}
    process = subprocess.Popen([sys.executable, str(Path(__file__).parent / "litserve_app.py")], env=env, stdin=subprocess.DEVNULL)
    try:
        import httpx
        end = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None or time.monotonic() > end:
                return r.note(f"LitServe: not run, it did not become ready (exit {process.poll()})")
            time.sleep(0.2)
        answer = httpx.post(f"http://127.0.0.1:{port}/predict", content=body, headers={"content-type": "application/json"}, trust_env=False, timeout=30)
        want = loaded(package, "cpu").predict(rows)[kind.output]
        differs = float(np.abs(np.asarray(answer.json()["y"], np.float32) - want.ravel()).max())
        request, best = packed("/predict", {"content-type": "application/json"}, body), 0
        for connections in crowds(r):
            found = load(r, port, request, connections, r.several(5, 1.5))
            r.row("LitServe at saturation", model=kind.name, differs=differs, **found)
            best = max(best, found["requests_a_second"])
        return best
    finally:
        stop(process)


def run(r):
    kind = heavy(r)
    if ours := r.tried(saturation, r, kind):
        r.target("saturation", ours[1])
        if theirs := r.tried(litserve, r, kind):
            r.target("litserve", ours[0] / theirs)
    r.tried(saturation, r, CNN)
    for k in (CNN, kind):
        r.tried(latencies, r, k)
