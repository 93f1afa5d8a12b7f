"""Right answers (rows A2 and A3): a row's answer does not depend on its company, no array is written to, and what was proved can be given."""
import asyncio
import importlib.util
import json

import numpy as np
import pytest
import torch
from torch import nn

from mlserve.errors import CheckFailed
from mlserve.package.programs.torch_program import TorchProgram
from mlserve.package import call_rows, golden, load_package, load_program, save_package
from mlserve.tensors import compare

ENDLESS = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}


class Of(nn.Module):
    "A module of one function"

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def normalised(x):
    return (x - x.mean(0)) / (x.std(0, unbiased=False) + 1)


def dynamic():
    torch.manual_seed(0)
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), {nn.Linear})


FAULTY = {"dynamic quantisation": dynamic, "over the batch": lambda: Of(normalised), "a running sum": lambda: Of(lambda x: x.cumsum(0)),
          "the largest of all": lambda: Of(lambda x: x / x.abs().amax().clamp(min=1e-3)), "behind the first": lambda: Of(lambda x: x - x[:1])}


def load_here(package, **settings):
    "What a worker loads, in this process"
    from mlserve.serving.state import Lifecycle
    from mlserve.serving.process.loading import load
    from mlserve.settings import Settings
    life, told = Lifecycle(), Settings(package=str(package.path), **settings)
    load(life, told)
    life.state = "ready"
    return life, told


def submitted(life, *requests, failures=False):
    "What the batcher of a worker answers to requests that come together"
    async def ask():
        answers = await asyncio.gather(*[life.batcher.submit(r) for r in requests], return_exceptions=failures)
        await life.batcher.close(1)
        return answers
    return asyncio.run(ask())


@pytest.mark.parametrize("name", FAULTY)
@pytest.mark.parametrize("rows", [1, 4])
def test_A2_a_row_that_depends_on_its_company_is_refused(name, rows, tmp_path):
    with pytest.raises(CheckFailed, match="depends on the rows beside it") as e:
        save_package(FAULTY[name](), tmp_path / "bad", "bad", {"x": torch.rand(rows, 3)}, ["y"])
    assert "batch=False" in e.value.mend and "quantisation" in e.value.mend
    assert not (tmp_path / "bad").exists()


def test_A2_requests_whose_rows_belong_together_are_never_joined_and_never_cut(tmp_path):
    package = save_package(Of(lambda x: x / x.sum(0)), tmp_path / "share", "share", {"x": torch.rand(5, 1) + 1}, ["y"], batch=False)
    assert load_package(package.path).batch is False and call_rows(package) == 5
    for threads in (1, 2):
        life, _ = load_here(package, max_batch=4, threads=threads)
        requests = [{"x": np.full((rows, 1), i + 1, "f4")} for i, rows in enumerate([1, 2, 3, 100, 1, 1, 40])]
        wholes = [float(a["y"].sum()) for a in submitted(life, *requests)]
        assert np.allclose(wholes, 1, atol=1e-4), wholes


def test_A2_recorded_rows_are_asked_in_the_calls_of_the_reference(tmp_path):
    from mlserve.package.holdout import answers
    from mlserve.release.check.comparison import compare_server

    class Direct:
        "A client that counts the rows of what it asks"

        def __init__(self, life):
            self.life, self.seen = life, []

        def health(self):
            return {"device": {"kind": "cpu"}}

        def infer(self, inputs):
            self.seen.append(len(inputs["x"]))
            return self.life.model.predict(inputs)
    package = save_package(Of(lambda x: x / x.sum(0)), tmp_path / "share", "share", {"x": torch.rand(5, 1) + 1}, ["y"], batch=False)
    held = {"x": np.random.default_rng(0).random((12, 1), np.float32)}
    outputs = answers(load_program(package), held, ["y"], call_rows(package))
    client = Direct(load_here(package)[0])
    found = compare_server(client, package, {"inputs": held, "outputs": outputs, "labels": {"labels": np.zeros(12)}}, "cpu")
    assert client.seen[:4] == [5, 5, 5, 2] and found["rows"] == 12


