"""kill -9 between the steps of a release and in them: what goes on from there, and what is left."""
import json
import os
import shutil
import time

import httpx
import pytest

from commands import TESTS, forked, last_json, mlserve
from kills import Fates, hold_record, run_to_death
from mlserve.release.record.journal import Journal, is_gone
from mlserve.release.resume import _left

GOOD = TESTS / "notebooks/good.ipynb"
CUT = """
import os, signal, subprocess, sys, threading, time
from mlserve.release import pipeline, record
from mlserve.release.run import Run
point = sys.argv.pop(1)
def die(*args, **kw): os.kill(os.getpid(), signal.SIGKILL)
def mine(owner): # of a container: the kernel that is a child of this command
    try: return f"PPid:\\t{os.getpid()}\\n" in open(f"/proc/{owner.split()[3]}/status").read()
    except (OSError, IndexError): return False
def watch():
    owners = ["docker", "ps", "--format", '{{.Label "io.mlserve.owner"}}']
    while not any(map(mine, subprocess.run(owners, capture_output=True, text=True).stdout.splitlines())): time.sleep(0.3)
    die()
def did(self, step, real=Run.did):
    if step["name"] == point: die()
    real(self, step)
Run.did = did  # a step was taken, and is not noted yet
if point == "log": record.log_package = die
if point == "attest": pipeline.attest = die
if point == "promote": record.promote = die
if point == "result": pipeline.write_result = die
if point == "container": threading.Thread(target=watch, daemon=True).start()
from mlserve.cli import main
main()
"""


def cut(point, *words, env):
    "A command that is killed at a point"
    done = forked(CUT, point, *words, env=env, timeout=900)
    assert done.returncode == -9, done.stderr[-3000:]
    return done.stderr


def left_by_the_dead(engine):
    "The containers of commands that are gone; those of other tests have a living owner"
    boxes = engine.containers.list(all=True, filters={"label": "io.mlserve.check=good"}, ignore_removed=True)
    return [box.id for box in boxes if is_gone(box.labels["io.mlserve.owner"])]


