"""Break one thing at a time: the exit code, one clear sentence, nothing half-done."""
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from commands import TESTS, forked, interrupted, last_json, mlserve, run, start_mlserve
from containers import docker_cli
from servers import until

NOTEBOOKS = TESTS / "notebooks"
DEAD = "127.0.0.1:1"


@pytest.fixture
def before(tracking):
    "The versions of the good notebook's model that other modules released"
    return [v.version for v in versions(tracking, "good")]


def versions(tracking, name):
    from mlflow import MlflowClient
    return list(MlflowClient(tracking_uri=tracking).search_model_versions(f"name = '{name}'"))


def aliases(tracking, name):
    from mlflow import MlflowClient
    return dict(MlflowClient(tracking_uri=tracking).get_registered_model(name).aliases)


def refused(done, code, *words):
    assert done.returncode == code, f"{done.returncode}: {done.stderr[-3000:]}"
    line = last_json(done.stderr)
    assert line["code"] == code and set(line) == {"code", "step", "error", "resume"}
    assert all(w in line["error"] for w in words), line["error"]
    assert not any(leak in line["error"] for leak in ("Connection aborted", "Pool(", "Error(")), line["error"]
    assert (line["resume"] == "") == (code == 2), line["resume"]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("broken, code, words", [
    ({"DOCKER_HOST": "unix:///nonexistent/docker.sock"}, 7, ["Docker", "unix:///nonexistent/docker.sock: no such file", "make engine-start"]),
    ({"DOCKER_HOST": f"tcp://{DEAD}"}, 7, ["Docker", f"tcp://{DEAD}: connection refused", "make engine-start"]),
    ({"MLSERVE_REGISTRY": DEAD}, 6, [DEAD]),
    ({"MLSERVE_REGISTRY": None}, 2, ["names no registry", "docker.io/OWNER/good"]),
    ({"MLSERVE_BASE": f"{DEAD}/base@sha256:" + "0" * 64}, 6, ["Pulling the base", DEAD]),
    ({"MLFLOW_TRACKING_URI": f"http://{DEAD}"}, 6, [DEAD]),
    ({"MLFLOW_TRACKING_URI": "htpp://mlflow.test"}, 2, ["htpp://mlflow.test", "allowed are http://"]),
], ids=["engine stopped", "engine's port closed", "registry stopped", "no registry", "base that is nowhere", "MLflow unreachable", "misspelt scheme"])
def test_a_missing_part_is_told_before_anything_is_recorded(environment, tracking, broken, code, words, before):
    refused(mlserve("release", NOTEBOOKS / "good.ipynb", env={**environment, **broken}), code, *words)
    assert [v.version for v in versions(tracking, "good")] == before


@pytest.mark.parametrize("broken, code, missing", [
    ({}, 0, []),
    ({"DOCKER_HOST": f"tcp://{DEAD}", "MLSERVE_REGISTRY": DEAD, "MLFLOW_TRACKING_URI": f"http://{DEAD}"}, 7, ["engine", "builder", "base", "registry", "mlflow"]),
], ids=["all is here", "much is missing"])
def test_the_doctor_names_everything_that_is_missing_and_what_mends_it(environment, broken, code, missing, tmp_path):
    done = mlserve("doctor", "--json", env={**environment, "MLSERVE_STATE": str(tmp_path), **broken})
    assert done.returncode == code, done.stderr
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert [what for what in findings if findings[what]["state"] == "missing"] == missing
    assert all(findings[what]["mend"] and findings[what]["code"] for what in missing)
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) >= len(findings)
    if not missing:
        assert not list(tmp_path.iterdir())  # nothing was made


