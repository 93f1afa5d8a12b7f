"""The main job on real parts: engine, registry, MLflow over HTTP, the example's image; and what it answers."""
import json
import os
import subprocess
import time

import docker
import httpx
import numpy as np
import pytest

from conftest import EXAMPLE, mlserve

HARDENED = ["--read-only", "--tmpfs", "/tmp:rw,noexec,nosuid,nodev,size=64m", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
            "--pids-limit", "128", "--memory", "1g", "--memory-swap", "1g", "--cpus", "1", "--ulimit", "nofile=4096", "--ulimit", "core=0",
            "--stop-timeout", "45"]


@pytest.fixture(scope="session")
def engine():
    client = docker.from_env()
    name = "mlserve-tests"
    network = next(iter(client.networks.list(names=[name])), None) or client.networks.create(name)
    yield client
    network.remove()


def docker_cli(*arguments):
    from mlserve.release.image import find_builder
    return subprocess.run([find_builder().command, *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture
def start(engine):
    "Start an image with `docker run` and given flags; the container is removed whatever happens"
    ids = []

    def start(image, *flags, command=()):
        done = docker_cli("run", "-d", "--network", "mlserve-tests", "-p", "127.0.0.1::8080", *flags, image, *command)
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
    assert release["accuracy"]["notebook"] >= 0.97
    assert release["accuracy"]["container"] == pytest.approx(release["accuracy"]["notebook"], abs=0.003)
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
    assert version.tags["mlserve.status"] == "checked"
    assert json.loads(version.tags["mlserve.check.cpu"])["passed"] is True
    for alias in ("candidate", "production"):
        assert client.get_model_version_by_alias("digits", alias).version == version.version


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


def test_a_flipped_byte_in_a_mounted_package_is_refused(release, start, tracking, tmp_path):
    import mlflow
    mlflow.set_tracking_uri(tracking)
    path = tmp_path / "package"
    mlflow.artifacts.download_artifacts(f"models:/digits/{release['version']}", dst_path=str(path))
    (path / "registered_model_meta").unlink(missing_ok=True)
    path.chmod(0o755)
    weights = bytearray((path / "model.pt").read_bytes())
    weights[len(weights) // 2] ^= 1
    (path / "model.pt").write_bytes(weights)
    container = start(release["image"], "-v", f"{path}:/models/package:ro")
    assert container.wait(timeout=30)["StatusCode"] == 5
    assert "model.pt" in container.logs().decode()


def test_no_container_is_left(release, engine):
    assert not [c for c in engine.containers.list(all=True) if "mlserve-check" in (c.attrs["HostConfig"].get("NetworkMode") or "")]


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


def test_a_change_of_serving_code_rebuilds_only_the_code_layer(release, engine, environment, tmp_path):
    "Same package, one changed line: every layer but the last is the same, and the step takes less than 15 s"
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
    assert changed != release["image"] and seconds < 15, seconds
    old, new = (engine.images.get(i).attrs["RootFS"]["Layers"] for i in (release["image"], changed))
    assert old[:-1] == new[:-1] and old[-1] != new[-1]
