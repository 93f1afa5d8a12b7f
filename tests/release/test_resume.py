"""kill -9 between the steps of a release and in them: what goes on from there, and what is left."""
import json
import os
import shutil
import subprocess
import sys

import httpx

from commands import TESTS, last_json, mlserve
from mlserve.release.record.journal import is_gone

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
    while not any(map(mine, subprocess.run(owners, capture_output=True, text=True).stdout.splitlines())): time.sleep(0.1)
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
    command = [sys.executable, "-W", "ignore", "-c", CUT, point, *map(str, words)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=900)
    assert done.returncode == -9, done.stderr[-3000:]
    return done.stderr


def left_by_the_dead(engine):
    "The containers of commands that are gone; those of other tests have a living owner"
    boxes = engine.containers.list(all=True, filters={"label": "io.mlserve.owner"}, ignore_removed=True)
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
        if point == "container":
            assert left_by_the_dead(engine)
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