@pytest.mark.parametrize("format", ["torchscript", "export"])
def test_A3_a_model_that_works_in_place_changes_no_array_of_anybody(format, tmp_path):
    def pixels(x):
        x[:, 0] = 0
        return x.div_(255)
    x = np.random.default_rng(0).random((4, 3), np.float32)
    before = x.copy()
    package = save_package(Of(pixels), tmp_path / "pixels", "pixels", {"x": x}, ["y"], format=format)
    assert (x == before).all() and (golden(package)[0]["x"] == before).all()
    life, _ = load_here(package)
    x.flags.writeable = False  # as the bytes of a request are
    whole, *each = submitted(life, {"x": x}, *[{"x": x[i:i + 1]} for i in range(4)], {"x": x})
    assert np.allclose(whole["y"], [[0, *row[1:] / 255] for row in before]) and (each[-1]["y"] == whole["y"]).all()
    for _ in range(2):
        assert compare(golden(package)[1], life.model.predict({"x": x}), **package.tolerance).passed
    assert (x == before).all()


def test_A3_an_answer_is_not_overwritten_by_the_next():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.zeros(2, 3))

        def forward(self, x):
            return self.kept.copy_(x)
    program, x = TorchProgram(Reused()), np.ones((2, 3), np.float32)
    first = program.run({"x": x}, ["y"])["y"]
    program.run({"x": 0 * x}, ["y"])
    assert (first == 1).all()