@pytest.mark.parametrize("name, content, words", [
    ("README.md", "# mine", ["README.md", ".ipynb"]),
    ("mine.ipynb", "# mine", ["mine.ipynb", "not a notebook"]),
    ("mine.ipynb", json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), ["mine.ipynb", "'package_dir'"]),
    ("mine.ipynb", '{"cells": [null]}', ["mine.ipynb", "entry 1 of its cells is null"]),
], ids=["another file", "no JSON", "no parameter", "no cell"])
def test_what_is_no_model_notebook_is_told_before_anything_is_asked_or_made(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    state = tmp_path / "state"
    dead = {"MLSERVE_STATE": str(state), "MLFLOW_TRACKING_URI": f"sqlite:///{state}/mlflow.db", "DOCKER_HOST": f"tcp://{DEAD}"}
    refused(mlserve("release", tmp_path / name, env=dead), 2, *words)
    assert not state.exists()


@pytest.mark.parametrize("arguments, words", [
    (["release", NOTEBOOKS / "good.ipynb", "--device", "gpu"], ["'gpu'", "allowed: cpu, cuda."]),
    (["check", "nothing", "--device", "tpu"], ["'tpu'", "allowed: cpu, cuda, cuda:N."]),
    (["promote", "nothing", "--device", "tpu"], ["'tpu'", "allowed: cpu, cuda, cuda:N."]),
    (["check", "nothing@sha256:abc"], ["nothing@sha256:abc", "64"]),
    (["check", "sha256:" + "0" * 64], ["Nothing is recorded in sqlite:///", "which does not exist", "MLSERVE_STATE"]),
    (["check", "nothing"], ["Nothing is recorded in sqlite:///"]),
    (["check", "nothing/at:all"], ["'nothing/at:all' is the tag of an image", "@sha256:"]),
    (["serve"], ["A server needs a package", "mlserve serve PACKAGE"]),
    (["check", "nothing", "--devise", "cpu"], ["--devise (Possible options: --device). mlserve check --help lists what it takes"]),
], ids=["release on gpu", "check on tpu", "promote on tpu", "cut digest", "unknown digest", "unknown model", "tag", "no package", "misspelt option"])
def test_what_does_not_exist_is_named(tmp_path, arguments, words):
    "Whoever only asks leaves nothing behind"
    refused(mlserve(*arguments, env={"MLSERVE_STATE": None, "MLFLOW_TRACKING_URI": None}, cwd=tmp_path), 2, *words)
    assert not list(tmp_path.iterdir())


def test_what_another_store_has_is_not_in_this_one(environment):
    refused(mlserve("check", "sha256:" + "0" * 64, env=environment), 2, "No model version", "http://")
    refused(mlserve("check", "nothing", env=environment), 2, "No model 'nothing' is recorded", "http://")


@pytest.mark.parametrize("words, printed, told", [
    (["status"], "nothing is deployed\n", "next: mlserve deploy compose MODEL\n"),
    (["status", "digits"], "nothing is deployed\n", "next: mlserve deploy compose digits\n"),
    (["status", "--json"], "[]\n", ""),
])
def test_a_command_says_that_there_is_nothing_and_what_comes_next(monkeypatch, words, printed, told):
    from mlserve.cli import app
    from typer.testing import CliRunner
    monkeypatch.setattr("mlserve.release.deploy.overview.status", lambda model, warn: [])
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.stdout, done.stderr) == (0, printed, told)


def test_the_server_takes_an_address_as_it_is_typed():
    done = mlserve("serve", "s3://bucket/x", "--port", "0", env={"MLSERVE_PACKAGE": None, "MLSERVE_PACKAGE_DIGEST": None})
    assert done.returncode == last_json(done.stderr)["code"] == 8, done.stderr
    assert last_json(done.stderr)["error"].startswith("A package from a store or a registry is asked for without a digest")


def test_a_training_notebook_that_raises_is_kept(environment, state, tracking):
    refused(mlserve("release", NOTEBOOKS / "raises.ipynb", env=environment), 1, "ZeroDivisionError")
    kept = [p for p in (state / "runs").rglob("*.ipynb") if "ZeroDivisionError" in p.read_text()]
    assert kept and versions(tracking, "raises") == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_release_is_closed_and_kept(environment, state, tracking, sign):
    "Ctrl-C, or a job that is cancelled, while the notebook trains"
    from mlflow import MlflowClient
    last = (state / "release.json").read_text() if (state / "release.json").exists() else "{}"
    (state / "release.json").write_text(last)
    before = set((state / "runs").rglob("slow.ipynb"))
    process = start_mlserve("release", NOTEBOOKS / "slow.ipynb", env=environment)
    until(lambda: [p for p in set((state / "runs").rglob("slow.ipynb")) - before if '"a long way to go\\n"' in p.read_text()], 60)
    kernels = run_out("pgrep", "-P", process.pid).split()
    code, stderr = interrupted(process, sign)
    line = last_json(stderr)
    assert code == line["code"] == 130 and line["step"] == "train" and line["resume"].startswith("mlserve release"), stderr
    assert (state / "release.json").read_text() == last  # what was released last
    journal = max((state / "runs").glob("*/journal.jsonl"), key=lambda p: p.stat().st_mtime)
    last = {entry["event"]: entry for entry in map(json.loads, journal.read_text().splitlines())}
    assert (last["step"]["name"], last["failed"]["step"], last["failed"]["code"], last["ended"]["status"]) == ("reach", "train", 130, "KILLED")
    client = MlflowClient(tracking_uri=tracking)
    [run] = client.search_runs([client.get_experiment_by_name("mlserve").experiment_id], "attributes.run_name = 'slow'", max_results=1)
    assert run.info.status == "KILLED" and [f.path for f in client.list_artifacts(run.info.run_id, "evidence") if f.path.endswith("slow.ipynb")]
    assert kernels and not [k for k in kernels if Path(f"/proc/{k}").exists()]


