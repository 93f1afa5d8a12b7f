"""The package as others get it: from an sdist and a wheel, in an environment of its own, without this tree."""
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from commands import EXAMPLE, ROOT, run
from mlserve.notebook.scaffold import KINDS
from mlserve.package.environment import SUPPORTED

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Made from the sdist, which is made from what git has; or the one that is given, before it is published"
    if given := os.environ.get("WHEEL"):
        return Path(given).absolute()
    folder = tmp_path_factory.mktemp("dist")
    assert run("git", "clone", "-q", ROOT, folder / "mlserve").returncode == 0
    made = run("bash", folder / "mlserve/.ci/dist", sys.executable, folder)
    assert made.returncode == 0, made.stderr
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "An environment with the wheel and what a workstation needs beside it"
    folder = tmp_path_factory.mktemp("environment")
    made = run("bash", ROOT / ".ci/install", folder, "-c", ROOT / "constraints.txt", f"{wheel}[release]")
    assert made.returncode == 0, made.stderr
    return folder


@pytest.mark.matrix
def test_without_the_extra_the_command_says_which_one_it_needs(wheel, tmp_path):
    assert run("bash", ROOT / ".ci/install", tmp_path / "environment", "--no-deps", wheel).returncode == 0
    done = run(tmp_path / "environment/bin/mlserve", "--version", cwd=tmp_path, env={"PYTHONPATH": None})
    assert (done.returncode, done.stdout) == (7, "") and done.stderr.endswith("not installed here. pip install 'mlserve[release]'\n"), done.stderr


def test_the_wheel_holds_rooms_pipelines_and_scaffolds_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    rooms = {str(p.relative_to(ROOT)) for p in (ROOT / "mlserve").rglob("*.py")} | {"mlserve/py.typed", "mlserve/serving/docs/page.html"}
    pipelines = {f"mlserve/pipelines/{p.name}" for p in (ROOT / "nbs/pipelines").glob("*.ipynb")}
    scaffolds = {f"mlserve/scaffolds/{name}" for name in ("README.md", "gitignore", "release.yaml", "requirements.txt", *(f"{kind}.{end}" for kind in KINDS for end in ("ipynb", "toml")))}
    assert {n for n in names if ".dist-info/" not in n} == rooms | pipelines | scaffolds and len(pipelines) == 4


def test_an_environment_of_its_own_has_the_command_and_what_it_needs(installed, tmp_path):
    "The example is copied, so that nothing of this tree is near"
    python, mlserve = installed / "bin/python", installed / "bin/mlserve"
    shutil.copy(EXAMPLE, tmp_path)
    outside = {"PYTHONPATH": None, "MLSERVE_STATE": str(tmp_path / "state")}
    assert run(mlserve, "--version", cwd=tmp_path, env=outside).stdout.strip().endswith(version())
    dockerfile = run(mlserve, "dockerfile", tmp_path / EXAMPLE.name, cwd=tmp_path, env=outside)
    assert dockerfile.returncode == 0 and dockerfile.stdout.startswith("#"), dockerfile.stderr
    program = ("import mlserve.cli, sys\nfrom mlserve.release.run import pipelines\n"
               "print(sys.modules['mlserve'].__file__, *sorted(p.name for p in pipelines().glob('*.ipynb')))")
    found = run(python, "-c", program, cwd=tmp_path, env=outside)
    assert found.returncode == 0, found.stderr
    home, *books = found.stdout.split()
    assert Path(home).is_relative_to(installed) and books == ["build_image.ipynb", "check_inference.ipynb", "fetch_package.ipynb", "record_release.ipynb"]
    assert run(mlserve, "init", "regression", tmp_path / "prices", cwd=tmp_path, env=outside).stdout.startswith(f"cd {tmp_path}/prices\n")
    assert run(BIN / "uv", "pip", "check", "--python", python).returncode == 0


def test_the_onnxruntimes_that_are_asked_for_are_published_for_gpus_too():
    "An image for a GPU takes `onnxruntime-gpu` at the version of training, which the extra brings; the package index is asked"
    [pin] = re.findall("^onnx_requirements = onnxruntime(.+)$", (ROOT / "settings.ini").read_text(), re.M)
    listed = run(sys.executable, "-m", "pip", "index", "versions", "onnxruntime-gpu")
    assert listed.returncode == 0, listed.stderr
    published = {".".join(v.split(".")[:2]) for v in SpecifierSet(pin).filter(re.search("Available versions: (.+)", listed.stdout)[1].split(", "))}
    assert published == {minor for minor in SUPPORTED["onnxruntime"].tested if minor in SpecifierSet(pin)} and len(published) >= 3
    [here] = re.findall("^onnxruntime==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert here in SpecifierSet(pin)


def test_types_of_the_package_are_seen_by_those_who_use_it(installed, tmp_path):
    "`py.typed`: a checker reads our annotations, and a wrong call is told"
    (tmp_path / "use.py").write_text("from mlserve.package import load_package\nload_package(3)\n")
    done = subprocess.run([BIN / "mypy", "--python-executable", installed / "bin/python", "--ignore-missing-imports", "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert 'Argument 1 to "load_package"' in done.stdout, done.stdout + done.stderr


def version():
    return next(line.split(" = ")[1] for line in (ROOT / "settings.ini").read_text().splitlines() if line.startswith("version"))


@pytest.mark.parametrize("tag, heading, code, told", [
    ("v0.2.0", "0.2.0 (2026-12-01)", 0, ""),
    ("v0.2.1", "0.2.0 (2026-12-01)", 3, "the tag is v0.2.1; settings.ini has 0.2.0, whose tag is v0.2.0"),
    ("0.2.0", "0.2.0 (2026-12-01)", 3, "the tag is 0.2.0"),
    ("v0.2.0", "0.2.0 (unreleased)", 3, "begins with '0.2.0 (unreleased)'"),
    ("v0.2.0", "0.1.0 (2026-12-01)", 3, "begins with '0.1.0 (2026-12-01)'")])
def test_a_tag_the_settings_and_the_changelog_tell_one_version(tmp_path, tag, heading, code, told):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nversion = 0.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n\n## 0.0.9 (2026-01-01)\n")
    done = run("bash", ROOT / ".ci/version", tag, env={"ROOT": str(tmp_path)})
    assert done.returncode == code and told in done.stderr
