"""What half precision is worth: the encoder at 32 rows, and how near its answers stay."""
import torch

from gpu.differences import TOLERANCES, needed, set_tf32
from gpu.models import encoder, free, synced, tensors
from gpu.record import timed


def run(r):
    kind, best = encoder(r), 0.0
    set_tf32(False)
    inputs = tensors(kind, 32, r.device)
    with torch.inference_mode():
        want = kind.module()(*tensors(kind, 32, "cpu"))
        seconds = {}
        for name in ("float32", "float16", "bfloat16"):
            module = kind.module().to(r.device, getattr(torch, name))
            seconds[name] = timed(lambda: module(*inputs), synced(r))
            got = module(*inputs).float().cpu()
            part = needed(want, got, *TOLERANCES[name])
            faster = seconds["float32"] / seconds[name]
            r.row("32 rows", type=name, milliseconds=1000 * seconds[name], times_as_fast=faster, part_of_tolerance=part)
            if name != "float32" and part <= 1:
                best = max(best, faster)
            free(r)
    if best:
        r.target("half", best)
    else:
        r.note("neither type stayed within its tolerance")
