"""The workflows: what was checked is promoted by a person, and deployed; the way back is at hand."""
import json
import os
import re
import subprocess

import pytest
import yaml

from commands import ROOT

PAGE = json.loads((ROOT / "nbs/tutorials/release_from_your_ci.ipynb").read_text())["cells"]
RELEASE = yaml.safe_load((ROOT / ".github/workflows/release.yaml").read_text())["jobs"]


def block(language):
    "The one block of a language on the page about pipelines"
    [text] = re.findall(rf"```{language}\n(.*?)```", "\n".join("".join(c["source"]) for c in PAGE), re.S)
    return text


def commands(job):
    "The commands of ours in a job"
    return [s["run"].split("mlserve ")[-1] for s in RELEASE[job]["steps"] if "mlserve " in s.get("run", "")]


def test_a_gpu_job_checks_what_the_release_left_unchecked_and_promotion_waits_for_it_and_for_a_person():
    gpu, promote, deploy = RELEASE["gpu"], RELEASE["promote"], RELEASE["deploy"]
    assert gpu["needs"] == "release" and gpu["if"] == "needs.release.outputs.unchecked" and {"self-hosted", "gpu"} <= set(gpu["runs-on"])
    assert commands("gpu") == ['check digits --version "$VERSION" --json'] and not any("continue-on-error" in s for job in RELEASE.values() for s in job["steps"])
    assert promote["needs"] == ["release", "gpu"] and promote["environment"] == "production" and commands("promote") == ['promote digits --version "$VERSION"']
    assert "--promote" not in str(RELEASE["release"]["steps"])
    assert commands("deploy") == ['deploy compose digits --version "$VERSION" --json'] and "promote" in deploy["needs"]
    for job in (gpu, promote, deploy):
        assert job["env"]["VERSION"] == "${{ needs.release.outputs.version }}"


def met(job, results, action="release"):
    "Whether the condition of a job holds, as GitHub reads it; `success()` is what stands there where nothing else asks for the result of a need"
    text = RELEASE[job].get("if", "").removeprefix("${{").removesuffix("}}").strip()
    names = {"needs.release.outputs.unchecked": repr(results.get("unchecked", "")), "inputs.action": repr(action), "!cancelled()": "True", "&&": "and", "||": "or"}
    names |= {f"needs.{name}.result": repr(result) for name, result in results.items()}
    for name, value in names.items():
        text = text.replace(name, value)
    return bool(eval(text)) and ("cancelled()" in RELEASE[job].get("if", "") or all(results[n] == "success" for n in [RELEASE[job].get("needs", [])] if n))


@pytest.mark.parametrize("release, gpu, promoted", [("success", "skipped", True), ("success", "success", True), ("success", "failure", False),
                                                    ("success", "cancelled", False), ("failure", "skipped", False), ("skipped", "skipped", False)])
def test_what_was_not_checked_is_not_promoted_and_what_was_not_promoted_is_not_deployed(release, gpu, promoted):
    assert met("promote", {"release": release, "gpu": gpu}) == promoted
    assert met("deploy", {"release": release, "promote": "success" if promoted else "skipped"}) == promoted


def test_a_way_back_starts_no_release_and_does_not_queue_behind_one_that_waits_for_approval():
    assert met("rollback", {}, "rollback") and not met("release", {}, "rollback") and not met("rollback", {}) and met("release", {})
    assert commands("rollback") == ["rollback digits --target compose-digits --json"]
    groups = {name: job.get("concurrency", {}).get("group") for name, job in RELEASE.items()}
    assert groups == {"release": "release-digits", "gpu": None, "promote": None, "deploy": "deploy-digits", "rollback": "deploy-digits"}
    assert not any(job.get("concurrency", {}).get("cancel-in-progress") for job in RELEASE.values())


def test_no_job_may_write_to_the_repository():
    "The site's two permissions are those of the pages; publishing has an identity and no token"
    for path in (ROOT / ".github/workflows").glob("*.yaml"):
        file = yaml.safe_load(path.read_text())
        assert file["permissions"] == {"contents": "read"}
        assert all(set(job.get("permissions", {})) <= {"pages", "id-token"} for job in file["jobs"].values())


def test_schemas_and_linters_have_no_finding(workflow_linters, tmp_path):
    assert workflow_linters("github", *sorted((ROOT / ".github/workflows").glob("*.yaml")), ROOT / "nbs/scaffolds/release.yaml") == []
    (tmp_path / ".gitlab-ci.yml").write_text(block("yaml"))
    assert workflow_linters("gitlab", tmp_path / ".gitlab-ci.yml") == []


def test_control_the_linters_see_an_unknown_key_a_stranger_s_text_in_a_line_and_a_job_that_is_not_there(workflow_linters, tmp_path):
    good, files = (ROOT / ".github/workflows/release.yaml").read_text(), []
    for old, new in (("timeout-minutes: 60", "timeout-minuts: 60"), ('"$VERSION"', '"${{ github.head_ref }}"'), ("needs: [release, gpu]", "needs: [release, cpu]")):
        assert old in good
        files.append(tmp_path / f"{len(files)}.yaml")
        files[-1].write_text(good.replace(old, new, 1))
    found = "".join(workflow_linters("github", *files))
    assert "timeout-minuts" in found and "template-injection" in found and '"cpu"' in found, found


def test_gitlab_gives_the_same_commands_as_github():
    jobs = yaml.safe_load(block("yaml"))
    for name in ("promote", "deploy", "rollback"):
        assert [c.removeprefix("mlserve ").replace("mine", "digits") for c in jobs[name]["script"]] == [c.removesuffix(" --json") for c in commands(name)]
    assert jobs["promote"]["environment"] == "production" and jobs["rollback"]["resource_group"] == jobs["deploy"]["resource_group"]


@pytest.mark.parametrize("device, ended, recorded, code, output", [
    ("cpu", 0, True, 0, "version=7\n"), ("cuda", 0, True, 0, "version=7\n"), ("cuda", 9, True, 0, "unchecked=true\nversion=7\n"),
    ("cuda", 9, False, 1, "unchecked=true\n"), ("cpu", 9, True, 9, ""), ("cuda", 3, True, 3, ""), ("cuda", 6, False, 6, "")])
def test_a_release_without_its_gpu_is_handed_on_and_every_other_failure_fails(tmp_path, device, ended, recorded, code, output):
    "The step as it stands, with a command that ends as it is told"
    [step] = [s for s in RELEASE["release"]["steps"] if s.get("id") == "release"]
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/mlserve").write_text(f'#!/bin/bash\n[ "$4 $5" = "{device} --json" ] || exit 99\nexit {ended}\n')
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
