"""How far the GPU's answers are from the CPU's, by model, type and TF32: the default tolerances come from these numbers."""
import torch

from gpu.models import CNN, encoder, free, tensors
from mlserve.package.programs.half import HALVES

CASES = [("float32", False), ("float32", True), ("float16", False), ("bfloat16", False)]
TOLERANCES = {"float32": (1e-4, 1e-5)} | {name: tuple(t.values()) for name, t in HALVES.items()}


def typed(inputs, dtype):
    "Fractions in another type; whole numbers as they are"
    return [t.to(dtype) if t.is_floating_point() else t for t in inputs]


def set_tf32(on):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def answers(kind, n, device, dtype):
    with torch.inference_mode():
        return kind.module().to(device, dtype)(*typed(tensors(kind, n, device), dtype)).float().cpu()


def needed(want, got, rtol, atol):
    "The largest difference, as a part of what a tolerance allows"
    return float((abs(got - want) / (atol + rtol * abs(want))).max())


def run(r):
    for kind in (CNN, encoder(r)):
        for n in (1, 32):
            want = answers(kind, n, "cpu", torch.float32)
            for name, tf32 in CASES:
                set_tf32(tf32)
                got, (rtol, atol) = answers(kind, n, r.device, getattr(torch, name)), TOLERANCES[name]
                set_tf32(False)
                r.row("GPU and CPU", model=kind.name, rows=n, type=name, tf32="on" if tf32 else "off", max_abs=float((got - want).abs().max()),
                      largest_answer=float(want.abs().max()), tolerance=f"rtol {rtol:g}, atol {atol:g}", part_of_tolerance=needed(want, got, rtol, atol))
            free(r)
