"""What torch's exporters look up anew for each model, a second of a processor each time: looked up once, since no test changes it."""
import functools
import sys


def once(owner, name, copied):
    "Let a function without state, or with few arguments, answer from memory; a copy each time"
    asked = functools.lru_cache(getattr(owner, name))

    @functools.wraps(asked.__wrapped__)
    def answer(*args, **kwargs):
        return copied(asked(*args, **kwargs))
    return answer


def registry_copy(registry):
    copy = type(registry)()
    copy.__dict__.update(registry.__dict__, functions={target: list(known) for target, known in registry.functions.items()})
    return copy


def remember():
    "From the first test on that finds an exporter imported"
    parts = [sys.modules.get(name) for name in ("torch._export.utils", "torch.export.decomp_utils", "torch.export.exported_program", "torch.onnx._internal.exporter._registration")]
    if not all(parts) or hasattr(parts[0]._collect_all_valid_cia_ops, "__wrapped__"):
        return
    utils, decompositions, exported, registration = parts
    operators = once(utils, "_collect_all_valid_cia_ops", set)
    for module in (utils, decompositions, exported):
        if hasattr(module, "_collect_all_valid_cia_ops"):
            module._collect_all_valid_cia_ops = operators
    known = once(registration.ONNXRegistry, "from_torchlib", registry_copy)
    registration.ONNXRegistry.from_torchlib = classmethod(lambda cls, *args, **kwargs: known(*args, **kwargs))
