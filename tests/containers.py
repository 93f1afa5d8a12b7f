"""Containers of an image, by the command line as users start them, and removed whatever happens."""
import contextlib
import io
import os
import subprocess
import tarfile
import time

import docker
import pytest

NETWORK = f"mlserve-tests-{os.getpid()}"  # of this run of the tests alone
# exactly what an image has to work under; the network and the port are the engine's own
HARDENED = ["--read-only", "--tmpfs", "/tmp:rw,noexec,nosuid,nodev,size=64m", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
            "--pids-limit", "128", "--memory", "1g", "--memory-swap", "1g", "--cpus", "1", "--ulimit", "nofile=4096", "--ulimit", "core=0",
            "--stop-timeout", "45"]
HANG, WRONG = ["ENTRYPOINT [\"/opt/venv/bin/python\", \"-c\", \"import time; time.sleep(600)\"]", "CMD []"], "sha256:" + "0" * 64


@pytest.fixture(scope="session")
def engine():
    client = docker.from_env()
    name = NETWORK
    network = next(iter(client.networks.list(names=[name])), None) or client.networks.create(name)
    yield client
    with contextlib.suppress(docker.errors.NotFound):  # another module's tests had the same one
        network.remove()


def docker_cli(*arguments):
    from mlserve.release.image.engine import find_builder
    return subprocess.run([find_builder().command, *arguments], capture_output=True, text=True, timeout=120)


def doubled(engine, release, double):
    "Images of this package by digest, from the released one: two that differ in a label, and three bad ones"
    from mlserve.package import load_package
    digest, repository, made = load_package(double).digest, f'{release["image"].split("@")[0]}-{load_package(double).format}', {}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.add(double, "double")
    box = engine.containers.create(release["image"])
    box.put_archive("/models", file.getvalue())
    variants = {"one": [], "two": [], "hangs": HANG, "wrong": [f"LABEL io.mlserve.package={WRONG}"], "other": ["LABEL io.mlserve.package=sha256:" + "3" * 64]}
    for tag, changes in variants.items():
        own = ["ENV MLSERVE_PACKAGE=/models/double", f"ENV MLSERVE_PACKAGE_DIGEST={digest}", f"LABEL io.mlserve.package={digest}", f"LABEL test={tag}"]
        box.commit(repository, tag, changes=own + changes)
        for line in engine.images.push(repository, tag, stream=True, decode=True):
            made[tag] = line.get("aux", {}).get("Digest") or made.get(tag)
    box.remove()
    return {tag: f"{repository}@{made[tag]}" for tag in made}


@pytest.fixture(scope="session")
def doubles(engine, release, double):
    return doubled(engine, release, double)


@pytest.fixture(scope="session")
def light_doubles(engine, release, light_double):
    return doubled(engine, release, light_double)


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


def downloaded(release, tracking, folder):
    "The released package, as it was recorded, where a container may read it"
    import mlflow
    mlflow.set_tracking_uri(tracking)
    path = folder / "package"
    mlflow.artifacts.download_artifacts(f"models:/digits/{release['version']}", dst_path=str(path))
    (path / "registered_model_meta").unlink(missing_ok=True)
    path.chmod(0o755)
    return path


def damaged(release, tracking, folder):
    "The released package, with one bit of its weights flipped"
    path = downloaded(release, tracking, folder)
    weights = bytearray((path / "model.pt").read_bytes())
    weights[len(weights) // 2] ^= 1
    (path / "model.pt").write_bytes(weights)
    return path
