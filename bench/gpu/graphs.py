"""CUDA graphs: a recorded call, replayed, beside the eager one."""
import torch

from gpu.models import CNN, encoder, free, synced, tensors
from gpu.record import timed


def recorded(r, module, inputs):
    "What replays one call of a module on inputs that stay where they are"
    if r.rehearsed("torch.cuda.CUDAGraph needs a GPU: eager stands in for the replay"):
        return (lambda: module(*inputs)), module(*inputs)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            module(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        out = module(*inputs)
    return graph.replay, out


def run(r):
    for kind, name in ((CNN, "cnn"), (encoder(r), "encoder")):
        module = kind.module().to(r.device)
        for n in (1, 8, 32):
            with torch.inference_mode():
                inputs = tensors(kind, n, r.device)
                replay, out = recorded(r, module, inputs)
                for held, new in zip(inputs, tensors(kind, n, r.device, seed=2), strict=True):
                    held.copy_(new)
                replay()
                differs = float((out - module(*inputs)).abs().max()) if r.gpu else 0.0
                eager, graph = timed(lambda: module(*inputs), synced(r)), timed(replay, synced(r))
            r.row("on the device, without copies", model=kind.name, rows=n, eager_us=1e6 * eager, replay_us=1e6 * graph, times_as_fast=eager / graph,
                  differs=differs)
            if n == 1:
                r.target(f"graph_{name}", eager / graph)
        free(r)
