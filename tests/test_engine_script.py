"""The script that starts an engine, after a kill: it knows its own processes, and ready means that they answer."""
import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import psutil
import pytest

from commands import ROOT, run
from servers import until

SCRIPT = ROOT / "docker/engine.sh"


def script(verb, state, **env):
    return run("bash", SCRIPT, verb, env={"MLSERVE_STATE": str(state), "MLSERVE_PRIVATE_ENGINE": "1", "DOCKER_HOST": None, "MLSERVE_REGISTRY": None,
               "MLSERVE_PROXY_IMAGE": "x", "MLSERVE_COMPOSE": "x", **env}, timeout=120)


def told(state):
    return dict(line.split("=", 1) for line in script("env", state).stdout.splitlines())


@pytest.fixture
def state(tmp_path):
    "Of an engine of its own, which knows a base and is ended with the test"
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/base").write_text(os.environ["MLSERVE_BASE"])
    yield tmp_path
    script("stop", tmp_path)


def end(state, name):
    os.kill(int((state / f"engine/{name}.pid").read_text()), signal.SIGKILL)


def test_a_stranger_that_got_the_number_of_a_dead_engine_is_neither_taken_for_it_nor_ended(tmp_path):
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / "engine").mkdir()
        for name in ("supervisor", "dockerd", "registry"):
            (tmp_path / f"engine/{name}.pid").write_text(str(stranger.pid))
        assert "DOCKER_HOST" not in script("env", tmp_path).stdout
        done = script("stop", tmp_path)
        assert done.returncode == 0 and "stopped" not in done.stderr and stranger.poll() is None, done.stderr
        assert not list((tmp_path / "engine").glob("*.pid"))
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="a private engine needs root")
def test_after_a_kill_the_next_start_says_ready_when_engine_and_registry_answer(state):
    "A zombie keeps its number, the socket stays, and the next dockerd waited for the dead containerd"
    for _ in range(2):
        done = script("start", state)
        assert done.returncode == 0 and "ready:" in done.stderr, done.stderr
        ways = told(state)
        assert run("/usr/bin/docker", "info", env={"DOCKER_HOST": ways["DOCKER_HOST"]}).returncode == 0
        assert httpx.get(f"http://{ways['MLSERVE_REGISTRY']}/v2/", trust_env=False).status_code == 200
        for name in ("supervisor", "dockerd", "registry"):
            end(state, name)
    script("start", state)
    bridge = run("/usr/bin/docker", "network", "create", "left", env={"DOCKER_HOST": told(state)["DOCKER_HOST"]}).stdout[:12]
    assert Path(f"/sys/class/net/br-{bridge}").exists()
    script("stop", state)
    assert not Path(f"/sys/class/net/br-{bridge}").exists()  # its addresses are free for the next engine


@pytest.mark.skipif(os.geteuid() != 0, reason="a private engine needs root")
def test_an_engine_that_crashes_is_started_again_and_what_it_ended_with_is_kept(state):
    "As by systemd; it ends for good when it is asked to"
    assert script("start", state).returncode == 0
    host = told(state)["DOCKER_HOST"]
    time.sleep(4)  # one that ends sooner than that cannot start
    first = (state / "engine/dockerd.pid").read_text()
    end(state, "dockerd")
    until(lambda: run("/usr/bin/docker", "info", env={"DOCKER_HOST": host}).returncode == 0, 60)
    assert (state / "engine/dockerd.pid").read_text() != first
    assert "dockerd ended with 137" in (state / "engine/crashes").read_text()
    script("stop", state)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(state) in " ".join(p.info["cmdline"] or [])]
