"""What runs a model is in its image and nothing beside it: LiteRT for a `.tflite` file, and the onnxruntime that trained, also where it is not the pinned one."""
import json
import re
import subprocess
import sys

import nbformat
import numpy as np
import onnx
import pytest
from commands import ROOT, mlserve
from lite_files import lite_bytes
from onnx import helper, numpy_helper
from test_scaffold import check_files, image_files

pytestmark = pytest.mark.matrix

CELLS = ["package_dir = '{name}-package'",
         "import numpy as np\nfrom mlserve.package import save_package\nfrom mlserve.release.record import log_package",
         "x = np.random.default_rng(1).normal(size=(40, 4)).astype('float32')",
         "save_package('{file}', package_dir, name='{name}', inputs={{'x': x[:8]}}, outputs=['scores'])\nlog_package(package_dir)"]


def onnx_bytes():
    "The model of `lite_bytes` as ONNX"
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in ((8, 4), 8, (3, 8), 3)]
    nodes = [helper.make_node("Gemm", ["x", "w0", "w1"], ["a"], transB=1), helper.make_node("Relu", ["a"], ["b"]),
             helper.make_node("Gemm", ["b", "w2", "w3"], ["scores"], transB=1)]
    ends = [[helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", size])] for name, size in (("x", 4), ("scores", 3))]
    graph = helper.make_graph(nodes, "net", *ends, [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


@pytest.fixture
def released(environment, tmp_path):
    "Release a file as it is, from a notebook beside it; what came of it, and the version of the package that its image has of a name"
    def released(name, file, data, runtime, **env):
        (tmp_path / file).write_bytes(data)
        cells = [nbformat.v4.new_markdown_cell(f"# {name}\n\n> Two dense layers, from a file"),
                 *(nbformat.v4.new_code_cell(source.format(name=name, file=file)) for source in CELLS)]
        cells[1].metadata["tags"] = ["parameters"]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
        done = mlserve("release", tmp_path / f"{name}.ipynb", "--promote", "--json", env=environment | env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(done.stdout)
        paths, _ = image_files(result["image"])
        found = {match[1] for path in paths if (match := re.search(rf"site-packages/{runtime}-([^/]+)\.dist-info/METADATA$", path))}
        return result, found
    return released


def test_an_image_of_a_lite_file_has_no_other_runtime_and_is_smaller(released):
    lite, versions = released("lite", "net.tflite", lite_bytes(), "ai_edge_litert")
    plain, _ = released("plain", "net.onnx", onnx_bytes(), "onnxruntime")
    assert check_files(lite["image"]) == "tflite" and check_files(plain["image"]) == "onnx" and len(versions) == 1
    print(f"image of LiteRT {lite['image_mb']} MB, of onnxruntime {plain['image_mb']} MB")
    assert lite["image_mb"] < plain["image_mb"]


def test_the_onnxruntime_that_trained_is_the_one_in_the_image(released):
    "The release trains, builds and checks on the image with an onnxruntime of the table that is not the pinned one; the check answers on it"
    [runtimes] = re.findall("^RUNTIMES := (.+)$", (ROOT / "Makefile").read_text(), re.M)
    other = runtimes.split()[0]
    home = ROOT / f"state/tools/onnxruntime-{other}"
    if not (home / "onnxruntime").is_dir():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", home, f"onnxruntime=={other}"], check=True, timeout=300)
    [pinned] = re.findall("^onnxruntime==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    result, versions = released("earlier", "net.onnx", onnx_bytes(), "onnxruntime", PYTHONPATH=str(home))
    assert versions == {other} and other != pinned
    assert result["aliases"] == ["candidate", "production"] and not [told for told in result["warnings"] if "onnxruntime" in told]
    assert check_files(result["image"]) == "onnx"
