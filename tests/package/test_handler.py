"""Handlers that are faulty, hostile or merely odd: refused while the notebook is open, or answered with a sentence."""
import hashlib
import json
import os
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from commands import ROOT
from mlserve.package.notebook_export import exported_cells, unresolved
from mlserve.errors import IntegrityError, InvalidInput, ModelFailed, TooLarge, UsageError
from mlserve.package.handler import read_handler, write_handler
from mlserve.tensors import TensorSpec

INPUTS = (TensorSpec("x", "FP32", (-1, 2)),)
GOOD = """
import numpy as np
from pydantic import BaseModel, field_validator
class Point(BaseModel):
    x: float
    y: float
    fault: str = ''
def preprocess(request: list[Point]) -> dict:
    fault = request[0].fault if request else ''
    if fault == 'value': raise ValueError('The first point has a fault.')
    if fault == 'key': return {}['absent']
    if fault == 'list': return {'x': [[1.0, 2.0]]}
    if fault == 'type': return {'x': np.array([[1, 2]])}
    if fault == 'name': return {'z': np.zeros((1, 2), np.float32)}
    if fault == 'shape': return {'x': np.zeros((1, 3), np.float32)}
    if fault == 'none': return None
    if fault == 'inner': Point(x='far', y=0)
    return {'x': np.array([[p.x, p.y] for p in request], np.float32)}
def postprocess(outputs: dict, request: list[Point]) -> list[float]:
    fault = request[0].fault
    if fault == 'value after': raise ValueError('secret')
    if fault == 'text after': return ['far']
    if fault == 'nan after': return [float('nan')]
    return outputs['y'].tolist()
"""


def locked(folder, text):
    "A folder with a handler and its lock, as `save_package` leaves them"
    folder.mkdir(exist_ok=True)
    source = text.encode()
    (folder / "handler.py").write_bytes(source)
    (folder / "package.lock").write_text(f"handler.py {len(source)} {hashlib.sha256(source).hexdigest()}\n")
    return folder


@pytest.fixture(scope="module")
def handler(tmp_path_factory):
    return read_handler(locked(tmp_path_factory.mktemp("good"), GOOD))


def ask(handler, body):
    "What the server does with a body; the model is a sum"
    request = handler.decode(body if isinstance(body, bytes) else json.dumps(body).encode())
    arrays = handler.prepare(request, INPUTS)
    return json.loads(handler.encode(handler.respond({"y": arrays["x"].sum(1)}, request)))


# What a client may send

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-2**60, max_value=2**60)] * 2), min_size=1, max_size=5))
def test_a_typed_request_goes_through(handler, points):
    got = ask(handler, [{"x": x, "y": y} for x, y in points])
    assert np.allclose(got, np.array(points, np.float32).sum(1), rtol=1e-5, atol=1e-30)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=4), lambda v: st.lists(v, max_size=3)
       | st.dictionaries(st.sampled_from(["x", "y", "fault"]), v, max_size=3), max_leaves=6).map(lambda v: json.dumps(v).encode())))
def test_a_body_is_a_request_or_is_refused_with_a_sentence(handler, body):
    try:
        request = handler.decode(body)
    except InvalidInput as e:
        assert e.message.startswith("The request ") and len(e.message) < 600
    else:
        assert isinstance(request, list) and all(np.isfinite([p.x, p.y]).all() for p in request)


@pytest.mark.parametrize("body,words", [
    (b"", "Invalid JSON"), (b"\xff", "Invalid JSON"), (b"[" * 100_000, "recursion"), (b'[{"x": 1}]', "'0.y': Field required"), (b"null", "valid array"),
    (b'[{"x": NaN, "y": 1}]', "NaN, which is not JSON"), (b'[{"x": -Infinity, "y": 1}]', "-Infinity, which is not JSON"),
    (b'[{"x": "far", "y": 1}]', "'0.x'"), (b"[" + b'{"x": 1},' * 500 + b'{"x": 1}]', r"\(500 more\)")])
