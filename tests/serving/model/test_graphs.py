"""Batches that are recorded and replayed in buffers that stay where they are: whose answer is whose."""
import asyncio
from dataclasses import replace

import numpy as np
import pytest

from mlserve.package.programs.torch_program import TorchProgram
from mlserve.package import load_package, save_package
from mlserve.serving.model import graphs
from mlserve.serving.batching.scheduler import Batcher
from mlserve.serving.state import Lifecycle
from mlserve.serving.model import load_model
from mlserve.serving.process.loading import _batcher, _warm
from mlserve.serving.process.worker import publish
from mlserve.settings import Settings


class Stand:
    "A recorder for the CPU: a replay writes where the first answer lies"

    def __init__(self, device):
        pass

    def __call__(self, call):
        first = call()
        return (lambda: first.copy_(call())), first


class Slow(TorchProgram):
    "Eager calls take their time, so that every bucket is worth recording"

    def run(self, arrays, names, fresh=False):
        import time
        time.sleep(0.003)
        return super().run(arrays, names, fresh)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    "A model as a GPU has it: recorded in buckets, by the stand-in"
    import torch
    monkeypatch.setattr(graphs, "CudaRecorder", Stand)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    package = save_package(net, tmp_path / "net", "net", {"x": torch.rand(4, 4)}, ["y"])
    from mlserve.serving.model.device import claim
    model = load_model(package, claim("cpu"))
    settings = Settings(package=str(package.path), max_batch=8)
    eager = replace(model, program=Slow(model.program.module))
    warm, report = _warm(package, eager, settings, cpu=False)
    return package, model, warm, report, settings


@pytest.mark.parametrize("threads", [1, 2])
def test_each_request_of_a_recorded_batch_gets_its_own_answer_and_keeps_it(recorded, threads):
    package, model, warm, report, settings = recorded
    assert report.graphs == [1, 2, 4, 8] and not report.left_out
    rng, outside = np.random.default_rng(1), warm.outside
    asked = [{"x": rng.random((rng.integers(1, 5), 4), np.float32)} for _ in range(300)]
    want = [model.predict(a)["y"] for a in asked]

    async def ask():
        batcher = Batcher(warm.forward, 8, threads=threads, serial=True)
        found = await asyncio.gather(*[batcher.submit(a) for a in asked[:200]])
        for a in asked[200:]:
            found.append(await batcher.submit(a))
        await batcher.close(1)
        return found
    for got, right in zip(asyncio.run(ask()), want, strict=True):
        assert np.allclose(got["y"], right, atol=1e-6)
    assert warm.outside == outside


def test_a_call_that_no_bucket_fits_runs_as_before_and_is_counted(recorded):
    package, model, warm, report, settings = recorded
    rows, before = {"x": np.ones((9, 4), np.float32)}, warm.outside
    assert np.allclose(warm.predict(rows)["y"], model.predict(rows)["y"], atol=1e-6) and warm.outside == before + 1
    from types import SimpleNamespace
    written = {}
    life = Lifecycle(model=warm, batcher=_batcher(Lifecycle(package=package), warm, report, settings, cpu=False))
    publish(life, SimpleNamespace(put=written.__setitem__), SimpleNamespace(connections=()))
    assert written["outside_graphs"] == warm.outside


def test_a_package_in_half_precision_is_proven_against_single_by_a_server(tmp_path):
    import torch

    from mlserve.serving.model.device import claim
    from mlserve.serving.model.warmup import prove
    torch.manual_seed(0)
    net = torch.nn.Linear(16, 4).eval()
    x = torch.rand(8, 16)
    package = load_package(save_package(net, tmp_path / "half", "half", {"x": x}, ["y"], dtype="bfloat16").path)
    found = prove(load_model(package, claim("cpu")), package)
    assert package.dtype == "bfloat16" and 1e-5 < found.max_abs < 0.02
    assert np.abs(load_model(package, claim("cpu")).predict({"x": x.numpy()})["y"] - net(x).detach().numpy()).max() == pytest.approx(found.max_abs)