LATE = """
import asyncio, json, os, signal, sys, threading, time
from jupyter_client.manager import AsyncKernelManager
from mlserve.release.notebook import run_notebook
closed = AsyncKernelManager._async_cleanup_resources
async def slow(self, *args, **kw):
    await asyncio.sleep(1.5)  # a busy machine, between the kernel's death and the end of its manager
    await closed(self, *args, **kw)
AsyncKernelManager.cleanup_resources = AsyncKernelManager._async_cleanup_resources = slow
def interrupt():
    while not os.path.exists(sys.argv[1] + "/here"):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # the background, where tests may run, ignores it
threading.Thread(target=interrupt, daemon=True).start()
try:
    run_notebook(sys.argv[1] + "/slow.ipynb", {}, sys.argv[1] + "/out.ipynb")
except KeyboardInterrupt:
    print(json.dumps({"code": 130}), file=sys.stderr)
"""


def test_a_kernel_that_dies_of_an_interruption_says_nothing_below_the_last_line(tmp_path):
    "asyncio told of a task that nobody waited for any more, when the process ended"
    import nbformat
    cell = "import time\nopen('here', 'w').close()\ntime.sleep(60)"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), tmp_path / "slow.ipynb")
    done = run(sys.executable, "-c", LATE, tmp_path, timeout=120)
    assert last_json(done.stderr) == {"code": 130} and "Kernel died" not in done.stderr, done.stderr


FALLS = """#| export
import os, signal, time
import numpy as np
class Falls:
    def load(self, files): pass
    def predict(self, x):
        if "MLSERVE_IMAGE" in os.environ and (x[:, 0] == 40).any(): DEED
        return x[:, :1] * 2
"""


@pytest.mark.parametrize("deed, words", [
    ("os.kill(os.getpid(), signal.SIGKILL)", ["a worker of it was ended by SIGKILL"]),
    pytest.param("time.sleep(600)", ["gave no answer within 10 s"], marks=pytest.mark.matrix),
], ids=["killed", "hangs"])
def test_a_model_that_dies_of_a_held_back_row_fails_the_check(environment, tracking, tmp_path, deed, words):
    "It gave 6 and a version that stayed recorded, as if the network had failed"
    import nbformat
    name = "falls-" + deed[:2]
    save = f"""from mlserve.package import save_package
rows = np.arange(64, dtype="float32")[:, None].repeat(4, 1)
save_package(Falls(), package_dir, "{name}", {{"x": rows[:8]}}, ["y"], holdout=(rows, rows[:, 0] * 2))"""
    cells = [nbformat.v4.new_code_cell("package_dir = None", metadata={"tags": ["parameters"]}), *map(nbformat.v4.new_code_cell, (FALLS.replace("DEED", deed), save))]
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}})
    nbformat.write(book, tmp_path / f"{name}.ipynb")
    done = mlserve("release", tmp_path / f"{name}.ipynb", env=environment)
    refused(done, 3, "held-back rows 33 to 64", "MB", "Its log ends:", *words)
    [version] = versions(tracking, name)
    assert version.tags["mlserve.status"] == "failed" and words[0] in json.loads(version.tags["mlserve.check.cpu"])["reason"]


def run_out(*command):
    return run(*command).stdout