def test_what_pydantic_refuses(handler, body, words):
    with pytest.raises(InvalidInput, match=words):
        handler.decode(body)


def test_of_many_faults_there_is_the_number_and_many_values_are_refused_unread(handler):
    with pytest.raises(InvalidInput, match="not valid in 20001 places"):
        handler.decode(b"[" + b"[]," * 20_000 + b"[]]")
    with pytest.raises(TooLarge, match="more than 262144 values"):
        handler.decode(b"[" + b"0," * 2**18 + b"0]")


def test_words_that_look_like_nan_are_text(handler):
    assert handler.decode(b'[{"x": 1, "y": 2, "fault": "NaN Infinity"}]')[0].fault == "NaN Infinity"


@pytest.mark.parametrize("fault,error,words", [
    ("value", InvalidInput, "^The first point has a fault.$"), ("inner", InvalidInput, "at 'x'"), ("key", ModelFailed, "preprocess of the handler raised KeyError"),
    ("list", ModelFailed, "dictionary of NumPy arrays"), ("none", ModelFailed, "gave NoneType"), ("type", ModelFailed, "is int64; the model takes FP32"),
    ("name", ModelFailed, "'x' is missing"), ("shape", ModelFailed, r"takes \[-1, 2\]"), ("value after", ModelFailed, "^postprocess of the handler raised ValueError.$"),
    ("text after", ModelFailed, "does not allow at '0'"), ("nan after", ModelFailed, "cannot be written as JSON")])
def test_whose_fault_it_is(handler, fault, error, words):
    with pytest.raises(error, match=words):
        ask(handler, [{"x": 1, "y": 2, "fault": fault}])


def test_a_model_that_answers_nan_gets_no_response(handler):
    with pytest.raises(ModelFailed, match="non-finite output 'y'"):
        handler.respond({"y": np.array([1, np.inf])}, handler.decode(b'[{"x": 1, "y": 2}]'))


def test_a_null_that_is_meant_stays(tmp_path):
    text = "import numpy as np\ndef preprocess(request: str) -> dict: return {}\ndef postprocess(outputs: dict, request) -> list[str | None]: return [None, 'null']"
    h = read_handler(locked(tmp_path / "p", text))
    assert h.encode(h.respond({}, "a")) == b'[null,"null"]'


# What an author may have written

@pytest.mark.parametrize("text,words", [
    ("def f(:", "not Python"), ("x = 'a\\0'.\0", "not Python"), ("import a_module_of_mine", "'a_module_of_mine', which is not installed"), ("from numpy import *", "imports \\*"),
    ("def preprocess(r: str): return labels[r]", "'labels' is used in preprocess, but defined nowhere"), ("x = labels", "outside of any function"),
    ("class A:\n    def f(self): return width", "'width' is used in A"), ("1/0", "ZeroDivisionError"), ("raise SystemExit(0)", "SystemExit"),
    ("import os; os._exit(3)", "ended the process that loaded it, with code 3"), ("open('notes.txt')", "FileNotFoundError"), ("x: int = 'a' + 1", "TypeError"),
    ("preprocess = 3\ndef postprocess(o, r) -> str: return ''", "preprocess of handler.py is int"),
    ("async def preprocess(r: str): pass\ndef postprocess(o, r) -> str: return ''", "is async"),
    ("def preprocess(r: str): pass", "only preprocess"), ("def postprocess(o, r) -> str: return ''", "only postprocess"),
    ("def preprocess(r): pass\ndef postprocess(o, r) -> str: return ''", "'r' without a type; allowed are a pydantic model"),
    ("def preprocess(r: str): pass\ndef postprocess(o, r): return ''", "a return value without a type"),
    ("def preprocess(r: str): pass\ndef postprocess(o, r) -> None: return ''", "a return value without a type"),
    ("import numpy as np\ndef preprocess(r: np.ndarray): pass\ndef postprocess(o, r) -> str: return ''", "which JSON cannot carry"),
    ("def preprocess(r: 'Absent'): pass\ndef postprocess(o, r) -> str: return ''", "cannot be read"),
    ("def preprocess(): pass\ndef postprocess(o, r) -> str: return ''", r"called as preprocess\(request\)"),
    ("def preprocess(r: str, extra): pass\ndef postprocess(o, r) -> str: return ''", r"called as preprocess\(request\)"),
    ("def preprocess(r: str): pass\ndef postprocess(o) -> str: return ''", r"called as postprocess\(outputs, request\)")])
