"""A project that `mlserve init` wrote, released as it is; and a release from a cell of a notebook."""
import json
import os
import re

import nbclient
import nbformat
import pytest
from commands import TESTS, mlserve
from mlserve.notebook.scaffold import KINDS
from mlserve.release.image.context import code_of

pytestmark = pytest.mark.matrix

SERVER = set("""annotated-doc annotated-types anyio certifi click fastapi h11 httpcore httptools httpx idna numpy opentelemetry-api orjson prometheus-client pydantic
                pydantic-core safetensors starlette typing-extensions typing-inspection uvicorn uvloop""".split())
NEEDED = {"onnx": {"onnxruntime", "flatbuffers", "packaging", "protobuf"}, "torchscript": {"torch"}, "tflite": {"ai-edge-litert"}, "python": set()}  # beside the server, by format
KEPT = re.compile("models/package/(package.lock|MLmodel)$")


def image_files(reference):
    "The paths of an image in its registry, as a container sees them; and what two of them hold"
    from mlserve.release.registry.client import Remote
    from mlserve.release.registry.image_reader import merge_layers, read_image, read_layer
    image = read_image(reference)
    remote = Remote(image.reference)
    files, contents = merge_layers([read_layer(remote, layer, KEPT) for layer in image.manifest["layers"]])
    return {path for path, file in files.items() if file.kind != "dir"}, {path.rpartition("/")[2]: data.decode() for path, data in contents.items()}


def check_files(reference):
    "An image has the packages that its format needs, the files of its model package and those of the server: nothing besides"
    files, told = image_files(reference)
    format = json.loads(told["MLmodel"])["flavors"]["mlserve"]["format"]
    packages = {found[1].lower().replace("_", "-") for found in (re.search(r"site-packages/([^/]+?)-[^-/]+\.dist-info/METADATA$", path) for path in files) if found}
    assert packages == SERVER | NEEDED[format], packages ^ (SERVER | NEEDED[format])
    ours = {path.removeprefix("models/package/") for path in files if path.startswith("models/")}
    assert ours == {"package.lock", *(line.rsplit(" ", 2)[0] for line in told["package.lock"].splitlines())}
    strange = "|".join({"torch", "onnxruntime", "sklearn", "scipy", "pandas", "onnx", "skl2onnx", "tokenizers", "nvidia", "ai_edge_litert"} - {n.replace("-", "_") for n in NEEDED[format]})
    assert not [path for path in files if re.search(f"site-packages/({strange})/", path)]
    assert {path.removeprefix("opt/mlserve/") for path in files if path.startswith("opt/") and not path.startswith("opt/venv/") and not path.endswith(".pyc")} == set(code_of())
    return format


@pytest.mark.parametrize("kind", KINDS)
def test_a_project_is_released_as_it_is(kind, environment, tmp_path):
    folder = tmp_path / f"First {kind}"
    made = mlserve("init", kind, folder)
    assert made.returncode == 0 and made.stdout.startswith(f"cd '{folder}'\n"), made.stderr
    again = mlserve("init", kind, folder)
    assert again.returncode == 2 and "is not empty" in again.stderr
    done = mlserve("release", folder / "model.ipynb", "--promote", "--json", env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["model"] == f"first-{kind}" and result["aliases"] == ["candidate", "production"]
    formats = {"text": "torchscript", "any-python": "python"}
    assert check_files(result["image"]) == formats.get(kind, "onnx")
    numbers = kind in ("regression", "any-python")
    metric = "rmse" if numbers else "accuracy"
    assert metric in result["metrics"]
    others = {"accuracy", "f1_macro", "balanced_accuracy"} if numbers else {"rmse", "mae", "r2"}
    from mlflow import MlflowClient
    client = MlflowClient(tracking_uri=environment["MLFLOW_TRACKING_URI"])
    measured, version = client.get_run(result["run"]).data.metrics, client.get_model_version(result["model"], result["version"])
    assert {metric, f"check.{metric}"} <= set(measured) and not others & set(measured) and not others & set(result["metrics"])
    assert f"| {metric}" in version.description and not any(f"| {other}" in version.description for other in others)
    assert ("Held against the true values" if numbers else "Held against the labels") in version.description


def test_a_cell_releases_the_notebook_that_is_open_once_it_is_saved(environment, tmp_path):
    "In a kernel that is told where its notebook lies, as Jupyter's server tells it; the release runs in a child"
    path, book = tmp_path / "good.ipynb", nbformat.read(TESTS / "notebooks/good.ipynb", 4)
    called = ["from mlserve.notebook import release, versions\ntry: release()\nexcept Exception as e: print(e)",
              "import os\nos.replace('saved.ipynb', 'good.ipynb')",
              "released = release()\nreleased", "versions('good')"]
    book.cells += [nbformat.v4.new_code_cell(source, metadata={"tags": ["after-release"]}) for source in called]
    (tmp_path / "saved.ipynb").write_text(nbformat.writes(book))
    path.write_text(nbformat.writes(book).replace("x.sum(1", "2 * x.sum(1"))
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute(
        env={**os.environ, **environment, "JPY_SESSION_NAME": str(path)})
    refused, _, released, listed = [cell.outputs for cell in book.cells[-4:]]
    assert "changes that are not saved" in refused[0].text
    shown = [output.data["text/html"] for output in (*released, *listed) if "data" in output]
    assert shown[0].count('value="1"') == 6 and "failed" not in shown[0], shown[0]
    assert "good version" in shown[1] and "layers" in shown[1] and environment["MLFLOW_TRACKING_URI"] in shown[1]
    assert "candidate" in shown[2] and " MB" in shown[2]
