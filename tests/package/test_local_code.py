"""Local modules that travel with a package: what may, what is refused, and whose code answers."""
import contextlib
import sys

import numpy as np
import pytest

from mlserve.client import Client
from mlserve.errors import CheckFailed, IntegrityError, LocalResource, MlserveError, Refused, UsageError
from mlserve.package import load_package, save_package
from mlserve.package.code.local_modules import copy_code, project_of
from mlserve.package.code.modules import locked_code
from mlserve.package.handler import read_handler
from mlserve.package.lock import parse_lock, write_lock

NET = """
import torch
from mylib.scale import factor
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(2, 1)
    def forward(self, x): return self.line(x) * factor()
"""
FILES = {
    "__init__.py": "", "net.py": NET, "scale.py": "from . import deep\ndef factor(): return deep.FACTOR", "deep/__init__.py": "FACTOR = 3.0",
    "labels.txt": "low high", "text.py": "from importlib.resources import files\ndef labels(): return files(__package__).joinpath('labels.txt').read_text().split()",
    "unused.py": "import matplotlib_of_nobody", "README.md": "Nobody needs this.", "__pycache__/net.cpython-311.pyc": "\0", ".cache/big.bin": "\0"}
HANDLER = """
import numpy as np
import mylib.text
from mylib.net import Net
def preprocess(request: list[list[float]]) -> dict: return {'x': np.array(request, np.float32)}
def postprocess(outputs: dict, request) -> list[str]:
    from mylib.late import threshold
    low, high = mylib.text.labels()
    return [high if y > threshold else low for y in outputs['y'][:, 0]]
"""
CODE = ["../src/mylib", "../src/mylib/labels.txt"]


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@contextlib.contextmanager
def project_in(folder, monkeypatch):
    "A repository with a notebook's folder, where the test runs, and a module in another"
    write(folder / "src/mylib", FILES | {"late.py": "threshold = 0"})
    write(folder, {".git/HEAD": "", "notebooks/handler.py": HANDLER})
    with monkeypatch.context() as patch:
        patch.chdir(folder / "notebooks")
        patch.syspath_prepend(folder / "src")
        forget()
        yield folder
    forget()


def forget():
    "What a kernel that is started again has not imported"
    for name in [n for n in sys.modules if n.partition(".")[0] == "mylib"]:
        del sys.modules[name]


@pytest.fixture
def project(tmp_path, monkeypatch):
    with project_in(tmp_path, monkeypatch) as folder:
        yield folder


def save(project, name="package", code=CODE, factor=None):
    "Save a network whose class is in a local module, as a notebook would"
    if factor:
        (project / "src/mylib/deep/__init__.py").write_text(f"FACTOR = {factor}")
    import torch
    from mylib.net import Net
    torch.manual_seed(0)
    net, x = Net().eval(), torch.rand(4, 2)
    return net, x, save_package(net, project / name, "net", {"x": x}, ["y"], format="safetensors", handler="handler.py", code=code)


# A package with modules of its own

def test_local_modules_travel_and_are_served_without_the_project(project):
    net, x, package = save(project)
    locked = parse_lock((package.path / "package.lock").read_bytes())
    there = {f"code/mylib/{name}" for name in FILES if name.endswith(".py") or name == "labels.txt"} | {"code/mylib/late.py"}
    assert {name for name in locked if name.startswith("code/")} == there
    expected = net(x).detach().numpy()
    (project / "src").rename(project / "gone")
    server = package.serve()
    with contextlib.closing(Client(server.url)) as client:
        assert np.allclose(client.infer({"x": x.numpy()})["y"], expected, atol=1e-6)
        answer = client.http.post("/handle", json=x.tolist()).json()
        assert answer == [["low", "high"][int(y > 0)] for y in expected[:, 0]]
    server.stop()
    assert not [f for f in (package.path / "code").rglob("*") if f.suffix == ".pyc"]


def test_the_digest_names_every_byte_of_the_code(project):
    digests = {save(project)[2].digest}
    (project / "src/mylib/unused.py").write_text("import another_of_nobody")
    digests.add(save(project)[2].digest)
    (project / "src/mylib/labels.txt").write_text("cold warm")
    digests.add(save(project)[2].digest)
    assert len(digests) == 3
    package = project / "package"
    (package / "code/mylib/late.py").write_text("threshold = 1")
    with pytest.raises(IntegrityError, match="'code/mylib/late.py' of package"):
        load_package(package)


