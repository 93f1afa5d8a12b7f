"""What the tests share: their lanes, a tracking server, and one real release that many of them read."""
import gc
import json
import os

import exporters
import numpy as np
import pytest
from browser import chromium, visit  # noqa: F401 (fixtures, one of each for all modules)
from commands import EXAMPLE, mlserve
from containers import doubles, downloaded, engine, light_doubles, start  # noqa: F401
from linters import checkov, kubernetes_validate, promtool, workflow_linters  # noqa: F401
from emulators import az, gs, immutable, mlflow_server, registry, s3, settings, store, stored_package  # noqa: F401

ENGINE = {"cuda_image", "debug", "deploy", "hardened", "memory", "release"}  # read one release of the example, and run its containers
RELEASES = {"engine_script", "refusals", "release_outages", "runtimes", "scaffold", "resume", "supply_chain"}  # make releases of their own
IMAGES = {"image", "matrix"}  # build images of their own
SERVERS = {"conformance", "fuzz", "gpu_check", "grpc", "handler", "large_bodies", "ledger", "local_code", "outages", "python", "sizes", "sources", "trial"}  # ask servers, whenever they answer
CONTROLS = {"controls"}  # plant a bug and see the test fail, with a clock
SERVING = {"scheduler", "decoding", "gpu", "http_limits", "pipelining", "platforms", "server", "uploads"}  # ask servers, with a clock
ENDURANCE = {"endurance", "isolation", "proxies"}  # servers that are watched for long, killed and replaced, with a clock
CLIENTS = {"clients", "tracing"}  # servers with the clients of others and a collector of traces; run by `make clients`
KUBERNETES = {"kubernetes", "kubernetes_deploy", "nodes"}  # a control plane, and nodes with pods; run by `make kubernetes`
SWARM = {"swarm"}  # three engines in network namespaces, run by `make swarm`
BROWSER = {"browser", "evidence", "lab", "site"}  # pages and JupyterLab in Chromium; run by `make browser`
LANES = {"engine": ENGINE, "releases": RELEASES, "images": IMAGES, "servers": SERVERS, "controls": CONTROLS, "serving": SERVING, "endurance": ENDURANCE, "clients": CLIENTS, "browser": BROWSER, "kubernetes": KUBERNETES, "swarm": SWARM}


def pytest_addoption(parser):
    parser.addoption("--url", help="a server that the conformance suite shall ask")


def lane_of(path):
    name = path.stem.removeprefix("test_")
    return next((lane for lane, modules in LANES.items() if name in modules), "pages")


def pytest_ignore_collect(collection_path, config):
    "Where one lane is asked for, the others' modules are not imported: torch, MLflow and their kin take ten seconds"
    asked = config.option.markexpr.split()
    if asked and "or" not in asked and asked[0] in {*LANES, "pages"} and collection_path.name.startswith("test_"):
        return lane_of(collection_path) != asked[0] or None


def pytest_collection_modifyitems(items):
    "The lane of each test, by its module; the full counts may take hours"
    for item in items:
        item.add_marker(lane_of(item.path))
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(4 * 3600))


def pytest_collection_finish():
    "What is imported by now stays, and garbage is looked for seldom: half a million objects cost a full collection half a second, of which there were hundreds"
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_runtest_setup():
    exporters.remember()


@pytest.fixture(scope="session")
def state(tmp_path_factory):
    "A state folder of the tests' own, so that they never touch a developer's"
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="session")
def tracking(state):
    "A real MLflow server over HTTP"
    home = state / "mlflow"
    home.mkdir()
    with mlflow_server(home, f"sqlite:///{home}/mlflow.db", 1) as url:
        yield url


@pytest.fixture(scope="session")
def environment(state, tracking):
    "The environment every command of the tests runs in"
    assert os.environ.get("MLSERVE_BASE"), "Run the tests with `make test`: it starts an engine and names the base image."
    return {"MLSERVE_STATE": str(state), "MLFLOW_TRACKING_URI": tracking}


@pytest.fixture(scope="session")
def release(environment, state):
    "The main job, once: the example from notebook to promoted pair"
    done = mlserve("release", EXAMPLE, "--promote", "--json", env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result == json.loads((state / "release.json").read_text())
    return result


@pytest.fixture(scope="session")
def double(tmp_path_factory):
    "A package of a model that doubles pairs of numbers"
    import torch

    from mlserve.package import save_package

    class Double(torch.nn.Module):
        def forward(self, x):
            return x * 2

    folder = tmp_path_factory.mktemp("double") / "double"
    save_package(Double().eval(), folder, "double", {"x": torch.zeros(4, 2)}, ["y"])
    return folder


@pytest.fixture(scope="session")
def light_double(tmp_path_factory):
    "The same of plain Python: a container of it starts without torch, in a third of the time"
    from mlserve.package import save_package
    folder = tmp_path_factory.mktemp("light")
    source = "class Double:\n    def predict(self, x): return x * 2\n"
    (folder / "model.py").write_text(source)
    exec(source, cells := {})
    save_package(cells["Double"](), folder / "double", "double", {"x": np.zeros((4, 2), "float32")}, ["y"], format="python", handler=folder / "model.py")
    return folder / "double"


@pytest.fixture(scope="session")
def released(release, tracking, tmp_path_factory):
    "The recorded package, on a folder that is mounted as the volume of weights"
    from mlserve.package import load_package
    folder = tmp_path_factory.mktemp("weights")
    folder.chmod(0o755)
    return load_package(downloaded(release, tracking, folder), digest=release["package"])