def test_a_faulty_handler_is_never_written(tmp_path, monkeypatch, text, words):
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "notes.txt").write_text("beside the notebook, not in the package")
    (tmp_path / "a_module_of_mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match=words):
        write_handler(tmp_path / "mine.py", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("handler", ["absent.py", "handler.txt", 3, "notebook", True])
def test_what_is_no_handler(tmp_path, handler):
    with pytest.raises(UsageError, match="allowed are True|not a notebook"):
        write_handler(handler, tmp_path)


def test_no_handler_is_a_handler_too(tmp_path):
    assert write_handler(None, tmp_path) is None and write_handler(False, tmp_path) is None and read_handler(tmp_path) is None


def test_classes_alone_make_no_typed_route(tmp_path):
    h = read_handler(locked(tmp_path / "p", "class Net:\n    size = 3\n"))
    assert not h.typed and h.module.Net.size == 3


def test_a_handler_takes_types_from_annotations_as_text(tmp_path):
    text = ("from __future__ import annotations\nfrom pydantic import BaseModel\nclass Deep(BaseModel):\n    below: list[Deep] = []\n"
            "def preprocess(request: Deep) -> dict: return {}\ndef postprocess(outputs, request) -> Deep: return request\n")
    h = read_handler(locked(tmp_path / "p", text))
    assert h.decode(b'{"below": [{}]}').below[0].below == []
    api = h.openapi()
    assert {api[k]["$ref"].removeprefix("#/components/schemas/") for k in ("request", "response")} == set(api["schemas"])


# What somebody may have done to the file

@settings(max_examples=40, deadline=None)
@given(at=st.integers(0, len(GOOD.encode()) - 1), bit=st.integers(0, 7), cut=st.booleans())
def test_a_changed_byte_is_never_run(tmp_path_factory, at, bit, cut):
    folder = locked(tmp_path_factory.mktemp("flip"), GOOD)
    source = bytearray(GOOD.encode())
    if cut:
        del source[at:]
    else:
        source[at] ^= 1 << bit
    (folder / "handler.py").write_bytes(source)
    with pytest.raises(IntegrityError, match="not what its lock says"):
        read_handler(folder)


@pytest.mark.parametrize("lock", [None, "", "handler.pyc 3 00\n", "files/handler.py"])
def test_a_handler_outside_the_lock_is_never_run(tmp_path, lock):
    marker = tmp_path / "marker"
    folder = locked(tmp_path / "p", f"open({str(marker)!r}, 'w')")
    entry = (folder / "package.lock").read_text()
    (folder / "package.lock").unlink()
    if lock is not None:
        (folder / "package.lock").write_text(entry.replace("handler.py", lock) if lock == "files/handler.py" else lock)
    with pytest.raises(IntegrityError):
        read_handler(folder)
    assert not marker.exists()


def test_reading_writes_nothing_and_two_packages_do_not_mix(tmp_path):
    text = "from pathlib import Path\nword = (Path(__file__).parent/'files'/'word').read_text()\n"
    for name in ("a", "b"):
        locked(tmp_path / name, text)
        (tmp_path / name / "files").mkdir()
        (tmp_path / name / "files" / "word").write_text(name)
    first, second = read_handler(tmp_path / "a"), read_handler(tmp_path / "b")
    assert (first.module.word, second.module.word) == ("a", "b") and first.module.__name__ != second.module.__name__
    assert sorted(p.name for p in (tmp_path / "a").rglob("*")) == ["files", "handler.py", "package.lock", "word"]


def test_the_room_needs_no_framework():
    code = "import sys, mlserve.package.handler; sys.exit(any(m in sys.modules for m in ('torch', 'onnxruntime', 'IPython', 'fastapi')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# Which cells

NAMES = st.sampled_from("abcd")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NAMES, st.integers(0, 3)), max_size=12))
def test_the_last_run_of_each_cell_counts_in_the_place_of_the_first(runs):
    found = exported_cells([f"#| export\n{name} = {value}" for name, value in runs])
    assert found == [f"{name} = {value}" for name, value in dict(runs).items()]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(NAMES, min_size=1, max_size=3, unique=True), max_size=8))