def test_a_module_that_does_not_travel_is_missed_while_the_notebook_is_open(project):
    with pytest.raises(UsageError, match=r"imports 'mylib', which is not installed.*code=\[…\]"):
        save(project, code=())
    (project / "src/mylib/scale.py").write_text("from other import factor")
    (project / "src/other.py").write_text("def factor(): return 3.0")
    with pytest.raises(UsageError, match="imports 'other', which is not installed"):
        save(project)
    assert not (project / "package").exists()
    assert save(project, code=[*CODE, "../src/other.py"])[2].digest


# Row A5: whose code answers

def test_A5_code_that_was_edited_after_its_import_is_not_what_the_notebook_tried(project):
    "The notebook has the module of an hour ago, and the disk another: the live model's answers are not those of what would be served"
    save(project)
    with pytest.raises(CheckFailed, match="differs|otherwise|Nothing was saved"):
        save(project, factor=4.0)


def packed(folder, **modules):
    "A locked package whose handler imports `mylib`, without a model"
    handler = "from mylib.scale import factor\ndef limit():\n    from mylib.late import threshold\n    return threshold\n"
    write(folder, {"handler.py": handler} | {f"code/mylib/{name}.py": source for name, source in modules.items()})
    write_lock(folder)
    return folder


def test_A5_two_packages_of_one_process_have_each_their_own_code(tmp_path):
    packages = {n: packed(tmp_path / f"v{n}", deep=f"FACTOR = {n}", scale="from . import deep\ndef factor(): return deep.FACTOR") for n in (3, 5)}
    scales = [read_handler(packages[n]).module.factor() for n in (3, 5, 3)]
    assert scales == [3, 5, 3], f"they answered {scales}"


def test_A5_a_module_that_is_imported_late_is_the_locked_one(tmp_path):
    package = packed(tmp_path / "p", scale="factor = 1", late="threshold = 0")
    handler = read_handler(package)
    (package / "code/mylib/late.py").write_text("threshold = 9")
    assert handler.module.limit() == 0, f"it took {handler.module.limit()}"


def test_A5_a_module_that_is_not_as_it_was_locked_never_runs(tmp_path):
    package = packed(tmp_path / "p", scale="factor = 1")
    (package / "code/mylib/scale.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w'); factor = 2")
    with pytest.raises(IntegrityError, match="'code/mylib/scale.py' of package .* is not what its lock says"):
        read_handler(package)
    assert not (tmp_path / "ran").exists()


def test_a_package_that_is_read_again_has_new_modules_and_leaves_one_set_of_them(tmp_path):
    package = packed(tmp_path / "p", scale="factor = []")
    kept = [read_handler(package).module.factor for _ in range(3)]
    finders, prefix = list(sys.meta_path), locked_code(package).prefix
    read_handler(package)
    assert kept[0] is not kept[1] and sys.meta_path == finders
    assert sorted(n for n in sys.modules if n.startswith(prefix + ".")) == [f"{prefix}.mylib", f"{prefix}.mylib.scale"]
    assert sorted(f.name for f in package.rglob("*") if f.is_file()) == ["handler.py", "package.lock", "scale.py"]


# What is refused

