"""Versions of torch and onnxruntime: which are taken, which with a warning, which are refused; and what is said where another one serves."""
import configparser
import importlib.metadata
import inspect
import io
import json
import re
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import mutations
import numpy as np
import onnx
import pytest
import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mlserve.errors import Refused
from mlserve.package import load_environment, save_package
from mlserve.package.environment import SUPPORTED, check_version, environment
from mlserve.package.programs import read_program

ROOT = Path(__file__).parents[2]
X = np.ones((3, 4), np.float32)
NET = torch.nn.Linear(4, 2).eval()


def installed(monkeypatch, **versions):
    "An environment that has these and nothing else, as far as it is asked for single names"
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]
    monkeypatch.setattr(importlib.metadata, "version", version)


def test_what_is_installed_here_is_tested():
    assert not any(check_version(name, importlib.metadata.version(name)) for name in SUPPORTED)


def test_packages_are_recorded_as_their_parser_reads_them(tmp_path, monkeypatch):
    "All of this environment, and some whose description is not plain"
    for name, text in {"plain": "Metadata-Version: 2.1\nName: Plain_Name\nVersion: 1.0\n\nName: other\nVersion: 9\n", "folded": "Name: folded\nVersion:\n 2.0\n",
                       "lower": "name: lower\nversion: 3.0\n", "numpy": "Name: numpy\nVersion: 0.0\n"}.items():
        (tmp_path / f"{name}-7.dist-info").mkdir()
        (tmp_path / f"{name}-7.dist-info/METADATA").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    read = {}
    for d in importlib.metadata.distributions():
        read.setdefault(re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(), d.metadata["Version"])
    assert environment()["packages"] == read and len(read) > 100
    assert {"plain-name": "1.0", "lower": "3.0", "numpy": "0.0"}.items() <= read.items() and read["folded"].strip() == "2.0"


def test_the_extras_ask_for_what_the_table_takes():
    "From the oldest that is taken; never beyond the newest that is tested, so that nobody gets an untested one without having asked"
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini")
    lines = {name: settings["DEFAULT"][f"{extra}_requirements"] for name, extra in (("torch", "torch"), ("onnxruntime", "onnx"))}
    assert lines["onnxruntime"] in settings["DEFAULT"]["tables_requirements"].split()
    for name, known in SUPPORTED.items():
        asked = SpecifierSet(lines[name].removeprefix(name))
        last = Version(known.tested[-1])
        assert known.least in asked and f"{last.major}.{last.minor + 1}.0" not in asked
        assert all(not check_version(name, minor) for minor in known.tested) and sorted(known.tested, key=Version) == list(known.tested)