def test_the_exported_cells_define_what_the_notebook_defined(cells):
    history = ["#| export\n" + "\n".join(f"{n} = {i}" for n in names) for i, names in enumerate(cells)]
    live, written = {}, {}
    exec("\n".join(history), live)
    exec("\n".join(exported_cells(history)), written)
    assert live.keys() == written.keys()


def test_a_cell_that_joins_two_earlier_ones_replaces_both():
    assert exported_cells(["#| export\na = 0", "#| export\nb = 0", "#| export\na = 2\nb = 2"]) == ["a = 2\nb = 2"]


@pytest.mark.parametrize("source,names", [
    ("x = [y for y in z]", {"z"}), ("import os.path as p\np.join(q)", {"q"}), ("def f(a=b): return a", {"b"}), ("lambda a: a + c", {"c"}), ("@wrap\ndef f(): pass", {"wrap"}),
    ("class A(B):\n    x: C = 1", {"B", "C"}), ("try: pass\nexcept E as e: print(e)", {"E"}), ("with open(f) as g: g.read()", {"f"}),
    ("def f():\n    def g(): return i\n    i = 1\n    return g", set()), ("for j in range(3): print(j)", set()), ("if (k := 3): print(k)", set()),
    ("def f[T](x: T) -> T: return x" if sys.version_info >= (3, 12) else "x = 1", set()), ("match m:\n    case {'a': n}: print(n)", {"m"})])
def test_names_that_are_missing(source, names):
    assert set(unresolved(source)) == names


# In a real notebook

CELLS = ["files = __import__('pathlib').Path('data')", "#| export\nimport numpy as np\nfrom pydantic import BaseModel",
         "#| export\nlabels = (files/'labels.txt').read_text().split()", "#| export\nclass Text(BaseModel):\n    text: str",
         "#| export\ndef preprocess(request: Text): return {'x': wrong}", "#| export\ndef preprocess(request: Text): return {'x': np.ones((1, 2), np.float32)}",
         "#| export\ndef postprocess(outputs, request) -> Text: return Text(text=labels[0])",
         "from mlserve.package.handler import write_handler\nimport shutil\nshutil.copytree('data', 'out/files')\nprint(write_handler(True, 'out'))"]


