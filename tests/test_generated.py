"""Everything generated is what the notebooks generate: package, README, Dockerfile; and every page runs and renders."""
import html
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell

from commands import EXAMPLE, ROOT, TESTS, mlserve, run

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The tracked files, elsewhere"
    to = tmp_path_factory.mktemp("copy") / "mlserve"
    files = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


def test_the_environment_is_the_pinned_one_and_its_torch_is_the_cpus():
    "Whichever installer made it; torch with CUDA would be gigabytes that nothing here uses"
    from importlib.metadata import distributions

    import torch
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    installed = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version.partition("+")[0] for d in distributions()}
    assert not {n: v for n, v in installed.items() if pinned.get(n, v) != v}
    assert torch.version.cuda is None and not [n for n in installed if n.startswith("nvidia-")]


def test_the_pinned_environment_is_for_every_python_that_is_promised():
    "Debian 12 has 3.11.2, and a pin that was made with a later 3.11 may refuse it"
    from importlib.metadata import distributions

    from packaging.specifiers import SpecifierSet
    lowest = re.search(r"^min_python = (.+)", (ROOT / "settings.ini").read_text(), re.M)[1] + ".0"
    wants = {d.name: d.metadata.get("Requires-Python") for d in distributions(path=[sysconfig.get_path("purelib")])}
    assert not {name: python for name, python in wants.items() if python and lowest not in SpecifierSet(python)}


def differences(copy, *names):
    return [str(p.relative_to(copy)) for name in names for p in sorted((copy / name).rglob("*") if (copy / name).is_dir() else [copy / name])
            if p.is_file() and "__pycache__" not in p.parts and p.read_bytes() != (ROOT / p.relative_to(copy)).read_bytes()]


def test_clean_changes_nothing(copy):
    assert run(BIN / "nbdev_clean", cwd=copy).returncode == 0
    assert differences(copy, "nbs") == []


def test_export_changes_nothing(copy):
    for path in (copy / "mlserve").rglob("*.py"):
        path.write_text("")
    assert run(BIN / "nbdev_export", cwd=copy).returncode == 0
    assert differences(copy, "mlserve") == []


def test_readme_is_its_notebook(copy):
    done = run(BIN / "jupyter", "nbconvert", "--to", "markdown", "--output-dir", copy, "--output", "again", "nbs/index.ipynb")
    assert done.returncode == 0, done.stderr
    assert (copy / "again.md").read_text() == (ROOT / "README.md").read_text()
    assert len((ROOT / "README.md").read_text().split()) <= 550


@pytest.mark.parametrize("name, device", [("Dockerfile", "cpu"), ("Dockerfile.cuda", "cuda")])
def test_dockerfile_is_the_generated_one(name, device):
    text = mlserve("dockerfile", EXAMPLE, "--device", device, env={"MLSERVE_BASE": None, "MLSERVE_REGISTRY": None}).stdout
    assert text == (ROOT / "docker" / name).read_text()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("delivery", ["baked", "volume", "store"])
def test_hadolint_has_no_finding(device, delivery, tmp_path):
    from mlserve.release.image.dockerfile import ImageSpec, render
    (tmp_path / "Dockerfile").write_text(render(ImageSpec("python:3.11-slim-bookworm", device, delivery)))
    done = run(BIN / "hadolint", tmp_path / "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", sorted((ROOT / "nbs/reference").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_reference_says_what_the_code_says(page):
    "Its tables are made from commands, settings, metrics, routes and errors; one without its text fails on the page"
    shell, shown = InteractiveShell(), []
    for cell in json.loads(page.read_text())["cells"]:
        if cell["cell_type"] == "code":
            done = shell.run_cell("".join(cell["source"]))
            done.raise_error()
            if done.result is not None:
                now = shell.display_formatter.format(done.result, exclude={"text/plain"})[0]
                kept = {kind: "".join(text) for kind, text in cell["outputs"][0]["data"].items() if kind != "text/plain"}
                shown.append(now == kept)
    assert shown and all(shown), f"run {page.name} again: what it shows is no longer what the code says"


@pytest.mark.timeout(2400)
def test_every_page_runs(copy):
    "nbdev's tests, each notebook in its own process; the package under test is this one"
    done = run(sys.executable, TESTS / "run_pages.py", cwd=ROOT, timeout=2300, env={"MLSERVE_STATE": str(copy.parent / "state"), "MLFLOW_TRACKING_URI": None})
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def prose(page):
    "What a page says, without its code and results"
    return "\n\n".join("".join(c["source"]) for c in json.loads(page.read_text())["cells"] if c["cell_type"] == "markdown")


def commands_in(text):
    "The commands of ours in the code of a text: name, and options that are given to it"
    for code in re.findall(r"```.*?```|`[^`\n]+`|^ {4}.+", text, re.S | re.M):
        for name, rest in re.findall(r"(?:^|[`$]) *mlserve ([a-z][^\s`]*)([^`\n#|]*)", code, re.M):
            yield name, re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest)


def unknown_commands(text, known):
    return [(name, o) for name, options in commands_in(text) for o in (options or [""]) if name not in known or o and o not in known[name]]


@pytest.fixture(scope="module")
def known():
    "The commands that there are, each with its options"
    import typer

    from mlserve.cli import app
    return {name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)} | {"--help"} for name, c in typer.main.get_command(app).commands.items()}