def test_make_models_runs_the_onnxruntimes_of_the_table():
    text = (ROOT / "Makefile").read_text()
    [runs] = re.findall("^RUNTIMES := (.+)$", text, re.M)
    [here] = re.findall("^onnxruntime==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert {v.rpartition(".")[0] for v in [*runs.split(), here]} == set(SUPPORTED["onnxruntime"].tested)


def test_the_last_four_minor_versions_were_run_and_are_committed():
    table = sorted((ROOT / "bench/results").glob("*-versions.md"))[-1].read_text()
    assert all(f"| onnxruntime {minor}." in table for minor in SUPPORTED["onnxruntime"].tested) and "**failed**" not in table


@pytest.mark.parametrize("format, versions", [("torchscript", {"torch": "2.8.0+cpu"}), ("export", {"torch": "3.0.0"}), ("onnx", {"onnxruntime": "1.28.1"}), ("onnx", {"onnxruntime-gpu": "1.33.0"})],
                         ids=["old torch", "new torch", "old onnxruntime", "new onnxruntime"])
def test_a_framework_outside_of_the_table_is_refused_before_the_model_runs(format, versions, monkeypatch, tmp_path):
    installed(monkeypatch, **versions)
    asked = []
    net = torch.nn.Linear(4, 2).eval()
    net.register_forward_hook(lambda *args: asked.append(args))
    with pytest.raises(Refused, match="is not supported; allowed are .* are tested.* pip install") as e:
        save_package(net, tmp_path / "p", "net", {"x": X}, ["y"], format=format)
    assert e.value.code == 8 and not asked and not list(tmp_path.iterdir())


def test_a_framework_that_no_test_runs_is_taken_with_a_warning(monkeypatch, tmp_path):
    installed(monkeypatch, torch="2.12.1")
    with pytest.warns(UserWarning, match="torch 2.12.1 is taken, but was not tested with mlserve; tested are") as told:
        package = save_package(NET, tmp_path / "p", "net", {"x": X}, ["y"])
    assert Path(told[0].filename) == Path(__file__) and package.format == "torchscript"


@pytest.mark.parametrize("name, format", [("torch", "torchscript"), ("onnxruntime", "onnx")])
def test_an_image_gets_the_version_of_training_whatever_the_extra_asks_for(name, format, tmp_path, monkeypatch):
    from mlserve.release.lock import dependencies
    from mlserve.release.lock.pip import Target
    asked = []
    monkeypatch.setattr(dependencies, "lock", lambda lines, pins, *more: asked.append((lines, pins)) or dependencies.read_lock(""))
    monkeypatch.setattr(dependencies, "download_locked", lambda *args: tmp_path)
    (tmp_path / "environment.json").write_text(json.dumps({"packages": {name: "2.99.0", "numpy": "2.4.0"}}))
    package = SimpleNamespace(format=format, path=tmp_path, providers=("cuda",))
    dependencies.resolve_lock(package, Target(), tmp_path)
    [(lines, pins)] = asked
    assert name in lines and pins[name] == "2.99.0" and any(line.startswith("numpy<") for line in lines)
    dependencies.resolve_lock(package, Target(), tmp_path, allow=[name])
    assert any(line.startswith(f"{name}<") for line in asked[1][0]) and name not in asked[1][1]


def test_a_package_of_an_older_mlserve_is_refused_before_it_is_built(monkeypatch, tmp_path):
    from mlserve.release import plan
    from mlserve.release.spec import ReleaseSpec
    package = save_package(NET, tmp_path / "p", "net", {"x": X}, ["y"])
    monkeypatch.setattr(plan, "resolve_base", lambda *args: pytest.fail("the base is asked for"))
    monkeypatch.setattr(plan, "load_environment", lambda package: {"packages": {"torch": "2.6.0"}})
    with pytest.raises(Refused, match="torch 2.6.0 is not supported"):
        plan.prepare(ReleaseSpec(name="net", notebook=tmp_path / "n.ipynb", state=tmp_path), package)


@pytest.mark.parametrize("change, told", [("opset", "Opset 99 of ONNX; the onnxruntime that is installed reads Opset"), ("ir", "IR 99 of ONNX")])
def test_an_onnx_file_that_is_newer_than_the_runtime_is_told_as_that(change, told, tmp_path):
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    opset = 99 if change == "opset" else 20
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=99 if change == "ir" else 10), tmp_path / "new.onnx")
    for take in (lambda file: read_program(file, "onnx"), lambda file: save_package(file, tmp_path / "p", "net", {"x": X}, ["y"])):
        with pytest.raises(Refused, match=f"is written in {told}.* Export it with .* or train with a newer onnxruntime"):
            take(tmp_path / "new.onnx")


def test_a_server_with_another_version_than_training_says_so(monkeypatch, tmp_path):
    import sys

    from mlserve.serving.process.loading import load
    from mlserve.serving.state import Lifecycle
    from mlserve.settings import Settings
    package = save_package(NET, tmp_path / "p", "net", {"x": X}, ["y"], format="onnx")
    trained = load_environment(package)["packages"]["onnxruntime"]
    for here, loud in ((trained, False), ("1.29.7", True)):
        monkeypatch.setattr(sys.modules["mlserve.package.environment"], "installed_stack", lambda here=here: {"onnxruntime": here})
        with redirect_stderr(io.StringIO()) as lines:
            load(life := Lifecycle(), Settings(package=str(package.path), max_batch=1))
        told = [json.loads(line)["told"] for line in lines.getvalue().splitlines() if '"version_skew"' in line]
        assert told == [f"The model was trained with onnxruntime {trained} and is served by onnxruntime 1.29.7."] * loud and life.golden.passed


CONTROLS = [("any_framework_is_taken", test_a_framework_outside_of_the_table_is_refused_before_the_model_runs, {"format": "torchscript", "versions": {"torch": "2.8.0"}}),
            ("a_framework_without_tests_is_as_good_as_one_with", test_a_framework_that_no_test_runs_is_taken_with_a_warning, {}),
            ("the_extra_decides_the_version_of_an_image", test_an_image_gets_the_version_of_training_whatever_the_extra_asks_for, {"name": "torch", "format": "torchscript"}),
            ("the_framework_of_training_is_not_asked_before_a_build", test_a_package_of_an_older_mlserve_is_refused_before_it_is_built, {}),
            ("a_newer_file_is_told_in_the_words_of_a_library", test_an_onnx_file_that_is_newer_than_the_runtime_is_told_as_that, {"change": "ir", "told": "IR 99 of ONNX"}),
            ("nobody_says_that_another_version_serves", test_a_server_with_another_version_than_training_says_so, {})]


@pytest.mark.parametrize("plant, test, given", CONTROLS, ids=[c[0] for c in CONTROLS])
def test_versions_control_with_its_bug_planted_the_test_fails(plant, test, given, tmp_path, monkeypatch):
    mutations.sow(plant, monkeypatch.setattr)
    ready = {"tmp_path": tmp_path, "monkeypatch": monkeypatch, **given}
    with pytest.raises((Exception, pytest.fail.Exception)):
        test(**{name: ready[name] for name in inspect.signature(test).parameters})