AWS = "key = 'AKIA" + "ABCDEFGH" * 2 + "'"
@pytest.mark.parametrize("files, code, error, words", [
    ({}, ["../src/mylob"], LocalResource, "There is no file or folder '../src/mylob'"),
    ({}, ["/usr/lib"], Refused, "'/usr/lib', which code names, is outside of the project"),
    ({}, ["../src/far"], Refused, "outside of the project"),
    ({"mylib/.env": "A=1"}, CODE, Refused, "'mylib/.env' of code has the name of a secret"),
    ({"mylib/deep/client_secret.json": "{}"}, CODE, Refused, "'mylib/deep/client_secret.json' of code has the name of a secret"),
    ({"mylib/id_ed25519": "x"}, CODE, Refused, "name of a secret"),
    ({"mylib/s3.py": f"import os\n{AWS}"}, CODE, Refused, "'mylib/s3.py' of code holds what looks like an access key of AWS, in line 2"),
    ({"mylib/tls.py": "pem = '''-----BEGIN RSA PRIVATE KEY-----'''"}, CODE, Refused, "a private key, in line 1"),
    ({"mylib/hub.py": f"token = 'hf_{'a' * 34}'"}, CODE, Refused, "a token, in line 1"),
    ({"mylib/db.py": "url = 'postgresql://me:word@db/x'"}, CODE, Refused, "an address with a password"),
    ({"mylib/labels.txt": f"low high {AWS}"}, CODE, Refused, "'mylib/labels.txt' of code holds"),
    ({"mylib/fast.so": "\x7fELF\0"}, CODE, Refused, "'mylib/fast.so' of code is a binary file"),
    ({"mylib/words.py": "x = 1\0"}, CODE, Refused, "'mylib/words.py' of code is a binary file"),
    ({"mylib/words.json": "{}", "mylib/a.py": "open(here/'words.json')"}, CODE, Refused, r"names 'words.json', which does not travel.*code=\[…, '../src/mylib/words.json'\]"),
    ({"mylib/a.py": "def f(:"}, CODE, UsageError, "'mylib/a.py' of code is not Python: invalid syntax, line 1"),
    ({"mylib/a.py": "import importlib\nimportlib.import_module('mylib.net')"}, CODE, Refused, r"'mylib/a.py', line 2, has import_module\('mylib.net'\)"),
    ({"numpy/__init__.py": ""}, ["../src/numpy"], Refused, "'numpy', which code names, shadows the module 'numpy' that is installed"),
    ({"json.py": ""}, ["../src/json.py"], Refused, "shadows the module 'json' of Python"),
    ({"mlserve/__init__.py": ""}, ["../src/mlserve"], Refused, "shadows the module 'mlserve' that is installed"),
    ({"my-lib/__init__.py": ""}, ["../src/my-lib"], UsageError, "'my-lib', which code names, is no name that can be imported"),
    ({"data/words.txt": "a"}, ["../src/data"], Refused, "'data', which code names, holds no Python"),
    ({"words.txt": "a"}, [*CODE, "../src/words.txt"], UsageError, "'words.txt' is in none of the folders of code"),
    ({"mylib/.cache/words.txt": "a"}, [*CODE, "../src/mylib/.cache/words.txt"], UsageError, "'words.txt' is in none of the folders"),
    ({"v2/mylib/__init__.py": ""}, [*CODE, "../src/v2/mylib"], UsageError, "Two of the modules in code have one name")])
def test_what_does_not_travel_is_refused_by_name(project, files, code, error, words):
    write(project / "src", files)
    (project / "src/far").symlink_to("/usr/lib")
    with pytest.raises(error, match=words):
        copy_code(code, project / "draft")
    assert not (project / "draft").exists()


def test_a_link_inside_is_refused(project):
    (project / "src/mylib/far.py").symlink_to("/etc/hosts")
    with pytest.raises(Refused, match="'far.py' of code is a link"):
        copy_code(CODE, project / "draft")


@pytest.mark.parametrize("more, words", [({"code": "../src/mylib"}, "code is of type str; a list of paths"), ({"code": CODE}, "code is given without a handler")])
def test_what_save_package_refuses(project, more, words):
    with pytest.raises(UsageError, match=words):
        save_package("model.onnx", project / "package", "net", {"x": np.ones((4, 2), "f4")}, ["y"], format="onnx", **more)


def test_a_refusal_leaves_no_package_and_no_draft(project):
    (project / "src/mylib/.env").write_text("A=1")
    with pytest.raises(MlserveError):
        save(project)
    assert sorted(p.name for p in project.iterdir()) == [".git", "notebooks", "src"]


def test_a_handler_may_not_ask_for_a_module_by_text(project):
    (project / "notebooks/handler.py").write_text(HANDLER + "\ndef more():\n    import importlib\n    return importlib.import_module('mylib.net')\n")
    with pytest.raises(Refused, match=r"'handler.py', line \d+, has import_module\('mylib.net'\)"):
        save(project)


def test_where_a_project_ends(tmp_path):
    write(tmp_path, {"a/pyproject.toml": "", "a/b/c/x": "", "d/e/x": ""})
    assert project_of(tmp_path / "a/b/c") == tmp_path / "a" and project_of(tmp_path / "d/e") == tmp_path / "d/e"
    write(tmp_path, {".git": "gitdir: elsewhere"})
    assert project_of(tmp_path / "a/b/c") == tmp_path == project_of(tmp_path / "d/e")