def test_A3_a_model_that_writes_to_what_it_keeps_is_refused(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return x + 0 * self.calls
    for batch in (True, False):
        with pytest.raises(CheckFailed, match="writes to its own"):
            save_package(Counting(), tmp_path / "bad", "bad", {"x": torch.rand(2, 3)}, ["y"], batch=batch)


KEEPERS = """import torch
from torch import nn
class Lazy(nn.Module):
    scale = None
    def forward(self, x):
        if self.scale is None: self.scale = float(x.abs().max())
        return x / self.scale
class Smooth(nn.Module):
    def __init__(self): super().__init__(); self.top = torch.zeros(1)
    def forward(self, x):
        self.top = torch.maximum(self.top, x.abs().max())
        return x / self.top
class List(nn.Module):
    def __init__(self): super().__init__(); self.seen = []
    def forward(self, x):
        if float(x.max()) > 10: self.seen.append(float(x.max()))
        return x + sum(self.seen)
class Written(nn.Module):
    def __init__(self): super().__init__(); self.top = torch.zeros(3)
    def forward(self, x): torch.maximum(self.top, x.amax(0), out=self.top); return x + (self.top > 100).to(x.dtype)
class Scripted(nn.Module):
    top: torch.Tensor
    def __init__(self): super().__init__(); self.top = torch.zeros(1)
    def forward(self, x):
        self.top = torch.maximum(self.top, x.max().reshape(1))
        return x + (self.top > 100).to(x.dtype)
"""


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("name", ["Lazy", "Smooth", "List", "Written", "Scripted", "Scripted file"])
def test_A3_what_a_model_keeps_beside_its_buffers_is_refused(name, batch, tmp_path):
    given, form, more = {"x": torch.linspace(0.1, 0.9, 12).reshape(4, 3)}, "torchscript", {}
    handler = tmp_path / "handler.py"
    handler.write_text(KEEPERS)
    spec = importlib.util.spec_from_file_location("keepers", handler)
    keepers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(keepers)
    model = getattr(keepers, name.split()[0])()
    if name in ("Lazy", "Smooth", "List"):
        form, more = "safetensors", {"handler": handler}
    elif name.startswith("Scripted"):
        model = torch.jit.script(model)
    if name == "Scripted file":
        model.save(tmp_path / "model.pt")
        model = tmp_path / "model.pt"
    words = "keeps what it was asked|writes to its own" if not batch else "keeps what|writes to its own|depends on the rows|differ"
    with pytest.raises(CheckFailed, match=words):
        save_package(model, tmp_path / "bad", "bad", given, ["y"], format=form, batch=batch, **more)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("word", ENDLESS)
def test_A3_an_answer_that_json_cannot_carry_is_refused_at_save(word, tmp_path):
    model = Of(lambda x: x.masked_fill(x > 0.5, ENDLESS[word]))
    with pytest.raises(CheckFailed, match=f"The model gives {word} on the example") as e:
        save_package(model, tmp_path / "bad", "bad", {"x": torch.tensor([[0.1, 0.9]])}, ["y"])
    assert "nonfinite='strings'" in e.value.mend


HANDLER = """import numpy as np
def preprocess(request: list[float]) -> dict: return {'x': np.array([request], np.float32)}
def postprocess(outputs: dict, request) -> list[float]: return outputs['y'][0].tolist()
"""


def test_A3_what_the_package_says_is_an_answer_is_a_word_on_every_route(tmp_path):
    import httpx

    from mlserve.client import Client
    from mlserve.serving.http.app import create_app
    (tmp_path / "handler.py").write_text(HANDLER)
    model = Of(lambda x: torch.stack([x[:, 0].log(), 0 * x[:, 1].log(), -x[:, 0].log(), x[:, 1]], 1))
    package = save_package(model, tmp_path / "odd", "odd", {"x": torch.tensor([[0.0, 0.0], [1.0, 2.0]])}, ["y"], nonfinite="strings",
                           handler=tmp_path / "handler.py")
    assert load_package(package.path).nonfinite == "strings"
    life, settings = load_here(package, model_version="1")
    assert life.golden.passed
    app, row = create_app(life, settings), ["-Infinity", "NaN", "Infinity", 0.0]
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [0, 0]}
    asked = {"/predict": ({"inputs": [[0, 0]]}, {"outputs": [row]}), "/predictions/odd": ({"inputs": [[0, 0]]}, {"outputs": [row]}),
             "/v1/models/odd:predict": ({"instances": [[0, 0]]}, {"predictions": [row]}), "/handle": ([0, 0], row),
             "/invocations": ({"instances": [[0, 0]]}, {"predictions": [row]}), "/v2/models/odd/infer": ({"inputs": [tensor]}, row)}

    class Inside(httpx.BaseTransport):
        "The application without a network, for the client"

        def handle_request(self, request):
            async def ask():
                async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as c:
                    r = await c.request(request.method, request.url.path, content=request.content, headers=request.headers)
                    return httpx.Response(r.status_code, content=r.content, headers=r.headers)
            life.batcher.loop = None  # each question has a loop of its own
            return asyncio.run(ask())
    http = httpx.Client(transport=Inside(), base_url="http://server")
    for path, (body, wanted) in asked.items():
        r = http.post(path, json=body)
        got = r.json()["outputs"][0]["data"] if "infer" in path else r.json()
        assert r.status_code == 200 and got == wanted, (path, r.text)
    best = {"inputs": [tensor], "outputs": [{"name": "y", "parameters": {"classification": 4}}]}
    found = http.post("/v2/models/odd/infer", json=best).json()["outputs"][0]["data"]
    assert found == ["Infinity:2", "0.000000:3", "-Infinity:0", "NaN:1"]
    client, x = Client("http://server", transport=Inside()), {"x": np.array([[0, 0], [1, 2]], np.float32)}
    for answer in (client.predict(x), client.infer(x), client.infer(x, binary=False)):
        assert compare(golden(package)[1], answer, **package.tolerance, nan=True).passed
    refused = http.post("/predict", json={"inputs": [["NaN", 0]]})  # the rules for inputs stay as they are
    assert refused.status_code == 400, refused.text
    json.loads((package.path / "serving_input_example.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("number", [2, 3, 10, 100])
def test_A1_small_whole_numbers_are_asked(number, tmp_path):
    model = Of(lambda n: n if torch.jit.is_tracing() else n.masked_fill(n == number, 0))  # wrong when traced
    with pytest.raises(CheckFailed, match=f"for the number {number}"):
        save_package(model, tmp_path / "bad", "bad", {"n": torch.tensor([[5, 7], [6, 8]])}, ["y"])


def test_no_program_is_asked_a_companion_twice(tmp_path, monkeypatch):
    from mlserve.package.export.confined import ConfinedProgram
    asked = []
    for kind in (TorchProgram, ConfinedProgram):
        def run(self, arrays, names, *more, good=kind.run):
            asked.append((id(self), arrays["x"].tobytes()))
            programs.append(self)  # so that no number is given away
            return good(self, arrays, names, *more)
        monkeypatch.setattr(kind, "run", run)
    companion, programs = np.zeros((1, 3), np.float32).tobytes(), []
    save_package(torch.nn.Linear(3, 2), tmp_path / "p", "p", {"x": torch.rand(4, 3)}, ["y"])
    assert sorted(asked.count(a) for a in {*asked} if a[1] == companion) == [1, 1, 1, 1]  # live and saved, used and unused
    asked.clear()
    save_package(tmp_path / "p/model.pt", tmp_path / "q", "q", {"x": torch.rand(4, 3)}, ["y"])
    assert [asked.count(a) for a in {*asked} if a[1] == companion] == [2]  # before it was loaded again, and after
