"""CUDA graphs: recorded calls, replayed, beside eager ones; on the device alone, and as the server calls them."""
from dataclasses import replace
from functools import partial

import torch

from gpu.models import CNN, encoder, free, synced, tensors
from gpu.proof import forward_seconds, loaded
from gpu.record import timed
from mlserve.serving.model.graphs import CudaRecorder, recorded
from mlserve.serving.model.warmup import seconds_of, warm


def stand_in(call):
    "What replays a call on the CPU: it writes where the first answer lies"
    first, listed = call(), lambda result: result if isinstance(result, (tuple, list)) else [result]

    def replay():
        for kept, new in zip(listed(first), listed(call()), strict=True):
            kept.copy_(new)
    return replay, first


def recorder(r):
    return stand_in if r.rehearsed("torch.cuda.CUDAGraph needs a GPU: a stand-in calls again") else CudaRecorder(r.device)


def alone(r, kind, name):
    "Recorded and eager on tensors that are on the device already"
    module = kind.module().to(r.device)
    for n in (1, 8, 32):
        with torch.inference_mode():
            inputs = tensors(kind, n, r.device)
            replay, out = recorder(r)(lambda: module(*inputs))
            for held, new in zip(inputs, tensors(kind, n, r.device, seed=2), strict=True):
                held.copy_(new)
            replay()
            differs = float((out - module(*inputs)).abs().max())
            eager, graph = timed(lambda: module(*inputs), synced(r)), timed(replay, synced(r))
        r.row("on the device, without copies", model=kind.name, rows=n, eager_us=1e6 * eager, replay_us=1e6 * graph, times_as_fast=eager / graph,
              differs=differs)
        if n == 1:
            r.target(f"graph_{name}", eager / graph)
    free(r)


def as_served(r, kind, format):
    "The package's program as the server calls it, arrays in and out: with buckets and without"
    package = kind.package(r.work, format)
    eager = loaded(package, r.device)
    report = warm(eager, package, 32)
    graphs, told = recorded(eager, package, report, recorder(r))
    for n in (1, 3, 8, 20, 32):
        rows = kind.rows(n, n)
        far = float(abs(graphs.forward({k: v.copy() for k, v in rows.items()})[kind.output] - eager.predict(rows)[kind.output]).max())
        slow, fast = forward_seconds(eager, rows), forward_seconds(graphs, rows)
        bucket = graphs.program.buckets.get(n)
        r.row("as served, arrays in and out", model=kind.name, format=format, rows=n, bucket=bucket.rows if bucket else "none", eager_us=1e6 * slow,
              recorded_us=1e6 * fast, times_as_fast=slow / fast, differs=far)
    first, *more = [seconds_of(partial(eager.forward, kind.rows(27, i)), eager.sync) for i in range(6)]
    r.row("27 rows, a size that was not warmed, eager", model=kind.name, format=format, first_ms=1000 * first, usual_ms=1000 * min(more))
    r.note(f"{kind.name} as {format}: recorded {told.graphs}, left out {told.left_out}")
    free(r)


def reads_values(r):
    "A model that reads a value on its way cannot be recorded: it is said, and the model runs as before"
    class Reads(torch.nn.Module):
        def forward(self, image):
            return image.flatten(1) * float(image.sum() > 0)
    from mlserve.package.programs.torch_program import TorchProgram
    from mlserve.serving.model.warmup import WarmupReport
    package = CNN.package(r.work)
    model = replace(loaded(package, r.device), program=TorchProgram(Reads().eval(), r.device))
    same, told = recorded(model, package, WarmupReport(0, {1: 1, 2: 1}), recorder(r))
    r.row("a model that cannot be recorded", recorded=told.graphs, left_out=told.left_out, still_runs=same.forward(CNN.rows(2))["logits"].shape)


def run(r):
    kinds = {"cnn": CNN, "encoder": encoder(r)}
    for name, kind in kinds.items():
        r.tried(alone, r, kind, name)
    for kind in kinds.values():
        r.tried(as_served, r, kind, "torchscript")
    r.tried(as_served, r, CNN, "export")
    r.tried(reads_values, r)