def executed(folder, cells, runner):
    "Run cells as a notebook, by nbclient or papermill"
    (folder / "data").mkdir()
    (folder / "data" / "labels.txt").write_text("yes no")
    (folder / "out").mkdir()
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, folder / "model.ipynb")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    shell = ("import json; from IPython.core.interactiveshell import InteractiveShell as S; s = S.instance(colors='nocolor')\n"
             "for c in json.load(open('model.ipynb'))['cells']: s.run_cell(''.join(c['source']), store_history=True).raise_error()")
    tool = {"ipython": ["-c", shell], "papermill": ["-m", "papermill", "model.ipynb", "done.ipynb"], "nbdev": ["-c", "import pathlib, nbdev.test as t, sys; sys.exit(not t.test_nb(pathlib.Path('model.ipynb').absolute())[0])"],
            "nbclient": ["-c", "import nbformat, nbclient; nbclient.NotebookClient(nbformat.read('model.ipynb', 4), kernel_name='python3').execute()"]}[runner]
    return subprocess.run([sys.executable, *tool], cwd=folder, env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("runner", ["nbclient", "papermill", "nbdev"])
def test_each_runner_exports_the_same_file(tmp_path, runner):
    done = executed(tmp_path, CELLS, runner)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "out" / "handler.py").read_text()
    assert text == "\n".join(['"The handler of this package, exported from the cells of its notebook"', "import pathlib",
        "files = pathlib.Path(__file__).parent/'files'", "", *"\n\n".join(c.removeprefix("#| export\n") for c in CELLS[1:7] if "wrong" not in c).split("\n"), ""])
    h = read_handler(locked(tmp_path / "out", text))
    assert h.module.labels == ["yes", "no"]


@pytest.mark.parametrize("change,words", [
    ({2: "labels = ['yes']"}, "'labels' is used in postprocess, but defined in a cell without #| export"), ({1: "import numpy as np\nfrom pydantic import BaseModel"}, "'BaseModel' is used outside of any function"),
    ({2: "#| export\nlabels = get_ipython().getoutput('echo a')"}, "'get_ipython' is used outside of any function, but exists only in IPython"),
    ({i: "x = 1" for i in range(1, 7)}, "no cell that ran is marked")])
def test_a_notebook_hears_what_it_forgot(tmp_path, change, words):
    done = executed(tmp_path, [change.get(i, c) for i, c in enumerate(CELLS)], "ipython")
    assert done.returncode and words in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "out" / "handler.py").exists()


def test_the_typed_route_over_http(tmp_path):
    "A model's own types, from the notebook's cells to OpenAPI, beside the tensor route"
    import httpx
    import torch
    from mlserve.package import save_package
    from mlserve.serving.server import serve_local
    (tmp_path / "handler.py").write_text(GOOD.replace("return outputs['y'].tolist()", "return outputs['y'][:, 0].tolist()"))
    package = save_package(torch.nn.Linear(2, 1), tmp_path / "package", "points", {"x": torch.rand(3, 2)}, ["y"], handler=tmp_path / "handler.py")
    with serve_local(package.path) as url, httpx.Client(base_url=url, trust_env=False) as http:
        typed = http.post("/handle", json=[{"x": 1, "y": 2}, {"x": 3, "y": 4}])
        tensors = http.post("/predict", json={"inputs": [[1, 2], [3, 4]]})
        assert typed.status_code == 200 and np.allclose(typed.json(), np.ravel(tensors.json()["outputs"]), atol=1e-6)
        for body, status, words in (([{"x": "far", "y": 0}], 400, "'0.x'"), ([{"x": 1, "y": 2, "fault": "value"}], 400, "has a fault"),
                                    ([{"x": 1, "y": 2, "fault": "key"}], 500, "KeyError"), ([{"x": 1, "y": 2, "fault": "value after"}], 500, "ValueError")):
            answer = http.post("/handle", json=body)
            assert answer.status_code == status and words in answer.json()["error"] and "secret" not in answer.text, (body, answer.text)
        post = http.get("/openapi.json").json()["paths"]["/handle"]["post"]
        assert post["requestBody"]["content"]["application/json"]["schema"]["items"] == {"$ref": "#/components/schemas/Point"}
        assert "Point" in http.get("/openapi.json").json()["components"]["schemas"]


def test_a_model_without_steps_of_its_own_has_no_typed_route(double):
    import httpx
    from mlserve.serving.server import serve_local
    with serve_local(double) as url:
        answer = httpx.post(f"{url}/handle", json=[], trust_env=False)
    assert answer.status_code == 404 and "no steps of its own" in answer.json()["error"]