def test_a_notebook_that_sets_its_experiment_is_trained_in_it(tracking, tmp_path, monkeypatch):
    "MLflow refused the run of the release, which lay in another one; a name that only the notebook knows is told"
    import nbformat
    from mlflow import MlflowClient
    from mlserve.errors import UsageError
    from mlserve.release.record.mlflow_store import environment
    from mlserve.release.run import open_run
    from mlserve.release.spec import ReleaseSpec
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    client = MlflowClient(tracking_uri=tracking)
    for call in ("'doors'", "'do' + 'ors'"):
        code = f"import mlflow\nmlflow.set_experiment({call})\nwith mlflow.start_run(): mlflow.log_metric('loss', 0.5)"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), tmp_path / "doors.ipynb")  # without a kernelspec, too
        run = open_run(ReleaseSpec(name="doors", notebook=tmp_path / "doors.ipynb", state=tmp_path / "state"))
        with environment(MLFLOW_RUN_ID=run.id):
            if "+" not in call:
                run.notebook(run.spec.notebook)
            else:
                with pytest.raises(UsageError, match="MLFLOW_EXPERIMENT_NAME"):
                    run.notebook(run.spec.notebook)
        logged = client.get_run(run.id)
        assert client.get_experiment(logged.info.experiment_id).name == ("mlserve" if "+" in call else "doors")
        assert logged.data.metrics == ({} if "+" in call else {"loss": 0.5})


def test_two_first_commands_share_a_new_store(tmp_path):
    "Both make the tables of one file"
    code = "from mlserve.release.record import mlflow_store; print(mlflow_store.experiment(mlflow_store.client()))"
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(lambda _: forked(code, env={"MLSERVE_STATE": str(tmp_path), "MLFLOW_TRACKING_URI": ""}, timeout=120), range(3)))
    assert len({done.stdout for done in said}) == 1 and said[0].stdout.strip(), said


@pytest.mark.matrix
def test_a_regression_on_a_table_is_measured_by_its_errors(environment, tracking, tmp_path):
    "An accuracy that is asked of it is refused before anything is built; the image has onnxruntime, and nothing of what trained"
    done = mlserve("release", NOTEBOOKS / "price.ipynb", "--json", env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["metrics"]) == ["rmse", "mae", "r2"] and result["check"]["rows"] == 100
    assert result["check"]["reading"] == "'price' as numbers"
    assert result["reference"] == "saved program" and any("not the live model" in w for w in result["warnings"])
    rmse = result["metrics"]["rmse"]
    assert rmse["container"] == pytest.approx(rmse["notebook"], rel=1e-3) and rmse["production"] is None
    assert rmse["container"] > rmse["baseline"] and any("no better than" in w for w in result["warnings"])  # it was trained on prices below zero
    assert "warning: The model is no better than" in done.stderr
    [version] = versions(tracking, "price")
    assert version.tags["mlserve.contract"] == "rooms INT64[-1,1], area FP64[-1,1], town BYTES[-1,1] → price FP64[-1]" and version.tags["mlserve.reference"] == "saved program"
    code = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    installed = docker_cli("run", "--rm", "--network", "none", "--entrypoint", "/opt/venv/bin/python", result["image"], "-c", code).stdout.split()
    assert "onnxruntime" in installed and not {"scikit-learn", "scipy", "pandas", "onnx", "skl2onnx", "torch", "xgboost-cpu"} & {*installed}
    asked = json.loads(Path(result["commands"]["query"].split("@")[1]).read_text())
    assert [{type(v) for v in row.values()} for row in asked["inputs"]] == [{int, float, str}]  # a row as a person writes it
    gated = beside(tmp_path, "price", "[gates]\nmin = {accuracy = 0.9}\n")
    refused(mlserve("release", gated, env=environment), 2, "accuracy", "'price' as numbers", "allowed: rmse, mae, r2")
    assert versions(tracking, "price") == [version]


def test_a_saved_model_that_differs_on_held_back_rows_ends_before_anything_is_built(environment, state, tracking):
    done = mlserve("release", NOTEBOOKS / "shortcut.ipynb", "--promote", env=environment)
    refused(done, 3, "The saved model and the live one differ on 64 held-back rows")
    assert last_json(done.stderr)["step"] == "train" and versions(tracking, "shortcut") == []
    [run] = {p.parent for p in (state / "runs").glob("*/shortcut.ipynb")}
    assert not (run / "build.json").exists() and not (run / "package").exists()


def test_a_golden_output_that_is_wrong_fails_the_check(environment, tracking):
    refused(mlserve("release", NOTEBOOKS / "wrong_golden.ipynb", "--promote", env=environment), 3, "golden")
    [version] = versions(tracking, "wrong")  # the package's name, since none was given
    assert version.tags["mlserve.status"] == "failed"
    assert aliases(tracking, version.name) == {}


