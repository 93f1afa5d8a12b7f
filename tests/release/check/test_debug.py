"""`mlserve debug`: the released image with tools, beside a container that runs and instead of one that failed."""
import os
import time

import pytest

from commands import ROOT, last_json, mlserve, run
from containers import HARDENED, damaged, docker_cli, wait_healthy


@pytest.fixture(scope="session")
def tools(environment):
    "The environment of a machine whose debug base is the base of the images: a shell and what Debian always has"
    return {**environment, "MLSERVE_DEBUG_BASE": os.environ.get("MLSERVE_DEBUG_BASE") or os.environ["MLSERVE_BASE"]}


@pytest.fixture(scope="session")
def all_tools(environment):
    "The same with the base that the project makes, which has strace, gdb and curl as well"
    base = os.environ.get("MLSERVE_DEBUG_BASE")
    if not base:
        done = run("bash", ROOT / "docker/engine.sh", "debug-base", timeout=600)
        assert done.returncode == 0, done.stderr
        base = done.stdout.strip()
    return {**environment, "MLSERVE_DEBUG_BASE": base}


@pytest.fixture
def leaves_nothing(engine):
    "No container and no image of the tools stays"
    yield
    assert not engine.containers.list(all=True, filters={"label": "io.mlserve.debug"})
    assert not engine.images.list(filters={"label": "io.mlserve.debug"})


STACK = """py-spy dump --pid $(workers); ls /proc/1/root/models/package/MLmodel
python3 -c 'import urllib.request as u; print("ready", u.urlopen("http://127.0.0.1:8080/v2/health/ready").status)'; exit 3"""
CALLS = """timeout 5 strace -f -p 1 -e trace=all 2>&1 | head -3; gdb -p 1 -batch -ex bt 2>&1 | tail -1; ls /proc/1/root/models/package/MLmodel
curl -s -o /dev/null -w 'ready %{http_code}\\n' http://127.0.0.1:8080/v2/health/ready; exit 3"""


@pytest.mark.parametrize("kind, look, words", [
    ("tools", STACK, ["mlserve/serving/process/worker.py"]),
    pytest.param("all_tools", CALLS, ["Process 1 attached", "detached"], marks=pytest.mark.matrix),
], ids=["stack", "calls"])
def test_beside_a_hardened_server_its_stack_its_calls_and_its_answers_are_seen(release, start, request, leaves_nothing, kind, look, words):
    "A server without a capability is traced by a container that has one; the exit code is the command's"
    tools = request.getfixturevalue(kind)
    container = start(release["image"], *HARDENED, "--user", "10001:10001")
    wait_healthy(container)
    done = mlserve("debug", release["image"], "--container", container.id, "--command", look, env=tools)
    assert done.returncode == 3, done.stderr[-3000:]
    assert all(word in done.stdout for word in words), done.stdout
    assert "ready 200" in done.stdout and "/proc/1/root/models/package/MLmodel" in done.stdout
    assert f"beside {container.name}" in done.stderr
    container.reload()
    assert container.status == "running" and docker_cli("diff", container.id).stdout == ""


def test_a_start_that_failed_fails_again_with_its_volume_and_its_environment(release, start, tools, leaves_nothing, tracking, tmp_path):
    "Without the volume the baked package would be right and the server would start; without the port's setting it would listen on 8080"
    path = damaged(release, tracking, tmp_path)
    container = start(release["image"], *HARDENED, "--user", "10001:10001", "-v", f"{path}:/models/package:ro", "-e", "MLSERVE_PORT=9123")
    assert container.wait(timeout=30)["StatusCode"] == 5
    again = "grep CapEff /proc/self/status; timeout 30 as-server; echo code $?; echo port $MLSERVE_PORT; df /tmp | tail -1; setpriv --reuid=${DEBUG_USER%%:*} id -u"
    done = mlserve("debug", release["image"], "--container", container.id, "--command", again, env=tools)
    assert done.returncode == 0 and "code 5" in done.stdout and "port 9123" in done.stdout, (done.stdout, done.stderr[-3000:])
    assert "model.pt" in done.stderr + done.stdout and "65536" in done.stdout and done.stdout.strip().endswith("10001")
    assert f"instead of {container.name}, which ended with code 5" in done.stderr


KERNEL = '''/opt/venv/bin/python - <<'END'
import sys
sys.path.append("/opt/debug")
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="image")
client.execute_interactive("import mlserve.serving.server as s, torch, typing_extensions as t; print(s.__file__, torch.__version__, t.__file__)", timeout=60)
manager.shutdown_kernel()
END'''


def test_a_jupyter_kernel_runs_on_the_images_own_packages(release, tools, leaves_nothing):
    "The kernel's packages lie beside; what the image has is taken from the image"
    done = mlserve("debug", release["image"], "--command", KERNEL, env=tools)
    assert done.returncode == 0, done.stderr[-3000:]
    server, torch, extension = done.stdout.split()[-3:]
    assert server == "/opt/mlserve/mlserve/serving/server.py" and extension.startswith("/opt/venv/")


def test_the_layers_of_the_release_lie_below_and_none_of_its_files_changes(release, tools, engine, state, monkeypatch, leaves_nothing):
    "Same layers, by digest; and a file of the image reads the same through the tools' layer"
    from mlserve.release.check.debug import with_tools
    monkeypatch.setenv("MLSERVE_DEBUG_BASE", tools["MLSERVE_DEBUG_BASE"])
    with with_tools(release["image"], state) as made:
        assert engine.images.list(filters={"label": "io.mlserve.debug"})  # which `leaves_nothing` looks for
        below, layers = (engine.images.get(i).attrs["RootFS"]["Layers"] for i in (release["image"], made))
        assert layers[: len(below)] == below and len(layers) == len(below) + 1
        box = engine.containers.create(made)
        tar = b"".join(engine.api.get_archive(box.id, "/etc/passwd")[0])
        box.remove()
        box = engine.containers.create(release["image"])
        assert tar[:100] and b"".join(engine.api.get_archive(box.id, "/etc/passwd")[0])[512:] == tar[512:]
        box.remove()
    began = time.monotonic()
    with with_tools(release["image"], state):
        print(f"again in {time.monotonic() - began:.1f} s")
    assert not [i for i in engine.images.list() if i.id == made]


@pytest.mark.parametrize("container, code, said", [("no-such-container", 2, "There is no container"), (None, 8, "another image")])
def test_a_container_of_another_image_is_not_looked_into(release, tools, engine, container, code, said, leaves_nothing):
    other = None
    if not container:
        other = engine.containers.create(tools["MLSERVE_DEBUG_BASE"], ["true"])
        container = other.id
    try:
        done = mlserve("debug", release["image"], "--container", container, "--command", "true", env=tools)
        assert done.returncode == last_json(done.stderr)["code"] == code and said in done.stderr, done.stderr[-2000:]
    finally:
        if other:
            other.remove()


def test_without_a_debug_base_the_mend_is_named(release, tools):
    done = mlserve("debug", release["image"], "--command", "true", env={**tools, "MLSERVE_DEBUG_BASE": None})
    assert done.returncode == 2 and "make debug-base" in last_json(done.stderr)["error"]
