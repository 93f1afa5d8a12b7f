"""Break one thing at a time: the exit code, one clear sentence, nothing half-done."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, last_json, mlserve

NOTEBOOKS = Path(__file__).parent / "notebooks"
DEAD = "127.0.0.1:1"


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
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("broken, code, words", [
    ({"DOCKER_HOST": "unix:///nonexistent/docker.sock"}, 7, ["Docker"]),
    ({"MLSERVE_REGISTRY": DEAD}, 6, [DEAD]),
    ({"MLFLOW_TRACKING_URI": f"http://{DEAD}"}, 6, [DEAD]),
], ids=["engine stopped", "registry stopped", "MLflow unreachable"])
def test_a_missing_part_is_told_before_anything_is_recorded(environment, tracking, broken, code, words):
    refused(mlserve("release", NOTEBOOKS / "good.ipynb", env={**environment, **broken}), code, *words)
    assert versions(tracking, "good") == []


def test_a_training_notebook_that_raises_is_kept(environment, state, tracking):
    refused(mlserve("release", NOTEBOOKS / "raises.ipynb", env=environment), 1, "ZeroDivisionError")
    kept = [p for p in (state / "runs").rglob("*.ipynb") if "ZeroDivisionError" in p.read_text()]
    assert kept and versions(tracking, "raises") == []


def test_a_golden_output_that_is_wrong_fails_the_check(environment, tracking):
    refused(mlserve("release", NOTEBOOKS / "wrong_golden.ipynb", "--promote", env=environment), 3, "golden")
    [version] = versions(tracking, "wrong-golden")
    assert version.tags["mlserve.status"] == "failed"
    assert aliases(tracking, version.name) == {}


def test_a_torch_that_did_not_train_is_refused(environment, tracking, tmp_path):
    notebook = tmp_path / "good.ipynb"
    notebook.write_text((NOTEBOOKS / "good.ipynb").read_text())
    (tmp_path / "mlserve.toml").write_text('requirements = ["torch==2.12.0"]\n')
    refused(mlserve("release", notebook, env=environment), 8, "torch")
    assert versions(tracking, "good") == []


def test_a_misspelt_setting_of_the_spec_is_refused(environment, tmp_path):
    notebook = tmp_path / "good.ipynb"
    notebook.write_text((NOTEBOOKS / "good.ipynb").read_text())
    (tmp_path / "mlserve.toml").write_text('delivry = "baked"\n')
    refused(mlserve("release", notebook, env=environment), 2, "delivery")


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