def beside(folder, name, spec):
    "A notebook of the tests with an mlserve.toml of its own"
    (folder / f"{name}.ipynb").write_text((NOTEBOOKS / f"{name}.ipynb").read_text())
    (folder / "mlserve.toml").write_text(spec)
    return folder / f"{name}.ipynb"


def test_a_gate_that_is_missed_fails_the_check(environment, tracking, tmp_path):
    "And again when the version is checked again: the gates are in the record"
    gated = beside(tmp_path, "guessing", "[gates]\nmin = {accuracy = 0.9}\n")
    refused(mlserve("release", gated, "--promote", env=environment), 3, "accuracy is 0.5", "at least 0.9")
    [version] = versions(tracking, "guessing")
    finding = json.loads(version.tags["mlserve.check.cpu"])
    assert version.tags["mlserve.status"] == "failed" and finding["passed"] is False and "accuracy" in finding["reason"]
    assert finding["metrics"]["accuracy"] == {"notebook": 0.5, "container": 0.5, "production": None, "baseline": 0.5}
    refused(mlserve("check", "guessing", "--version", version.version, env=environment), 3, "accuracy is 0.5", "at least 0.9")
    assert aliases(tracking, version.name) == {}


@pytest.mark.parametrize("gates, words", [
    ("min = {acuracy = 0.9}", ["did you mean 'accuracy'", "allowed: accuracy, balanced_accuracy, f1_macro, rmse, mae, r2"]),
    ("min = {accuracy = 97}", ["min of accuracy is 97", "allowed: 0 to 1"]),
    ("min = {rmse = 3}", ["of which less is better", "allowed: max"]),
    ("accuracy = 0.97", ["gates.accuracy", "allowed in this table: min, max, drop, target"]),
    ("min = {accuracy = nan}", ["gates.min.accuracy", "finite"]),
], ids=["misspelt", "percent", "wrong side", "no such key", "not a number"])
def test_a_gate_that_could_never_be_right_is_told_before_anything_is_asked(tmp_path, gates, words):
    dead = {"MLSERVE_STATE": str(tmp_path / "state"), "MLFLOW_TRACKING_URI": None, "DOCKER_HOST": f"tcp://{DEAD}"}
    refused(mlserve("release", beside(tmp_path, "good", f"[gates]\n{gates}\n"), env=dead), 2, *words)


@pytest.mark.parametrize("name, gates, words", [
    ("good", "min = {accuracy = 0.9}", ["held-back data", "save_package"]),
    ("heads", "min = {accuracy = 0.9}", ["shape_logits, colour_logits", 'target = "shape_logits"']),
    ("heads", 'target = "shape"', ["no output 'shape'", "shape_logits, colour_logits"]),
], ids=["no held-back data", "two heads", "no such output"])
def test_a_gate_that_cannot_be_answered_is_told_before_anything_is_built(environment, tracking, tmp_path, name, gates, words):
    before = versions(tracking, name)
    refused(mlserve("release", beside(tmp_path, name, f"[gates]\n{gates}\n"), env=environment), 2, *words)
    assert versions(tracking, name) == before


def test_an_image_over_its_budget_is_refused_before_it_is_pushed_or_recorded(environment, state, tracking, tmp_path):
    before = len(versions(tracking, "guessing"))
    refused(mlserve("release", beside(tmp_path, "guessing", f'repository = "{os.environ["MLSERVE_REGISTRY"]}/heavy"\nmax_image_mb = 1\n'), env=environment), 3, "allows 1 MB")
    assert len(versions(tracking, "guessing")) == before
    host = os.environ["MLSERVE_REGISTRY"]
    assert httpx.get(f"http://{host}/v2/heavy/tags/list", trust_env=False).status_code == 404


@pytest.mark.parametrize("options, more, code, word", [
    (["--delivery", "store", "--store", "http://169.254.169.254/models"], {}, 8, "s3://"),
    (["--delivery", "store", "--store", "s3://key:hunter2@bucket/models"], {}, 8, "s3://"),
    (["--delivery", "store"], {}, 2, "store"),
    (["--delivery", "store", "--store", "s3://bucket/models"], {"AWS_ENDPOINT_URL": f"http://{DEAD}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hunter2"}, 6, "s3://bucket/models"),
    (["--delivery", "registry"], {"MLFLOW_TRACKING_URI": None}, 2, "MLFLOW_TRACKING_URI"),
], ids=["scheme", "credentials in the address", "no store", "store that is down", "registry that is a file"])
def test_a_delivery_that_cannot_be_is_told_before_training(environment, tracking, state, tmp_path, options, more, code, word, before):
    done = mlserve("release", NOTEBOOKS / "good.ipynb", *options, env={**environment, "MLSERVE_STATE": str(tmp_path / "state"), **more})
    refused(done, code, word)
    assert "hunter2" not in done.stderr and [v.version for v in versions(tracking, "good")] == before
    assert not (tmp_path / "state/runs").exists()


