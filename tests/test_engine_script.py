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
def test_after_a_kill_the_next_start_says_ready_when_engine_and_registry_answer(tmp_path):
    "A zombie keeps its number, the socket stays, and the next dockerd waited for the dead containerd"
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/base").write_text(os.environ["MLSERVE_BASE"])
    try:
        for _ in range(2):
            done = script("start", tmp_path)
            assert done.returncode == 0 and "ready:" in done.stderr, done.stderr
            told = dict(line.split("=", 1) for line in script("env", tmp_path).stdout.splitlines())
            assert run("/usr/bin/docker", "info", env={"DOCKER_HOST": told["DOCKER_HOST"]}).returncode == 0
            assert httpx.get(f"http://{told['MLSERVE_REGISTRY']}/v2/", trust_env=False).status_code == 200
            for name in ("supervisor", "dockerd", "registry"):
                end(tmp_path, name)
        told = dict(line.split("=", 1) for line in (script("start", tmp_path), script("env", tmp_path))[1].stdout.splitlines())
        bridge = run("/usr/bin/docker", "network", "create", "left", env={"DOCKER_HOST": told["DOCKER_HOST"]}).stdout[:12]
        assert Path(f"/sys/class/net/br-{bridge}").exists()
        script("stop", tmp_path)
        assert not Path(f"/sys/class/net/br-{bridge}").exists()  # its addresses are free for the next engine
    finally:
        script("stop", tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="a private engine needs root")
def test_an_engine_that_crashes_is_started_again_and_what_it_ended_with_is_kept(tmp_path):
    "As by systemd; it ends for good when it is asked to"
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/base").write_text(os.environ["MLSERVE_BASE"])
    try:
        assert script("start", tmp_path).returncode == 0
        told = dict(line.split("=", 1) for line in script("env", tmp_path).stdout.splitlines())
        time.sleep(4)  # one that ends sooner than that cannot start
        first = (tmp_path / "engine/dockerd.pid").read_text()
        end(tmp_path, "dockerd")
        until(lambda: run("/usr/bin/docker", "info", env={"DOCKER_HOST": told["DOCKER_HOST"]}).returncode == 0, 60)
        assert (tmp_path / "engine/dockerd.pid").read_text() != first
        assert "dockerd ended with 137" in (tmp_path / "engine/crashes").read_text()
    finally:
        script("stop", tmp_path)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