def test_a_release_that_is_killed_again_and_again_goes_on_to_one_pair(environment, tracking, state, engine, tmp_path):
    "After training, build, version and check, in a check, before and after the alias; nothing is trained twice, nothing stays"
    from mlflow import MlflowClient
    client = MlflowClient(tracking_uri=tracking)

    def numbers():
        return {v.version for v in client.search_model_versions("name = 'good'")}
    before = numbers()
    notebook = shutil.copy(GOOD, tmp_path)  # of no commit, which may move while the tests run
    cut("log", "release", notebook, env=environment)
    folder = max(path.parent for path in (state / "runs").glob("*/journal.jsonl"))
    trained = (folder / "good.ipynb").read_bytes()
    for point in ("build", "record", "container", "attest", "promote", "result"):
        said = cut(point, "resume", folder, env=environment)
        assert "was cut off" in said, said
        assert point != "build" or numbers() == before
        if point == "build":
            image = json.loads((folder / "build.json").read_text())["image"]
        if point == "record":
            (folder / "record.json").unlink()  # as if it had been killed between MLflow's answer and the file
    done = mlserve("resume", "--json", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert (folder / "good.ipynb").read_bytes() == trained and result["image"] == image
    assert numbers() - before == {result["version"]} and result["aliases"] == ["candidate"]
    assert [step["name"] for step in result["steps"]] == ["reach", "train", "build", "record", "check", "candidate"]
    assert not left_by_the_dead(engine) and not list(folder.glob(".kernel-*"))
    run = client.get_run(result["run"])
    assert run.info.status == "FINISHED"
    running = client.search_runs([run.info.experiment_id], "attributes.status = 'RUNNING' and tags.`mlserve.owner` LIKE '%'")
    assert not [left.info.run_id for left in running if is_gone(left.data.tags["mlserve.owner"])]  # those of other tests have a living owner
    repository, digest = image.split("@")
    host, name = repository.split("/", 1)
    accept = {"Accept": "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"}
    assert httpx.head(f"http://{host}/v2/{name}/manifests/{digest}", headers=accept, trust_env=False).status_code == 200
    assert mlserve("verify", image, env=environment).returncode == 0
    done = mlserve("resume", folder, env=environment)
    assert done.returncode == 0 and done.stdout.strip() == image and done.stderr.count("done before") == 3, done.stderr
    done = mlserve("resume", env=environment)
    assert done.returncode == last_json(done.stderr)["code"] == 2, done.stderr  # nothing is left


KILLS = 200
OUTSIDE = {1, 6, 7, 130}  # what a command may end with whose kernel, or program, was killed


def runs_of(state):
    "The folders of runs, oldest first"
    return [path.parent for path in sorted((state / "runs").glob("*/journal.jsonl"))]


def killed_release(environment, tracking, state, folder, fates, wanted):
    "One release that is killed again and again, and then ends; how often it was killed"
    words = ["release", shutil.copy(GOOD, folder), *["--promote"] * fates.dice.randrange(2)]
    before, known, kills = runs_of(state), hold_record(tracking, "good"), 0
    for _ in range(100):
        fate, start = fates.draw() if kills < wanted else None, time.monotonic()
        code, out, err = run_to_death([*words, "--json"], environment, folder, fate)
        if fate:
            kills += fate.struck
            print(f"{kills if fate.struck else '-':>4}  {str(fate):<44}  {words[0]:<7} {time.monotonic() - start:6.1f} s  code {code}", flush=True)
            if not fate.struck:
                fates.outlived(fate)
        recorded, own = hold_record(tracking, "good"), [run for run in runs_of(state) if run not in before]
        if code == 0:
            break
        assert "Traceback" not in err and (code == -9 or fate and fate.struck and code in OUTSIDE), (code, str(fate), err[-3000:])
        ended = own and Journal(own[-1]).last("ended").get("status") == "FINISHED"  # killed before it could say so
        words = ["resume", *[own[-1]] * bool(ended)] if own else words
    result = json.loads(out)
    fates.learn(result["steps"])
    built = {json.loads((run / "build.json").read_text())["image"] for run in own if (run / "build.json").exists()}
    new = {version: image for version, image in recorded.items() if version not in known}
    assert new == {result["version"]: result["image"]} and built == {result["image"]}, (new, built, result)
    [run] = [run for run in own if result["run"] in (run / "journal.jsonl").read_text()]
    code, out, err = run_to_death(["resume", run, "--json"], environment, folder)
    assert code == 0 and json.loads(out)["image"] == result["image"] and hold_record(tracking, "good") == recorded, err[-3000:]
    assert json.loads((state / "release.json").read_text())["image"] == result["image"]
    assert not [journal.folder for journal in _left(state) if journal.folder in own]  # nothing for `mlserve resume` to find
    return kills


@pytest.mark.soak
def test_R4_releases_that_are_killed_at_random_end_in_one_pair_each(environment, tracking, state, engine, tmp_path):
    "At moments of every step and at system calls; the command, its children, or one of them"
    code, out, err = run_to_death(["release", shutil.copy(GOOD, tmp_path), "--promote", "--json"], environment, tmp_path)
    assert code == 0, err[-3000:]
    fates, kills, rounds = Fates(int(os.environ.get("KILLS_SEED", 1)), tmp_path, json.loads(out)["steps"]), 0, 0
    while kills < KILLS:
        (folder := tmp_path / f"{rounds}").mkdir()
        start = time.monotonic()
        kills += killed_release(environment, tracking, state, folder, fates, min(KILLS - kills, fates.dice.randrange(4, 16)))
        rounds += 1
        print(f"release {rounds} ends well after {time.monotonic() - start:.0f} s, {kills} kills in all", flush=True)
        assert not left_by_the_dead(engine)
