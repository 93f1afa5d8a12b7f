"""The rules of the house, read from the source: imports go downward, the wings stay apart, pages keep their size."""
import ast
import graphlib
import inspect
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(s.startswith((".", "_")) for s in p.relative_to(ROOT).parts))
PIPELINES = [p for p in NOTEBOOKS if p.parent.name == "pipelines"]
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
DEFINITIONS = FUNCTIONS | ast.ClassDef
EXPORT = re.compile(r"^#\|\s*export[is]?\b", re.M)


def cells(path, kind="code"):
    return [c | {"source": "".join(c["source"])} for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def exported(path):
    return [c["source"] for c in cells(path) if EXPORT.search(c["source"])]


def size_of(source):
    "Lines of a cell that say something"
    return sum(bool(line.strip()) and not line.lstrip().startswith("#|") for line in source.splitlines())


def room(path):
    "The module a notebook exports, as `serving.model`; None for a page that exports nothing"
    for cell in cells(path):
        if found := re.search(r"^#\|\s*default_exp\s+(\S+)", cell["source"], re.M):
            return found[1].removesuffix(".__init__")


ROOMS = {room(p): p for p in NOTEBOOKS if room(p)}
FOLDERS = {p.parent for p in ROOMS.values()}


def wing(name):
    "Which part of the house a room belongs to"
    first = name.split(".")[0]
    return "door" if first in ("command", "cli", "operations", "monitoring", "doctor", "mends") else first if first in ("serving", "release") else "ground"


def node(name):
    "A folder without folders is one thing, to those outside; beside folders, each room stands for itself"
    folder = ROOMS[name].parent
    return name if any(folder in f.parents for f in FOLDERS) else str(folder.relative_to(ROOT / "nbs"))


def number(name):
    return int(ROOMS[name].name.split("_")[0])


def source_of(name):
    "The module that a room became: its path"
    path = ROOT / "mlserve" / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def tree_of(name):
    return ast.parse(source_of(name).read_text())


def imports(name):
    "The rooms that a room imports, wherever in its source"
    package = ["mlserve", *name.split(".")][: None if source_of(name).stem == "__init__" else -1]
    for node in ast.walk(tree_of(name)):
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
        if ROOMS[other].parent == ROOMS[name].parent:
            assert number(other) < number(name), f"{name} imports {other}, which stands above it"
        assert wing(other) in {"ground": ["ground"], "door": ["ground", "serving", "release", "door"]}.get(wing(name), ["ground", wing(name)]), f"{name} imports {other} from another wing"


def test_imports_between_folders_go_one_way():
    known = {}
    for name in ROOMS:
        known.setdefault(node(name), set()).update({node(other) for other in imports(name)} - {node(name)})
    order = list(graphlib.TopologicalSorter(known).static_order())  # or CycleError, which names the circle
    assert order.index("serving/model") < order.index("serving/batching") < order.index("serving/http") < order.index("serving/process")


@pytest.mark.parametrize("folder", sorted(FOLDERS), ids=lambda f: str(f.relative_to(ROOT / "nbs")))
def test_a_folder_has_ten_rooms_at_most_and_each_a_number_of_its_own(folder):
    numbers = [number(name) for name, page in ROOMS.items() if page.parent == folder]
    assert len(numbers) <= 10 and len(set(numbers)) == len(numbers)


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
    sizes = [size_of(source) for source in exported(ROOMS[name])]
    words = sum(len(c["source"].split()) for c in cells(ROOMS[name], "markdown"))
    record_property("exported_lines", sum(sizes))
    print(f"{name}: {sum(sizes)} exported lines, longest cell {max(sizes)}, {words / sum(sizes):.1f} words a line")
    assert sum(sizes) <= 250, f"{name} exports {sum(sizes)} lines: split it by noun"
    assert max(sizes) <= 40, f"{name} has an exported cell of {max(sizes)} lines"


@pytest.mark.parametrize("name", ROOMS)
def test_a_page_is_read_line_by_line(name):
    "No line over 120 characters, and no more than 60 lines of definitions before the next thing that a reader sees happen"
    unseen = 0
    for source in (c["source"] for c in cells(ROOMS[name])):
        long = [line for line in source.splitlines() if len(line) > 120]
        assert not long, long
        if EXPORT.search(source):
            defines = any(isinstance(n, DEFINITIONS) for n in ast.parse(source).body)
            unseen += defines * size_of(source)
        elif not re.search(r"^#\|\s*hide", source, re.M):
            unseen = 0
        assert unseen <= 60, f"{name}: {unseen} exported lines, and no example yet"


@pytest.mark.parametrize("name", ROOMS)
def test_every_public_signature_is_annotated(name):
    for f in ast.walk(tree_of(name)):
        if isinstance(f, FUNCTIONS) and (not f.name.startswith("_") or f.name == "__init__"):
            given = [a for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")]
            assert all(a.annotation for a in given) and (f.returns or f.name == "__init__"), f"{name}.{f.name}, line {f.lineno}"


def test_a_public_name_has_one_home_in_a_wing():
    homes = {}
    for name in ROOMS:
        for n in tree_of(name).body:
            patched = any(isinstance(d, ast.Name) and d.id == "patch" for d in getattr(n, "decorator_list", ()))
            if isinstance(n, DEFINITIONS) and not n.name.startswith("_") and not patched:
                homes.setdefault((wing(name) if wing(name) != "ground" else name.split(".")[0], n.name), set()).add(name)
    assert not {n: h for n, h in homes.items() if len(h) > 1}


def test_imports_stand_in_cells_of_their_own():
    "The renderer runs a cell that imports, whole, and without the cells before it; the last cell of a page imports nothing of ours"
    for path in NOTEBOOKS:
        for cell in cells(path):
            if EXPORT.search(cell["source"]) or cell["source"].endswith("import nbdev; nbdev.nbdev_export()"):
                continue
            code = "".join(line for line in cell["source"].splitlines(True) if not line.startswith(("%", "!")))
            imported = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(code).body}
            assert len(imported) < 2, f"{path}, cell {cell['id']}: split imports from other code"


LINK = re.compile(r"\]\(([\w./-]+\.ipynb)?(?:#([\w-]+))?\)")


def anchors(path):
    "What a link may point to in a page: its headings"
    titles = re.findall(r"^#+ (.+)", "\n".join(c["source"] for c in cells(path, "markdown")), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_a_link_leads_to_a_page_and_to_a_heading_of_it(path):
    for page, anchor in LINK.findall("\n".join(c["source"] for c in cells(path, "markdown"))):
        there = path.parent / page if page else path
        there = there if there.exists() else ROOT / page  # the first page is the README, too
        assert there.exists(), f"{page} is not there"
        assert not anchor or anchor in anchors(there), f"{page or path.name} has no heading #{anchor}"


def test_pages_open_with_a_title_and_a_sentence():
    for name, path in ROOMS.items():
        first = cells(path, "markdown")[0]["source"].splitlines()
        assert first[0] == f"# {name.split('.')[-1]}" and first[2].startswith("> "), path


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
    there = {(p.name, n.name) for p in (ROOT / "tests").rglob("test_*.py") for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.FunctionDef)}
    assert len(named) > 60 and not named - there, named - there
    wanted = {f"{k}{i}" for k, n in dict(A=6, N=12, V=10, E=14, L=8, W=12).items() for i in range(1, n + 1)} | {"I1", "I2", "I3", "R1", "R2", "R3", "R4", "R5", "R8", "R9", "R10", "R11", "R12", "R14"}
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
