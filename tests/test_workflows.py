"""The workflows: a version for a GPU is promoted by the job that has one, and by no other."""
import os
import re
import subprocess

import pytest
import yaml

from commands import ROOT

RELEASE = yaml.safe_load((ROOT / ".github/workflows/release.yaml").read_text())["jobs"]


def test_a_gpu_job_checks_and_then_promotes_what_the_release_left_unchecked():
    job = RELEASE["gpu"]
    assert job["needs"] == "release" and job["if"] == "needs.release.outputs.unchecked" and {"self-hosted", "gpu"} <= set(job["runs-on"])
    commands = [s["run"] for s in job["steps"] if "mlserve" in s.get("run", "") and "docker login" not in s["run"]]
    assert [c.split()[1] for c in commands] == ["check", "promote"] and all('--version "$VERSION"' in c for c in commands)
    assert job["env"]["VERSION"] == "${{ needs.release.outputs.unchecked }}" and not any("continue-on-error" in s for s in job["steps"])
    assert {"DEVICE", "MLSERVE_BASE"} | set(job["env"]) == {"VERSION"} | set(RELEASE["release"]["env"])


@pytest.mark.parametrize("device, ended, recorded, code, output", [
    ("cpu", 0, True, 0, ""), ("cuda", 0, True, 0, ""), ("cuda", 9, True, 0, "unchecked=7\n"),
    ("cuda", 9, False, 1, ""), ("cpu", 9, True, 9, ""), ("cuda", 3, True, 3, ""), ("cuda", 6, False, 6, "")])
def test_a_release_without_its_gpu_is_handed_on_and_every_other_failure_fails(tmp_path, device, ended, recorded, code, output):
    "The step as it stands, with a command that ends as it is told"
    [step] = [s for s in RELEASE["release"]["steps"] if s.get("id") == "release"]
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/mlserve").write_text(f'#!/bin/bash\n[ "$4 $5" = "{device} --promote" ] || exit 99\nexit {ended}\n')
    (tmp_path / ".venv/bin/mlserve").chmod(0o755)
    if recorded:
        (tmp_path / "state/runs/now").mkdir(parents=True)
        (tmp_path / "state/runs/now/record.json").write_text('{"name": "digits", "version": "7"}')
    (tmp_path / "out").touch()
    done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=os.environ | {"DEVICE": device, "GITHUB_OUTPUT": str(tmp_path / "out")}, capture_output=True, text=True)
    assert (done.returncode, (tmp_path / "out").read_text()) == (code, output), done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yaml")), ids=lambda p: p.stem)
def test_what_others_wrote_is_named_by_its_commit(path):
    used = [s["uses"] for job in yaml.safe_load(path.read_text())["jobs"].values() for s in job["steps"] if "uses" in s]
    assert used and all(re.search(r"@[0-9a-f]{40}$", u) for u in used)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_what_an_engine_that_was_killed_left_mounted_is_unmounted_with_its_stop(tmp_path):
    "Its data and the layers in it: no folder of a mount can be removed"
    data, layer = tmp_path / "engine/data", tmp_path / "engine/data/overlay2/layer"
    for folder in (data, layer):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", folder, folder], check=True)
    assert open("/proc/mounts").read().count(str(tmp_path)) == 2
    try:
        done = subprocess.run(["bash", ROOT / "docker/engine.sh", "stop"], env=os.environ | {"MLSERVE_STATE": str(tmp_path)}, capture_output=True, text=True)
        assert done.returncode == 0 and str(tmp_path) not in open("/proc/mounts").read(), done.stderr
    finally:
        for folder in (layer, data):
            subprocess.run(["umount", folder], stderr=subprocess.DEVNULL)
