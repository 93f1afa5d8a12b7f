"""What half precision is worth: the encoder at 32 rows, and how near its answers stay."""
import torch

from gpu.differences import TOLERANCES, needed, set_tf32
from gpu.graphs import recorder
from gpu.models import encoder, free, synced, tensors
from gpu.proof import forward_seconds, loaded
from gpu.record import timed
from mlserve.serving.model.warmup import prove


def packaged(r, kind):
    "A package that was saved in half precision on the CPU, as the server loads it, beside the one in single"
    rows, reference = kind.rows(32), None
    for dtype in (None, "bfloat16"):
        package = kind.package(r.work, **({"dtype": dtype} if dtype else {}))
        model = loaded(package, r.device)
        got = model.predict(rows)[kind.output]
        reference = got if reference is None else reference
        seconds = forward_seconds(model, rows)
        golden = prove(model, package)
        part = needed(reference, got, **package.tolerance)
        r.row("packages, 32 rows, arrays in and out", dtype=package.dtype or "float32", milliseconds=1000 * seconds, golden=bool(golden.passed),
              golden_max_abs=golden.max_abs, part_of_tolerance=part)


def run(r):
    kind, best = encoder(r), 0.0
    set_tf32(False)
    inputs = tensors(kind, 32, r.device)
    with torch.inference_mode():
        want = kind.module()(*tensors(kind, 32, "cpu"))
        seconds = {}
        for name in ("float32", "float16", "bfloat16"):
            module = kind.module().to(r.device, getattr(torch, name))
            part = needed(want, module(*inputs).float().cpu(), *TOLERANCES[name])
            for way, call in (("eager", lambda: module(*inputs)), ("recorded", recorder(r)(lambda: module(*inputs))[0])):
                seconds[name, way] = timed(call, synced(r))
                faster = seconds["float32", way] / seconds[name, way]
                r.row("32 rows", type=name, way=way, milliseconds=1000 * seconds[name, way], times_as_fast=faster, part_of_tolerance=part)
                if name != "float32" and part <= 1:
                    best = max(best, faster)
            free(r)
    if best:
        r.target("half", best)
    else:
        r.note("neither type stayed within its tolerance")
    r.tried(packaged, r, kind)
