"""Packages that were saved on the CPU, loaded on the device: answers, and where parameters and outputs really are."""
import re

import torch

from gpu.models import CNN, encoder, free, tensors
from gpu.record import timed
from gpu.serving import Server, Wire, body_of, packed, private, tensor_of
from mlserve.tensors import compare


def loaded(package, device):
    from mlserve.serving.model.device import claim
    from mlserve.serving.model import load_model
    return load_model(package, claim("cuda" if device != "cpu" else "cpu"))


def forward_seconds(model, rows, seconds=0.3):
    "Median seconds of one call as the server makes it: arrays in, arrays out"
    return timed(lambda: model.forward({k: v.copy() for k, v in rows.items()}), model.sync, seconds)


def in_process(r, kind, format):
    "Golden and new answers, devices and memory of one package; whether all is as promised"
    from mlserve.package import golden
    package = kind.package(r.work, format)
    near = lambda want, got: compare(want, got, **package.tolerance)
    inputs, expected = golden(package)
    before = torch.cuda.memory_allocated() if r.gpu else 0
    model, reference = loaded(package, r.device), loaded(package, "cpu")
    held = (torch.cuda.memory_allocated() if r.gpu else 0) - before
    weights = sum(t.nbytes for t in [*model.program.module.parameters(), *model.program.module.buffers()])
    old = near(expected, model.predict(inputs))
    new = [near(reference.predict(kind.rows(n, n)), model.predict(kind.rows(n, n))) for n in (1, 7, 32)]
    with torch.inference_mode():
        out = model.program.module(*tensors(kind, 2, r.device))
    places = [str(t.device) for t in (out if isinstance(out, (tuple, list)) else [out])]
    right = old.passed and all(c.passed for c in new) and set(places) | set(model.devices()) == {r.device}
    if r.gpu:
        right = right and held >= weights
    r.row("in one process", model=kind.name, format=format, golden=bool(old.passed), golden_max_abs=old.max_abs, new=all(c.passed for c in new),
          new_max_abs=max(c.max_abs for c in new), parameters=model.devices(), outputs=places, weights_mib=weights / 2**20, device_mib=held / 2**20)
    free(r)
    return right


def by_server(r, kind):
    "What a serving process says of itself, and an answer of it"
    package = kind.package(r.work)
    reference = loaded(package, "cpu").predict(kind.rows(3))[kind.output]
    with Server(r, package.path) as server:
        seconds = server.ready(90)
        health, wire = server.get("/health"), Wire(server.port)
        got = tensor_of(wire.ask(packed(*body_of(kind, kind.rows(3)))))
        metrics = server.get("/metrics")
        info, nvml = re.search(r"^mlserve_info.*$", metrics, re.M), re.findall(r"^mlserve_gpu_.*$", metrics, re.M)
        answer = compare({kind.output: reference}, {kind.output: got}, **package.tolerance)
        r.row("by the server", model=kind.name, ready_seconds=seconds, device=health["device"]["name"], parameters=health["model_devices"],
              golden=health["golden"], answer_max_abs=answer.max_abs, answer=answer.passed,
              private_mib=private(server.process.pid), phases=health["phases"])
        r.note(f"{kind.name}: {info[0] if info else 'no mlserve_info'}")
        r.note(f"{kind.name}: NVML in /metrics: {', '.join(nvml) or 'nothing'}")
    return answer.passed and health["golden"]["passed"] and health["model_devices"] == [r.device]


class Counts(torch.nn.Module):
    "Makes a tensor on its way, on the device of its input; a trace on the CPU writes down the CPU"

    def forward(self, image):
        return image.flatten(1) + torch.arange(64, device=image.device)


def made_on_the_way(r, format):
    "A tensor that is made on the way is made on the device"
    from mlserve.package import save_package
    rows = CNN.rows(3)
    package = save_package(Counts().eval(), r.work / f"counts-{format}", "counts", CNN.rows(4), ["y"], format=format)
    far = float(abs(loaded(package, r.device).predict(rows)["y"] - rows["image"].reshape(3, 64) - range(64)).max())
    r.row("a tensor made on the way", format=format, max_abs=far)
    return far < 1e-4


def run(r):
    kinds, right = (CNN, encoder(r)), 0
    formats = "torchscript", "export"
    cases = [(in_process, kind, format) for kind in kinds for format in formats] + [(by_server, kind) for kind in kinds]
    cases += [(made_on_the_way, format) for format in formats]
    for case, *what in cases:
        right += bool(r.tried(case, r, *what))
        r.target("proved", right / len(cases))