def test_a_name_that_is_not_the_packages_is_refused_before_the_build(environment, state, tracking, tmp_path):
    refused(mlserve("release", beside(tmp_path, "good", 'name = "stored"\n'), env=environment), 2, "The spec's name is 'stored', the package's 'good'.")
    assert versions(tracking, "stored") == []


def test_a_variable_that_nothing_reads_is_refused_by_every_command(tmp_path):
    "A misspelt MLSERVE_STATE would ask another record"
    for command in (["diff", "digits", "1", "1"], ["check", "digits"], ["release", "nothing.ipynb"]):
        refused(mlserve(*command, env={"MLSERVE_STAT": str(tmp_path)}, cwd=tmp_path), 2, "Did you mean MLSERVE_STATE?")


def test_a_torch_that_did_not_train_is_refused(environment, tracking, tmp_path, before):
    refused(mlserve("release", beside(tmp_path, "good", 'requirements = ["torch==2.12.0"]\n'), env=environment), 8, "torch")
    assert [v.version for v in versions(tracking, "good")] == before


def test_a_misspelt_setting_of_the_spec_is_refused(environment, tmp_path):
    refused(mlserve("release", beside(tmp_path, "good", 'delivry = "baked"\n'), env=environment), 2, "delivery")


@pytest.mark.parametrize("parameters, word", [({"package_dri": "x"}, "package_dir"), ({}, "package_dir")], ids=["misspelt", "missing"])
def test_a_wrong_pipeline_parameter_is_refused_before_running(tmp_path, parameters, word):
    from mlserve.errors import UsageError
    from mlserve.release.notebook import run_notebook
    from mlserve.release.run import pipelines
    with pytest.raises(UsageError, match=word):
        run_notebook(pipelines() / "build_image.ipynb", parameters, tmp_path / "out.ipynb")
    assert not (tmp_path / "out.ipynb").exists()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    import torch
    from mlserve.package import save_package
    path = tmp_path_factory.mktemp("served") / "package"
    return save_package(torch.nn.Linear(4, 1).eval(), path, name="served", inputs={"x": torch.rand(8, 4)}, outputs=["y"])


def serve(path, **settings):
    env = {**os.environ, "MLSERVE_PACKAGE": str(path), "MLSERVE_PORT": "0", "MLSERVE_HOST": "127.0.0.1", **settings}
    return subprocess.Popen([sys.executable, "-m", "mlserve.serving.server"], env=env, stderr=subprocess.PIPE, text=True)


def test_the_server_refuses_a_locked_package_with_a_wrong_golden_output(package, tmp_path):
    import shutil
    from mlserve.package import golden, write_lock
    from mlserve.package.arrays import save_tensors
    path = tmp_path / "package"
    shutil.copytree(package.path, path)
    inputs, outputs = golden(package)
    save_tensors(path / "golden.safetensors", inputs=inputs, outputs={"y": outputs["y"] + 1})
    write_lock(path)
    process = serve(path)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3 and "golden" in last_json(stderr)["error"]


@pytest.mark.parametrize("settings, code, word", [
    ({"MLSERVE_DEVICE": "cuda"}, 9, "--gpus"), ({"MLSERVE_DEVCE": "cuda"}, 2, "MLSERVE_DEVICE"), ({"MLSERVE_PACKAGE": "/nowhere"}, 7, "/nowhere"),
    ({"MLSERVE_PACKAGE": "ftp://host/package"}, 8, "ftp"), ({"MLSERVE_PACKAGE_DIGEST": "sha256:" + "0" * 64}, 5, "sha256"),
], ids=["no GPU", "misspelt setting", "no package", "scheme", "other digest"])
def test_the_server_refuses(package, settings, code, word):
    process = serve(package.path, **settings)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert word in last_json(stderr)["error"]


def test_sigterm_while_loading_ends_at_once(package):
    process = serve(package.path)
    time.sleep(1.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM) and time.monotonic() - began < 8
