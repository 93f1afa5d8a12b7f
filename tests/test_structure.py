"""The rules of the house, read from the source: imports go downward, the wings stay apart, pages keep their size."""
import ast
import inspect
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(s.startswith((".", "_")) for s in p.relative_to(ROOT).parts))
PIPELINES = [p for p in NOTEBOOKS if p.parent.name == "pipelines"]
EXPORT = re.compile(r"^#\|\s*export[is]?\b", re.M)


def cells(path, kind="code"):
    return [c | {"source": "".join(c["source"])} for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def exported(path):
    return [c["source"] for c in cells(path) if EXPORT.search(c["source"])]


def room(path):
    "The module a notebook exports, as `serving.model`; None for a page that exports nothing"
    for cell in cells(path):
        if found := re.search(r"^#\|\s*default_exp\s+(\S+)", cell["source"], re.M):
            return found[1]


def floor(name):
    "Where a room stands: ground floor, then the wings, then doctor and cli"
    if name in ("doctor", "cli"):
        return "top"
    return name.split(".")[0] if "." in name else "ground"


ROOMS = {room(p): p for p in NOTEBOOKS if room(p)}
ORDER = [*[r for r in ROOMS if floor(r) == "ground"], *[r for r in ROOMS if floor(r) == "serving"],
         *[r for r in ROOMS if floor(r) == "release"], *[r for r in ROOMS if floor(r) == "top"]]


def imports(name):
    "The rooms that a room imports, wherever in its source"
    tree = ast.parse((ROOT / "mlserve" / (name.replace(".", "/") + ".py")).read_text())
    package = ["mlserve", *name.split(".")][:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            names = [target] + [f"{target}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        yield from {n.removeprefix("mlserve.") for n in names if n.removeprefix("mlserve.") in ROOMS}


@pytest.mark.parametrize("name", ROOMS)
def test_imports_go_downward_and_the_wings_stay_apart(name):
    for other in imports(name):
        assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}, which stands above it"
        assert {floor(name), floor(other)} != {"serving", "release"}, f"{name} imports {other} from the other wing"


def test_the_import_reader_sees_imports():
    assert "errors" in set(imports("settings"))


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.stem)
def test_a_pipeline_has_one_parameters_cell_and_a_language(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["language"] == "python"
    assert not exported(path)


def test_skip_exec_only_in_pipelines():
    for path in set(NOTEBOOKS) - set(PIPELINES):
        assert not any("skip_exec" in c["source"] for c in cells(path, "raw")), path


@pytest.mark.parametrize("name", ROOMS)
def test_the_size_of_a_page(name, record_property):
    sizes = [len([l for l in s.splitlines() if l.strip() and not l.lstrip().startswith("#|")]) for s in exported(ROOMS[name])]
    words = sum(len(c["source"].split()) for c in cells(ROOMS[name], "markdown"))
    record_property("exported_lines", sum(sizes))
    print(f"{name}: {sum(sizes)} exported lines, longest cell {max(sizes)}, {words / sum(sizes):.1f} words a line")
    assert sum(sizes) <= 250, f"{name} exports {sum(sizes)} lines: split it by noun"
    assert max(sizes) <= 40, f"{name} has an exported cell of {max(sizes)} lines"


def test_imports_stand_in_cells_of_their_own():
    "The renderer runs a cell that imports, whole, and without the cells before it; the last cell of a page imports nothing of ours"
    for path in NOTEBOOKS:
        for cell in cells(path):
            if EXPORT.search(cell["source"]) or cell["source"].endswith("import nbdev; nbdev.nbdev_export()"):
                continue
            code = "".join(line for line in cell["source"].splitlines(True) if not line.startswith(("%", "!")))
            imported = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(code).body}
            assert len(imported) < 2, f"{path}, cell {cell['id']}: split imports from other code"


def test_pages_open_with_a_title_and_a_sentence():
    for name, path in ROOMS.items():
        first = cells(path, "markdown")[0]["source"].splitlines()
        assert first[0] == f"# {name.split('.')[-1]}" and first[2].startswith("> "), path


def test_the_sidebar_lists_every_page():
    listed = re.findall(r"- (\S+\.ipynb)", (ROOT / "nbs/sidebar.yml").read_text())
    assert sorted(["index.ipynb", *listed]) == sorted(str(p.relative_to(ROOT / "nbs")) for p in NOTEBOOKS)


def test_the_architecture_page_shows_the_house_as_it_is():
    "Its tables are made by its code; what stands under the cells is what they give now"
    names, tables = {}, 0
    for cell in cells(ROOT / "nbs/explanations/architecture.ipynb"):
        *body, last = ast.parse(cell["source"]).body
        exec(compile(ast.Module(body, []), "architecture", "exec"), names)
        if isinstance(last, ast.Expr) and hasattr(value := eval(compile(ast.Expression(last.value), "architecture", "eval"), names), "data"):
            assert value.data == "".join(cell["outputs"][0]["data"]["text/markdown"])
            tables += 1
        else:
            exec(compile(ast.Module([last], []), "architecture", "exec"), names)
    assert tables == 4


def test_serving_needs_nothing_of_a_notebook():
    for path in (ROOT / "mlserve").rglob("*.py"):
        if path.name != "_modidx.py":
            assert not re.search(r"^\s*(from|import) (fastcore|nbdev)\b", path.read_text(), re.M), path


STARTS = re.compile(r"^\W*docker run\b(?:.*\\\n)*.*", re.M)


def test_every_command_that_starts_an_image_says_which_it_is():
    "An image knows neither its digest nor its version; whoever starts it by a line of ours tells it both"
    pages = ["\n".join(c["source"] for c in cells(p, "markdown")) for p in NOTEBOOKS] + [p.read_text() for p in ROOT.glob("*.md")]
    commands = [c for text in pages for c in STARTS.findall(text)]
    assert len(commands) >= 3
    for command in commands:
        assert "MLSERVE_MODEL_VERSION=" in command and "MLSERVE_IMAGE=" in command, command


FAULTS = "\n".join(c["source"] for c in cells(ROOT / "nbs/explanations/faults.ipynb", "markdown"))
NAMED = re.compile(r"`(test_\w+\.py)::(\w+)`")


def faults():
    "The rows of the table of faults: their letter and number, and what stands in the columns of tests and of controls"
    for row, columns in re.findall(r"^\| ([A-Z]\d+) \|(.*)\|$", FAULTS, re.M):
        yield row, *columns.split(" | ")[2:]


def test_the_table_of_faults_is_whole_and_names_tests_that_exist():
    named = set(NAMED.findall(FAULTS))
    there = {(p.name, n.name) for p in (ROOT / "tests").glob("test_*.py") for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.FunctionDef)}
    assert len(named) > 60 and not named - there, named - there
    wanted = {f"{k}{i}" for k, n in dict(A=4, N=12, V=10, E=14, L=8, W=12).items() for i in range(1, n + 1)} | {"I1", "I2", "I3", "R2", "R10"}
    rows = [row for row, *_ in faults()]
    assert len(rows) == len(wanted) and set(rows) == wanted, set(rows) ^ wanted


@pytest.mark.parametrize("row, tests, controls", [pytest.param(*f, id=f[0]) for f in faults() if f[0][0] in "ANVEL"])
def test_each_test_of_the_table_of_faults_is_failed_by_a_control(row, tests, controls):
    "A control is a plant that `test_controls.py` tries on the test, or a test beside it that is named after the row"
    from test_controls import CONTROLS
    tried = {(Path(inspect.getfile(test)).name, test.__name__): {p for r, t, _, p, _ in CONTROLS if (r, t) == (row, test)} for r, test, *_ in CONTROLS if r == row}
    plants, beside = set(re.findall(r"`(\w+)`", controls)), set(NAMED.findall(controls))
    assert plants == set().union(*tried.values()), f"the table and `test_controls.py` differ: {plants ^ set().union(*tried.values())}"
    assert plants or beside, "no control"
    assert all(name.startswith(f"test_{row}_control_") for _, name in beside)
    bare = {t for t in set(NAMED.findall(tests)) - set(tried) if t[0] not in {file for file, _ in beside}}
    assert not bare, f"nothing makes these fail: {bare}"
