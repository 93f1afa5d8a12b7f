"""The main job on real parts: engine, registry, MLflow over HTTP, the example's image; and what it answers."""
import contextlib
import json
import os
import subprocess
import time

import docker
import httpx
import numpy as np
import pytest

from conftest import EXAMPLE, last_json, mlserve
from serving import until

NETWORK = f"mlserve-tests-{os.getpid()}"  # of this run of the tests alone
HARDENED = ["--read-only", "--tmpfs", "/tmp:rw,noexec,nosuid,nodev,size=64m", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
            "--pids-limit", "128", "--memory", "1g", "--memory-swap", "1g", "--cpus", "1", "--ulimit", "nofile=4096", "--ulimit", "core=0",
            "--stop-timeout", "45"]


@pytest.fixture(scope="session")
def engine():
    client = docker.from_env()
    name = NETWORK
    network = next(iter(client.networks.list(names=[name])), None) or client.networks.create(name)
    yield client
    with contextlib.suppress(docker.errors.NotFound):  # another module's tests had the same one
        network.remove()


def docker_cli(*arguments):
    from mlserve.release.image import find_builder
    return subprocess.run([find_builder().command, *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture
def start(engine):
    "Start an image with `docker run` and given flags; the container is removed whatever happens"
    ids = []

    def start(image, *flags, command=()):
        done = docker_cli("run", "-d", "--network", NETWORK, "-p", "127.0.0.1::8080", *flags, image, *command)
        assert done.returncode == 0, done.stderr
        ids.append(done.stdout.strip())
        return engine.containers.get(ids[-1])
    yield start
    for i in ids:
        engine.containers.get(i).remove(force=True, v=True)


def address(container):
    container.reload()
    return f"http://127.0.0.1:{container.ports['8080/tcp'][0]['HostPort']}"


def wait_healthy(container, seconds=60):
    for _ in range(seconds * 4):
        container.reload()
        health = container.attrs["State"].get("Health", {}).get("Status")
        if health == "healthy":
            return
        assert container.status == "running", container.logs().decode()[-3000:]
        time.sleep(0.25)
    raise AssertionError(f"{health} after {seconds} s: {container.logs().decode()[-3000:]}")


def test_release_says_what_it_made(release):
    assert release["model"] == "digits" and int(release["version"]) >= 1
    assert "@sha256:" in release["image"] and release["package"].startswith("sha256:")
    assert f"-e MLSERVE_MODEL_VERSION={release['version']} -e MLSERVE_IMAGE={release['image']} " in release["commands"]["serve"]
    accuracy = release["metrics"]["accuracy"]
    assert accuracy["notebook"] >= 0.97 and accuracy["baseline"] < 0.2 and release["check"]["reading"] == "'logits' as scores in 10 columns"
    assert accuracy["container"] == pytest.approx(accuracy["notebook"], abs=0.003)
    assert release["reference"] == "live model" and not any("live model" in w for w in release["warnings"])
    assert release["device"] == "cpu" and 0 < release["image_mb"] < 2000
    assert set(release["aliases"]) == {"candidate", "production"}
    assert all(s["seconds"] >= 0 for s in release["steps"]) and len(release["steps"]) >= 4
    assert all(os.path.exists(p) for p in release["evidence"]) and len(release["evidence"]) == 4


def test_the_registry_answers_for_the_digest(release):
    repository, digest = release["image"].split("@")
    host, name = repository.split("/", 1)
    answer = httpx.head(f"http://{host}/v2/{name}/manifests/{digest}", trust_env=False,
                        headers={"Accept": "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"})
    assert answer.status_code == 200 and answer.headers["Docker-Content-Digest"] == digest


def test_the_record_holds_the_pair(release, tracking):
    from mlflow import MlflowClient
    client = MlflowClient(tracking_uri=tracking)
    version = client.get_model_version("digits", release["version"])
    assert version.tags["mlserve.image"] == release["image"]
    assert version.tags["mlserve.package"] == release["package"]
    assert version.tags["mlserve.reference"] == json.loads(version.tags["mlserve.check.cpu"])["reference"] == "live model"
    assert version.tags["mlserve.status"] == "checked"
    assert json.loads(version.tags["mlserve.check.cpu"])["passed"] is True
    for alias in ("candidate", "production"):
        assert client.get_model_version_by_alias("digits", alias).version == version.version


def strict(text):
    "JSON as other readers know it"
    def refuse(constant):
        raise ValueError(constant)
    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("device, code", [("cuda", 9), ("cuda:0", 9), ("tpu", 2)])
def test_a_check_that_cannot_run_leaves_the_record_as_it_was(release, environment, tracking, device, code):
    "The image holds a torch for the CPU: whether or not the host has a GPU, it cannot be checked on one"
    from mlflow import MlflowClient
    client = MlflowClient(tracking_uri=tracking)
    before = client.get_model_version("digits", release["version"]).tags
    done = mlserve("check", "digits", "--version", release["version"], "--device", device, env=environment)
    assert done.returncode == last_json(done.stderr)["code"] == code, done.stderr[-3000:]
    assert client.get_model_version("digits", release["version"]).tags == before
    done = mlserve("promote", "digits", "--version", release["version"], env=environment)
    assert done.returncode == 0 and done.stdout.strip() == release["image"]
    done = mlserve("promote", "digits", "--version", release["version"], "--device", "cuda", env=environment)
    assert done.returncode == 3 and "--device cuda" in last_json(done.stderr)["error"]


def test_a_second_check_takes_device_and_delivery_from_the_record(release, environment, tracking):
    done = mlserve("check", "digits", "--version", release["version"], "--json", env=environment)
    found = strict(done.stdout)
    assert done.returncode == 0 and (found["passed"], found["device"], found["delivery"]) == (True, "cpu", "baked")
    from mlflow import MlflowClient
    assert strict(MlflowClient(tracking_uri=tracking).get_model_version("digits", release["version"]).tags["mlserve.check.cpu"])["passed"]


def test_a_release_says_each_step_when_it_starts_and_when_it_ends(environment, release):
    "Of a release that fails while it trains"
    done = mlserve("release", EXAMPLE.parent.parent.parent / "tests/notebooks/raises.ipynb", env=environment)
    said = [line.split() for line in done.stderr.splitlines()]
    assert ["train", "…"] in said and said.index(["reach", "…"]) < said.index(["train", "…"])


def test_hardened_it_becomes_healthy_and_answers_as_the_notebook_did(release, start, tracking, monkeypatch):
    import mlflow
    from mlserve.client import Client
    from mlserve.package import golden, load_package
    from mlserve.tensors import compare
    container = start(release["image"], *HARDENED, "--user", "10001:10001")
    wait_healthy(container)
    mlflow.set_tracking_uri(tracking)
    path = mlflow.artifacts.download_artifacts(f"models:/digits/{release['version']}")
    package = load_package(path, digest=release["package"])
    inputs, outputs = golden(package)
    assert compare(outputs, Client(address(container)).infer(inputs), **package.tolerance).passed
    assert docker_cli("diff", container.id).stdout == ""


@pytest.mark.parametrize("flags", [("--user", "4242:0"), ("--user", "10001:10001", "--init")], ids=["arbitrary uid", "init"])
def test_it_stops_cleanly_under_other_flags(release, start, flags):
    container = start(release["image"], *HARDENED, *flags, "-e", "MLSERVE_DRAIN_DELAY=0")
    wait_healthy(container)
    container.stop(timeout=30)
    assert container.wait()["StatusCode"] == 0


def test_it_serves_without_any_network(release, engine):
    container = engine.containers.run(release["image"], detach=True, network_mode="none", read_only=True, tmpfs={"/tmp": "size=64m"})
    try:
        wait_healthy(container)
    finally:
        container.remove(force=True, v=True)


def test_cuda_without_a_gpu_is_refused_within_ten_seconds(release, start):
    began = time.monotonic()
    container = start(release["image"], "-e", "MLSERVE_DEVICE=cuda")
    assert container.wait(timeout=20)["StatusCode"] == 9
    assert time.monotonic() - began < 10
    assert "--gpus" in container.logs().decode()


def damaged(release, tracking, folder):
    "The released package, with one bit of its weights flipped"
    import mlflow
    mlflow.set_tracking_uri(tracking)
    path = folder / "package"
    mlflow.artifacts.download_artifacts(f"models:/digits/{release['version']}", dst_path=str(path))
    (path / "registered_model_meta").unlink(missing_ok=True)
    path.chmod(0o755)
    weights = bytearray((path / "model.pt").read_bytes())
    weights[len(weights) // 2] ^= 1
    (path / "model.pt").write_bytes(weights)
    return path


def test_a_flipped_byte_in_a_mounted_package_is_refused(release, start, tracking, tmp_path):
    path = damaged(release, tracking, tmp_path)
    container = start(release["image"], "-v", f"{path}:/models/package:ro")
    assert container.wait(timeout=30)["StatusCode"] == 5
    assert "model.pt" in container.logs().decode()


def test_no_container_is_left(release, engine):
    "Those of a check that another run is making just now go by themselves"
    def checked():
        return {c.id for c in engine.containers.list(all=True, ignore_removed=True) if "mlserve-check" in (c.attrs["HostConfig"].get("NetworkMode") or "")}
    seen = checked()
    until(lambda: not seen & checked(), 60)


def test_the_readme_query_is_true(release, start):
    "The query of the README, sent to the released image, gives the answer's shape and class"
    import re
    from conftest import ROOT
    blocks = re.findall(r"```(?:json|bash|text|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    query = next(b for b in blocks if "/predict" in b)
    body = re.search(r"'(\{.*\})'", query, re.S)[1]
    answer = json.loads(re.search(r"\{\"outputs\".*\}", "\n".join(blocks), re.S)[0].splitlines()[0])
    container = start(release["image"])
    wait_healthy(container)
    got = httpx.post(address(container) + "/predict", content=body, headers={"Content-Type": "application/json"}, trust_env=False).json()
    assert np.shape(got["outputs"]) == np.shape(answer["outputs"])
    assert np.argmax(got["outputs"], -1).tolist() == np.argmax(answer["outputs"], -1).tolist()


@pytest.mark.parametrize("variables", [["MLSERVE_PORT=9123", "MLSERVE_HOST=::"], ["SAGEMAKER_BIND_TO_PORT=9124", "MLSERVE_METRICS_PORT=tcp://10.0.0.7:80", "MLSERVE_PORT_80_TCP=tcp://10.0.0.7:80"]], ids=lambda v: v[0])
def test_the_health_check_of_an_image_asks_where_its_server_listens(variables, release, start, engine):
    "An address, a port and service links that the image did not know"
    container = start(release["image"], *(word for v in variables for word in ("-e", v)))
    wait_healthy(container)
    port = variables[0].partition("=")[2]
    assert f"port {port}: HTTP/1.1 200 OK" in container.attrs["State"]["Health"]["Log"][-1]["Output"]
    assert engine.images.get(release["image"]).labels["com.amazonaws.sagemaker.capabilities.accept-bind-to-port"] == "true"


def test_a_change_of_serving_code_rebuilds_only_the_code_layer(release, engine, environment, tmp_path):
    "Same package, one changed line: every layer but the last is the same"
    import shutil
    from mlserve.release import image
    package = tmp_path / "package"
    import mlflow
    mlflow.set_tracking_uri(environment["MLFLOW_TRACKING_URI"])
    mlflow.artifacts.download_artifacts(f"models:/digits/{release['version']}", dst_path=str(package))
    (package / "registered_model_meta").unlink(missing_ok=True)
    code = tmp_path / "src"
    import mlserve as installed
    from pathlib import Path
    shutil.copytree(Path(installed.__file__).parent, code / "mlserve", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(EXAMPLE.parent.parent / "pipelines", code / "mlserve/pipelines")  # as a wheel carries them
    with open(code / "mlserve/serving/app.py", "a") as f:
        f.write("\n# one changed line\n")
    began = time.monotonic()
    done = mlserve("build", EXAMPLE, "--package", package, "--json", env={**environment, "PYTHONPATH": str(code)})
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-3000:]
    changed = json.loads(done.stdout)["image"]
    print(f"the whole command took {seconds:.1f} s, its build step {json.loads(done.stdout)['seconds']} s")  # measured by people, not asserted
    assert changed != release["image"]
    old, new = (engine.images.get(i).attrs["RootFS"]["Layers"] for i in (release["image"], changed))
    assert old[:-1] == new[:-1] and old[-1] != new[-1]


def test_the_debug_image_has_the_layers_of_the_release_and_a_shell(release, engine, environment, state, tmp_path, monkeypatch):
    "`docker build --target debug` of the same context: the same layers on a base, root, and /bin/sh"
    import mlflow
    from mlserve.package import load_package
    from mlserve.release import context, dependencies, image
    from mlserve.release.dockerfile import ImageSpec, render
    mlflow.set_tracking_uri(environment["MLFLOW_TRACKING_URI"])
    mlflow.artifacts.download_artifacts(f"models:/digits/{release['version']}", dst_path=str(tmp_path / "package"))
    (tmp_path / "package/registered_model_meta").unlink(missing_ok=True)
    package = load_package(tmp_path / "package", release["package"])
    base = image.resolve_base(os.environ["MLSERVE_BASE"])
    lock, wheels = dependencies.resolve(package, image.base_target(base), state)
    folder = context.stage(tmp_path / "context", render(ImageSpec(base)), lock, wheels, package.path)
    debug, production = (image.build(folder, base, package.digest, {}, target=t) for t in ("debug", "production"))
    try:
        debug_layers, layers, released = (engine.images.get(i).attrs["RootFS"]["Layers"] for i in (debug.id, production.id, release["image"]))
        assert debug_layers[-len(layers):] == layers and layers[:-1] == released[:-1] and len(debug_layers) > len(layers)
        look = "id -u; ls /models/package/MLmodel; /opt/venv/bin/python -c 'import mlserve.serving.server as s; print(s.__file__)'"
        said = engine.containers.run(debug.id, ["-c", look], network_mode="none", remove=True).decode().split()
        assert said == ["0", "/models/package/MLmodel", "/opt/mlserve/mlserve/serving/server.py"]
    finally:
        for built in (debug, production):
            engine.images.remove(built.id, force=True)


def test_a_package_on_a_volume_releases_without_weights_in_the_image(environment, release, start):
    "The same notebook delivered by volume: the check mounts the recorded package, the image holds none"
    done = mlserve("release", EXAMPLE.parent.parent.parent / "tests/notebooks/good.ipynb", "--delivery", "volume", "--json", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["aliases"] == ["candidate"]
    done = mlserve("check", "good", "--json", env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["delivery"] == "volume", done.stderr[-3000:]
    container = start(result["image"])
    assert container.wait(timeout=30)["StatusCode"] == 7
    assert "/models/package" in container.logs().decode()


def test_large_weights_inside_an_image_are_warned_about(environment, release, tmp_path):
    "A package of 501 MB is built, and the way out is named on stderr and in the result"
    import torch
    from mlserve.lock import write_lock
    from mlserve.package import save_package
    package = save_package(torch.nn.Linear(4, 1).eval(), tmp_path / "package", name="large", inputs={"x": torch.rand(8, 4)}, outputs=["y"])
    (package.path / "files").mkdir(mode=0o755)
    with open(package.path / "files/table.bin", "wb") as f:
        f.truncate(501 * 10**6)
    write_lock(package.path)
    done = mlserve("build", EXAMPLE, "--package", package.path, "--name", "large", "--json", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    [warning] = json.loads(done.stdout)["warnings"]
    assert warning.startswith("501 MB") and all(d in warning for d in ("'volume'", "'store'", "'registry'"))
    assert f"warning: {warning}" in done.stderr
    assert release["warnings"] == []
