"""Break one thing at a time: the exit code, one clear sentence, nothing half-done."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from conftest import ROOT, last_json, mlserve

NOTEBOOKS = Path(__file__).parent / "notebooks"
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
    ({"MLFLOW_TRACKING_URI": f"http://{DEAD}"}, 6, [DEAD]),
], ids=["engine stopped", "engine's port closed", "registry stopped", "MLflow unreachable"])
def test_a_missing_part_is_told_before_anything_is_recorded(environment, tracking, broken, code, words, before):
    refused(mlserve("release", NOTEBOOKS / "good.ipynb", env={**environment, **broken}), code, *words)
    assert [v.version for v in versions(tracking, "good")] == before


@pytest.mark.parametrize("name, content, words", [
    ("README.md", "# mine", ["README.md", ".ipynb"]),
    ("mine.ipynb", "# mine", ["mine.ipynb", "not a notebook"]),
    ("mine.ipynb", json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), ["mine.ipynb", "'package_dir'"]),
], ids=["another file", "no JSON", "no parameter"])
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
    (["check", "sha256:" + "0" * 64], ["No model version", "sqlite:///"]),
    (["check", "nothing"], ["No alias 'candidate'", "sqlite:///"]),
    (["check", "nothing", "--devise", "cpu"], ["--devise (Possible options: --device). mlserve --help"]),
], ids=["release on gpu", "check on tpu", "promote on tpu", "cut digest", "unknown digest", "unknown model", "misspelt option"])
def test_what_does_not_exist_is_named(tmp_path, arguments, words):
    empty = {"MLSERVE_STATE": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    refused(mlserve(*arguments, env=empty), 2, *words)


def test_the_server_takes_an_address_as_it_is_typed():
    done = mlserve("serve", "s3://bucket/x", "--port", "0", env={"MLSERVE_PACKAGE": None, "MLSERVE_PACKAGE_DIGEST": None})
    assert done.returncode == last_json(done.stderr)["code"] == 8, done.stderr
    assert last_json(done.stderr)["error"].startswith("A package from a store or a registry is asked for without a digest")


def test_a_training_notebook_that_raises_is_kept(environment, state, tracking):
    refused(mlserve("release", NOTEBOOKS / "raises.ipynb", env=environment), 1, "ZeroDivisionError")
    kept = [p for p in (state / "runs").rglob("*.ipynb") if "ZeroDivisionError" in p.read_text()]
    assert kept and versions(tracking, "raises") == []


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


def test_an_accuracy_that_is_not_reached_fails_the_check(environment, tracking, tmp_path):
    refused(mlserve("release", beside(tmp_path, "guessing", "min_accuracy = 0.9\n"), "--promote", env=environment), 3, "0.5", "0.9")
    [version] = versions(tracking, "guessing")
    finding = json.loads(version.tags["mlserve.check.cpu"])
    assert version.tags["mlserve.status"] == "failed" and finding["passed"] is False and "accuracy" in finding["reason"]
    refused(mlserve("check", "guessing", "--version", version.version, env=environment), 3, "0.5", "0.9")
    assert aliases(tracking, version.name) == {}


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


def test_a_torch_that_did_not_train_is_refused(environment, tracking, tmp_path, before):
    refused(mlserve("release", beside(tmp_path, "good", 'requirements = ["torch==2.12.0"]\n'), env=environment), 8, "torch")
    assert [v.version for v in versions(tracking, "good")] == before


def test_a_misspelt_setting_of_the_spec_is_refused(environment, tmp_path):
    refused(mlserve("release", beside(tmp_path, "good", 'delivry = "baked"\n'), env=environment), 2, "delivery")


@pytest.mark.parametrize("parameters, word", [({"package_dri": "x"}, "package_dir"), ({}, "package_dir")], ids=["misspelt", "missing"])
def test_a_wrong_pipeline_parameter_is_refused_before_running(tmp_path, parameters, word):
    from mlserve.errors import UsageError
    from mlserve.release.pipeline import pipelines, run_notebook
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
    from mlserve.package import golden, save_tensors, write_lock
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