@pytest.mark.parametrize("page", sorted((ROOT / "nbs/tutorials").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_tutorial_types_only_commands_that_there_are(page, known):
    assert not unknown_commands(prose(page), known)


def test_control_a_command_that_is_not_there_is_seen(known):
    text = "`mlserve relase x.ipynb`\n```bash\nmlserve vendor x.ipynb --to y  # a comment\n$ mlserve status\n```\n    mlserve check mine --version 3\n"
    assert [name for name, _ in commands_in(text)] == ["relase", "vendor", "status", "check"]
    assert unknown_commands(text, known) == [("relase", ""), ("vendor", "--to")]


def test_each_symptom_has_what_shows_why_and_its_mend():
    "The page of triage: a heading as somebody sees it, a command or a place to look at, what to do; metrics and settings that there are"
    text = prose(ROOT / "nbs/tutorials/when_something_is_wrong.ipynb")
    symptoms = re.split(r"^### ", text, flags=re.M)[1:]
    assert len(symptoms) >= 20
    for symptom in symptoms:
        assert re.match(r".+\n\n\*Look\*: .+\n\n\*Mend\*: .+", symptom), symptom
    told = (ROOT / "nbs/reference/metrics.ipynb").read_text() + (ROOT / "nbs/reference/settings.ipynb").read_text()
    names = set(re.findall(r"\b(?:mlserve|MLSERVE)_[A-Za-z_]+", text))
    assert len(names) > 10 and not {n for n in names if n not in told}


def words(text):
    "The words of a text without its markup"
    return set(re.findall(r"[A-Za-z]{4,}", text))


@pytest.fixture(scope="module")
def site(copy):
    "The documentation site of these notebooks"
    done = run(sys.executable, ROOT / ".ci/docs.py", "_docs", cwd=copy, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return copy / "_docs"


@pytest.mark.site
def test_every_page_renders_with_all_its_prose_and_stands_in_the_navigation(site):
    start = (site / "index.html").read_text() + (site / "llms.txt").read_text()
    for notebook in (ROOT / "nbs").rglob("*.ipynb"):
        place = notebook.relative_to(ROOT / "nbs").with_name(re.sub(r"^\d\d_", "", notebook.stem) + ".html")
        cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "markdown"]
        prose = words(re.sub(r"\]\([^)]*\)|<[^>]+>|^#.* -$", "]", "\n".join("".join(c["source"]) for c in cells), flags=re.M))
        page = re.sub(r'<img[^>]* alt="([^"]*)"[^>]*>', r" \1 ", (site / place).read_text())  # what a picture shows is said in words, too
        lost = prose - words(html.unescape(re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", page, flags=re.S)))
        assert len(lost) <= len(prose) / 50, f"{notebook.name} loses {len(lost)} of {len(prose)} words on its page: {sorted(lost)[:20]}"
        assert str(place) in start, f"nothing leads to {place}"


@pytest.mark.site
def test_no_page_of_the_site_asks_for_anything_from_elsewhere_and_every_anchor_is_there(site):
    text = {p: p.read_text() for p in site.rglob("*.html")}
    ids = {p: set(re.findall(r' id="?([^"\s>]+)', t)) for p, t in text.items()}
    for page, t in text.items():
        assets = re.findall(r"<(?:script|img|iframe|source)[^>]*? src=\"?([^\"\s>]+)", t)
        assets += re.findall(r"<link[^>]*?rel=\"?(?:stylesheet|icon|preload|preconnect)\"?[^>]*?href=\"?([^\"\s>]+)", t)
        assert not [a for a in assets if re.match(r"(https?:)?//", a)], page
        for target, anchor in re.findall(r'href="?([^":\s>#]*)#([^"\s>]+)', t):
            there = (page.parent / target).resolve() if target else page
            assert there not in ids or anchor in ids[there], f"{page.relative_to(site)} points to {target}#{anchor}"
