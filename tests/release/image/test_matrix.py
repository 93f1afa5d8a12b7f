"""Formats × deliveries: one model in every format, by every delivery, from real servers; the answers are the same.

`make test` has each format once, and a release from a store; the rows that repeat both are those of `make matrix`."""
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from commands import ROOT, mlserve
from emulators import use

from mlserve.package.programs import FORMATS

CLASS = '''import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(4, 3)
    def forward(self, x): return torch.tanh(self.line(x))
'''
STORES = ["s3", "gs", "az", "registry"]
# every store has `test_deliveries.py`; releases have torchscript, plain Python and ONNX baked, and ONNX from a store
ONCE = {*zip(FORMATS, ["s3", "registry"] * 2), ("onnx", "volume")}
CLIENTS = ["s3fs>=2026.2", "gcsfs>=2026.2", "adlfs>=2026.2"]


def rows(deliveries):
    "Every format by every one of some deliveries"
    return [pytest.param(f, d, marks=() if (f, d) in ONCE else pytest.mark.matrix) for f in FORMATS for d in deliveries]


def first(*kinds):
    "Some kinds, of which the first is enough for every day"
    return [pytest.param(kind, marks=pytest.mark.matrix if kind != kinds[0] else ()) for kind in kinds]


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    "The same weights in every format"
    import torch
    from mlserve.package import save_package
    folder, space = tmp_path_factory.mktemp("matrix"), {}
    (folder / "net.py").write_text(CLASS)
    exec(CLASS, space)
    torch.manual_seed(0)
    net, x = space["Net"]().eval(), np.random.default_rng(0).random((8, 4), np.float32)
    more = {"safetensors": {"handler": folder / "net.py", "arguments": {}}}
    return {f: save_package(net, folder / f, "matrix", {"x": x}, ["y"], format=f, **more.get(f, {})) for f in FORMATS}


@pytest.fixture(scope="module")
def same(packages):
    "Compare an answer to the golden inputs with what the first format's notebook recorded"
    from mlserve.package import golden
    from mlserve.tensors import compare
    inputs, expected = golden(packages["torchscript"])

    def check(client):
        found = compare(expected, client.infer(inputs), rtol=1e-4, atol=1e-5)
        assert found.passed, found
    return check


@pytest.fixture(scope="module")
def build(state, tmp_path_factory):
    "An image from a package, as `build_image` makes it, but not pushed"
    from mlserve.release.image import built_image as image, context
    from mlserve.release.image.engine import base_target, engine, resolve_base
    from mlserve.release.lock import dependencies
    from mlserve.release.image.dockerfile import ImageSpec, render
    base = resolve_base(os.environ["MLSERVE_BASE"])
    target, made = base_target(base), []

    def build(package, delivery, place="/models/package", extra=()):
        lock, wheels = dependencies.resolve_lock(package, target, state, "" if extra else place, extra)  # one lock for all stores
        folder = context.stage(tmp_path_factory.mktemp("build") / "context", render(ImageSpec(base, delivery=delivery)), lock, wheels,
                               package.path if delivery == "baked" else None)
        made.append(image.build(folder, base, package.digest, context.labels_of("matrix", package.digest, lock, base), place=place))
        return made[-1]
    yield build
    for each in {m.id for m in made}:
        engine().images.remove(each, force=True)


@pytest.fixture
def answers(same, monkeypatch):
    "Run an image under the flags of a check: the golden outputs, then the answers of the first format"
    from mlserve.release import check

    def answers(built, package, delivery):
        asked = check.compare_server
        monkeypatch.setattr(check, "compare_server", lambda client, *rest: (same(client), asked(client, *rest))[1])
        found = check.run_image(SimpleNamespace(name="matrix", version="1", image=built.id), package, None, "cpu", delivery, check.Limits())
        assert found.passed and found.golden["max_abs"] < 1e-4
    return answers


@pytest.mark.parametrize("format, store", rows(STORES), indirect=["store"])
def test_a_server_gives_the_same_answers_from_every_store(packages, same, store, format, tmp_path):
    from mlserve.client import Client
    from mlserve.serving.server import serve_local
    package = packages[format]
    uri = store.upload(f"matrix/{format}", package.path)
    with serve_local(uri, package_digest=package.digest, cache=tmp_path / "cache", threads=1) as url:
        same(Client(url))


@pytest.mark.parametrize("format, delivery", rows(["baked", "volume"]))
def test_a_container_gives_the_same_answers_with_its_package_inside_or_mounted(packages, build, answers, format, delivery):
    answers(build(packages[format], delivery), packages[format], delivery)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["s3", "gs", "az"])
def test_a_container_gives_the_same_answers_from_a_store(packages, build, answers, request, monkeypatch, kind):
    "One image of the edge, with the clients of all stores, and an upload by the release's own room; every day a release from `s3` does the same"
    from mlserve.release.record.upload import place_of, upload_package
    place, package = request.getfixturevalue(kind), packages["onnx"]
    use(monkeypatch, place)
    uri = place_of(SimpleNamespace(delivery="store", store=f"{place.root}/release"), package.digest)
    assert upload_package(package, uri) > 0
    assert upload_package(package, uri) == 0
    answers(build(package, "store", uri, CLIENTS), package, "store")


@pytest.mark.parametrize("kind", first("s3", "registry"))
def test_a_release_without_torch_from_a_store_or_the_registry(environment, request, kind):
    "The whole path: upload or log, build, record, check in a container that reads the package at its start; `test_deliveries.py` has a server's registry"
    place = request.getfixturevalue(kind)
    options = ["--delivery", "store", "--store", f"{place.root}/released"] if kind == "s3" else ["--delivery", "registry"]
    done = mlserve("release", ROOT / "tests/notebooks/edge.ipynb", *options, "--json", env={**environment, **(place.env() if kind == "s3" else {})})
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    digest = result["package"].removeprefix("sha256:")
    assert result["place"] == f"{place.root}/released/{digest}" if kind == "s3" else result["place"].startswith("models:/m-")
    assert result["aliases"] == ["candidate"] and result["metrics"]["accuracy"]["container"] == 1
    assert "hunter2" not in done.stdout + done.stderr + "".join(open(p).read() for p in result["evidence"])
    assert result["image_mb"] < 400  # six tenths of one with torch
