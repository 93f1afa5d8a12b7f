"""Images from both builders: what lies in them, that they are the same again, and what they must never hold."""
import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from commands import ROOT, last_json, mlserve, run
from hypothesis import given, settings
from hypothesis import strategies as st

NOTEBOOK = ROOT / "tests/notebooks/edge.ipynb"
STAGES = ["runtime", "builder", "weights", "ground", "code"]
SENTINEL = "hunter2-sentinel-of-the-tests"
TINY = "ARG BASE\nFROM scratch AS production\nARG PACKAGE_DIGEST\nENV MLSERVE_PACKAGE=/models/package MLSERVE_PACKAGE_DIGEST=${PACKAGE_DIGEST}\nCOPY Dockerfile /\n"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    "The model of `edge.ipynb`, saved once"
    import torch

    from mlserve.package import save_package
    model = torch.nn.Linear(4, 2).requires_grad_(False)
    model.weight.copy_(torch.tensor([[1., 1, 1, 1], [-1, -1, -1, -1]]))
    model.bias.fill_(0)
    return save_package(model.eval(), tmp_path_factory.mktemp("edge") / "package", "edge", {"x": torch.zeros(8, 4)}, ["signs"], format="onnx")


@pytest.fixture(scope="module")
def context_of(state, package):
    "The context of the package's image, and what a build wants beside it"
    from mlserve.release.plan import prepare, stage_plan
    from mlserve.release.spec import ReleaseSpec

    def context_of(folder, base=os.environ["MLSERVE_BASE"], home=state, **network):
        plan = prepare(ReleaseSpec(name="edge", notebook=NOTEBOOK, base=base, state=home, **network), package)
        return stage_plan(plan, folder), plan.base, plan.package, dict(plan.labels)
    return context_of


@pytest.fixture(scope="module")
def edge_image(context_of, tmp_path_factory):
    "The image, by the engine, and the file it was saved to"
    from mlserve.release.image import built_image as image
    from mlserve.release.image.engine import engine
    folder = tmp_path_factory.mktemp("image")
    built = image.build(*context_of(folder / "context"))
    yield SimpleNamespace(built=built, saved=image.save(built, folder / "image.tar"))
    engine().images.remove(built.id, force=True)


def test_the_image_holds_what_serves_and_nothing_else(edge_image):
    from mlserve.release.image.saved_image import read_layers
    layers = read_layers(edge_image.saved, STAGES)
    files = {p: e for layer in layers for p, e in layer.files.items()}
    assert [(la.name, la.digest) for la in layers] == [(la.name, la.digest) for la in edge_image.built.layers]
    assert abs(sum(la.mb for la in layers) - edge_image.built.size_mb) < 1
    programs = {p for p, e in files.items() if e.kind in ("file", "link") and Path(p).parent.name in ("bin", "sbin")}
    assert {Path(p).name for p in programs} <= {"python", "python3", "python3.11"} | {f"python3.{n}" for n in range(11, 20)}, programs
    assert not [p for p, e in files.items() if e.kind != "folder" and Path(p).name in ("sh", "bash", "dash", "apt", "dpkg", "pip", "perl", "ldconfig", "gcc")]
    assert not [p for p in files if "site-packages/pip/" in p or "ensurepip" in p or p.endswith(".a")]
    assert not [p for p, e in files.items() if e.mode & 0o6000], "setuid or setgid"
    assert [p for p, e in files.items() if e.kind != "link" and e.mode & 0o022] == ["tmp"] and files["tmp"].mode == 0o41777
    assert {e.owner for e in files.values()} == {(0, 0)} and {e.mtime for e in files.values()} == {0}
    assert {p.rpartition("/")[2] for p in files if "/dpkg/status.d/" in p} >= {"libc6", "libssl3", "ca-certificates"}
    assert not any(p.startswith("etc/shadow") for p in files)


def test_the_interpreter_of_the_image_is_whole(edge_image):
    "Certificates, time zones, text in UTF-8, a name for the user, and the modules that load a library"
    from mlserve.release.image.engine import engine
    program = ("import bz2, ctypes, getpass, hashlib, json, locale, lzma, multiprocessing, os, socket, sqlite3, ssl, sys, uuid, zlib, zoneinfo\n"
               "context = ssl.create_default_context()\n"
               "print(json.dumps([locale.setlocale(locale.LC_ALL, ''), sys.getfilesystemencoding(), getpass.getuser(), str(zoneinfo.ZoneInfo('Europe/Berlin')),"
               " len(context.get_ca_certs()) > 100, os.access('/', os.W_OK), sys.version_info[:2] >= (3, 11)]))")
    said = engine().containers.run(edge_image.built.id, ["-c", program], entrypoint="/opt/venv/bin/python", network_mode="none", remove=True)
    assert json.loads(said) == ["C.UTF-8", "utf-8", "mlserve", "Europe/Berlin", True, False, True]


def serves(built, package):
    "Run an image under the flags of a check: its golden outputs, by its own health check and over HTTP"
    from mlserve.release import check
    found = check.run_image(SimpleNamespace(name="edge", version="1", image=built.id), package, None, "cpu", "baked", check.Limits())
    assert found.passed, found.reason


def test_the_image_of_the_edge_serves_and_is_small(edge_image, package):
    serves(edge_image.built, package)
    print({la.name: la.mb for la in edge_image.built.layers}, edge_image.built.size_mb)
    assert edge_image.built.size_mb < 0.25 * 1190  # a two-stage image of the tutorials, with torch


LIKE_PYTHON = """FROM %s
RUN mv /usr/bin/python3.11 /usr/local/bin/ && rm /usr/bin/python3 && ln -s python3.11 /usr/local/bin/python3 && cp -a /usr/lib/python3.11/. /usr/local/lib/python3.11/ && rm -rf /usr/lib/python3.11 \\
    && mv /usr/lib/x86_64-linux-gnu/libsqlite3.so.0* /usr/lib/x86_64-linux-gnu/libffi.so.8* /usr/local/lib/ && ldconfig && python3 -c 'import sqlite3, ctypes'
"""


def test_a_base_with_its_python_under_usr_local_serves_too(context_of, package, tmp_path):
    "As the official images of Python have it: interpreter, library and some shared libraries under /usr/local"
    from mlserve.release.image import built_image as image
    from mlserve.release.image.engine import engine, find_builder, run_build
    (tmp_path / "Dockerfile").write_text(LIKE_PYTHON % os.environ["MLSERVE_BASE"])
    repository = os.environ["MLSERVE_REGISTRY"] + "/mlserve/tests-base"
    client, docker = find_builder(), engine()
    run_build(client, ["-t", f"{repository}:local", "--network", "none", str(tmp_path)])
    digest = image.pushed_digest(docker.api.push(repository, "local", stream=True, decode=True))
    built = image.build(*context_of(tmp_path / "context", f"{repository}@{digest}"))
    try:
        serves(built, package)
        program = "import sys, sqlite3, ctypes; print(sys.base_prefix)"
        said = docker.containers.run(built.id, ["-c", program], entrypoint="/opt/venv/bin/python", network_mode="none", remove=True)
        assert said.decode().strip() == "/usr/local"
    finally:
        docker.images.remove(built.id, force=True)
        docker.images.remove(f"{repository}:local", force=True)


@pytest.mark.parametrize("builder", ["docker", "buildah"])
def test_hostile_words_stay_words(builder, state, tmp_path):
    "A label or an address either says exactly what was asked, or the build is refused; it never becomes an instruction"
    from mlserve.errors import Refused
    from mlserve.release.image import built_image as image, saved_image
    (tmp_path / "context").mkdir()
    (tmp_path / "context/Dockerfile").write_text(TINY)
    hostile = ["$HOME", "${PATH}", "$(id)", "`id`", 'a "quoted" word', "it's", "{{.Config}}", "\\", "end \\", "two\nRUN id", "two\r\nUSER 0", "# comment", " spaces ", "üñ"]
    exact = 0
    for word in hostile:
        try:
            built = image.build(tmp_path / "context", os.environ["MLSERVE_BASE"], "sha256:p", {"word": word}, builder=builder, state=state)
        except Refused:
            continue
        exact += 1
        with saved_image.opened(image.save(built, tmp_path / "image.tar")) as (_, config, members):
            assert config["config"]["Labels"]["word"] == word and not config["config"].get("User") and len(members) == 1
            assert not [h for h in config["history"] if "RUN" in h["created_by"].split("LABEL")[0]]
    assert exact >= 5, "plain words must pass"


@settings(max_examples=200, deadline=None)
@given(field=st.sampled_from(["name", "repository", "base", "index", "proxy", "device", "delivery", "builder"]),
       text=st.text(max_size=30) | st.builds("{}{}{}".format, st.sampled_from(["python:3.11", "digits", "cpu", "https://pypi.example/", ""]),
                                            st.sampled_from(["\n", "\r", " ", '"', "'", "\\", "$(id)", "${BASE}", "{{x}}", "`id`", "\x00", "\u2028"]), st.text(max_size=8)))
def test_no_field_of_a_spec_becomes_an_instruction(field, text):
    "Refused with exit 8, or 2 where a choice is meant; and what is taken is read back from the Dockerfile as it was"
    from mlserve.errors import MlserveError
    from mlserve.release.image.dockerfile import ImageSpec, parse, render, spec_of
    from mlserve.release.spec import read_spec
    try:
        spec = read_spec(NOTEBOOK, **{field: text})
    except MlserveError as e:
        assert e.code == (2 if field in ("device", "delivery", "builder") else 8), e
        return
    asked = ImageSpec(spec.base, spec.device, spec.delivery)
    assert spec_of(render(asked)) == asked and [i for i, _ in parse(render(asked))] == [i for i, _ in parse(render(ImageSpec("python", spec.device, spec.delivery)))]
    for value in (spec.name, spec.repository, spec.base, spec.index or "", spec.proxy or ""):
        assert re.fullmatch(r"[A-Za-z0-9._:/@~+-]*", value)


def test_a_secret_of_the_environment_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    from mlserve.errors import Refused
    from mlserve.release.image import built_image as image
    monkeypatch.setenv("REGISTRY_PASSWORD", SENTINEL)
    (tmp_path / "Dockerfile").write_text(TINY + f"ENV TOKEN={SENTINEL}\n")
    with pytest.raises(Refused, match="Dockerfile would hold the value of REGISTRY_PASSWORD") as e:
        image.build(tmp_path, os.environ["MLSERVE_BASE"], "sha256:p", {})
    assert SENTINEL not in str(e.value) and e.value.code == 8


# a network as companies have it: an index that wants a password, an own authority, and a proxy before both

def certificate(folder):
    "An authority, and a certificate for localhost that it signed"
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=authority of the tests", "-keyout", folder / "ca.key",
        "-out", folder / "ca.pem", "-addext", "basicConstraints=critical,CA:TRUE")
    run("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", folder / "key.pem", "-out", folder / "req.pem")
    (folder / "ext").write_text("subjectAltName=DNS:localhost\n")
    done = run("openssl", "x509", "-req", "-in", folder / "req.pem", "-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-CAcreateserial", "-days", "2",
               "-extfile", folder / "ext", "-out", folder / "cert.pem")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def company(tmp_path, state, context_of, edge_image):
    "Its addresses, and what it was asked"
    import hashlib
    wheels = {f.name: f for f in (state / "wheels").rglob("*.whl")}
    certificate(tmp_path)
    asked, ways = [], []

    class Index(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args): pass

        def do_GET(self):
            if self.headers.get("Authorization") != "Basic " + base64.b64encode(f"build:{SENTINEL}".encode()).decode():
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="index"')
                self.send_header("Content-Length", "0")
                return self.end_headers()
            asked.append(self.path)
            name = self.path.strip("/").rpartition("/")[2]
            if name in wheels:
                data = wheels[name].read_bytes()
            else:
                mine = [f for f in wheels if f.partition("-")[0].lower().replace("_", "-") == name]
                data = "".join(f'<a href="/files/{f}#sha256={hashlib.sha256(wheels[f].read_bytes()).hexdigest()}">{f}</a>' for f in mine).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if name not in wheels else "application/octet-stream")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Proxy(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args): pass

        def do_CONNECT(self):
            ways.append(self.path)
            there = socket.create_connection(("127.0.0.1", int(self.path.rpartition(":")[2])))
            self.send_response(200)
            self.end_headers()

            def pump(a, b):
                try:
                    while data := a.recv(65536):
                        b.sendall(data)
                except OSError:
                    pass
                finally:
                    b.close()
            back = threading.Thread(target=pump, args=(there, self.connection), daemon=True)
            back.start()
            pump(self.connection, there)
            self.close_connection = True

    index, proxy = (http.server.ThreadingHTTPServer(("127.0.0.1", 0), h) for h in (Index, Proxy))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    index.socket = tls.wrap_socket(index.socket, server_side=True)
    for server in (index, proxy):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "netrc").write_text(f"machine localhost login build password {SENTINEL}\n")
    (tmp_path / "netrc").chmod(0o600)
    yield SimpleNamespace(index=f"https://localhost:{index.server_port}/simple", proxy=f"http://127.0.0.1:{proxy.server_port}", ca=str(tmp_path / "ca.pem"),
                          netrc=str(tmp_path / "netrc"), asked=asked, ways=ways)
    for server in (index, proxy):
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("builder", ["docker", pytest.param("buildah", marks=pytest.mark.matrix)])
def test_a_company_network_leaves_no_trace(company, context_of, edge_image, state, builder, tmp_path, monkeypatch):
    "A private index behind a proxy, signed by an own authority: the wheels are the same, and neither password nor address is in the image"
    from mlserve.release.image import built_image as image, saved_image
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", company.netrc)
    monkeypatch.setenv("HTTP_PROXY", f"http://someone:{SENTINEL}@127.0.0.1:9")
    monkeypatch.setenv("http_proxy", f"http://someone:{SENTINEL}@127.0.0.1:9")
    monkeypatch.setenv("NPM_TOKEN", SENTINEL)
    given = context_of(tmp_path / "context", home=tmp_path / "state", index=company.index, proxy=company.proxy, ca=company.ca)
    assert any(p.endswith(".whl") for p in company.asked) and company.ways
    for f in (tmp_path / "state").rglob("*.txt"):
        assert not any(w in f.read_text() for w in (SENTINEL, "localhost", company.index))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    built = image.build(*given, builder=builder, state=state)
    saved = image.save(built, tmp_path / "image.tar")
    assert saved_image.holding(saved, [SENTINEL, company.index, company.proxy, "authority of the tests", company.ca]) == []
    with saved_image.opened(saved) as (_, config, _members):
        said = json.dumps(config["history"]).lower() + json.dumps(config["config"]["Env"]).lower()
        assert "proxy" not in said and "pip_" not in said
    if builder == "docker":
        assert [la.digest for la in built.layers] == [la.digest for la in edge_image.built.layers]


# the same again

def test_twice_is_once(environment, light_double):
    done = mlserve("build", NOTEBOOK, "--package", light_double, "--name", "double", "--twice", "--json", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["digests"] == [found["image"]] * 2
    assert found["layers"][0] == found["layers"][1] and len(found["layers"][0]) == len(STAGES)


def planted(folder, step):
    "A copy of the package whose Dockerfile has one more step before the code is settled"
    shutil.copytree(ROOT / "mlserve", folder / "mlserve", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "nbs/pipelines", folder / "mlserve/pipelines")
    page = folder / "mlserve/release/image/dockerfile.py"
    text = page.read_text()
    page.write_text(text.replace("f'cp -R /{stage} /out/opt/mlserve',", f"f'cp -R /{{stage}} /out/opt/mlserve', *([{step!r}] if stage == 'code' else []),"))
    assert page.read_text() != text
    return {"PYTHONPATH": str(folder)}


def test_a_date_in_a_file_is_found_and_named(environment, light_double, tmp_path):
    done = mlserve("build", NOTEBOOK, "--package", light_double, "--name", "double", "--twice", "--json", env=environment | planted(tmp_path, "date +%N > /out/opt/mlserve/made.txt"))
    assert done.returncode == last_json(done.stderr)["code"] == 5, done.stderr[-3000:]
    said = last_json(done.stderr)["error"]
    assert "/opt/mlserve/made.txt in the layer 'code': content" in said and done.stdout == ""


def test_a_budget_names_the_layer_that_broke_it(environment, package, tmp_path):
    shutil.copy(NOTEBOOK, tmp_path)
    (tmp_path / "mlserve.toml").write_text("max_image_mb = 100\n")
    done = mlserve("build", tmp_path / "edge.ipynb", "--package", package.path, env=environment)
    assert done.returncode == last_json(done.stderr)["code"] == 3, done.stderr[-3000:]
    said = last_json(done.stderr)["error"]
    assert "the spec allows 100 MB" in said and "The layer 'builder'" in said and "onnxruntime/capi/" in said


def registry_in(folder, port):
    "The settings of a registry for a machine that has no network"
    (folder / "registry.yml").write_text(f"version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {folder}/registry}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n")
    return folder / "registry.yml"


ALONE = """set -eu
ip link set lo up 2>/dev/null || true
docker-registry serve "$1" >/dev/null 2>&1 & registry=$!
trap 'kill $registry' EXIT
for i in $(seq 40); do python3 -c "import socket; socket.create_connection(('127.0.0.1', $2), 1)" 2>/dev/null && break; sleep 0.25; done
! python3 -c "import socket; socket.create_connection(('192.0.2.1', 80), 2)" 2>/dev/null
mlserve build --vendored "$3" --builder buildah --state "$4" --json
"""


@pytest.mark.matrix
def test_two_clones_and_a_machine_without_a_network_make_one_digest(package, tmp_path):
    "buildah: other folders, another umask, another clock; then from a vendored folder, in a network namespace that has nothing but loopback"
    digests, env = [], {"DOCKER_HOST": "unix:///absent.sock", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    for name, wrapped in [("one", []), ("another/place", ["faketime", "-f", "+1000d", "sh", "-c", 'umask 077; exec "$@"', "sh"])]:
        clone, state = tmp_path / name / "clone", tmp_path / name / "state"
        assert run("git", "clone", "-q", ROOT, clone).returncode == 0
        if digests:  # certificates of an index do not hold in another year
            shutil.copytree(tmp_path / "one/state/wheels", state / "wheels")
            shutil.copytree(tmp_path / "one/state/locks", state / "locks")
        done = run(*wrapped, "mlserve", "build", clone / "tests/notebooks/edge.ipynb", "--package", package.path, "--builder", "buildah", "--json",
                   env=env | {"PYTHONPATH": str(clone), "MLSERVE_STATE": str(state)}, cwd=clone, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        digests.append(json.loads(done.stdout)["image"])
    assert digests[0] == digests[1]

    clone, base = tmp_path / "one/clone", env | {"PYTHONPATH": str(tmp_path / "one/clone"), "MLSERVE_STATE": str(tmp_path / "one/state")}
    done = run("mlserve", "vendor", clone / "tests/notebooks/edge.ipynb", "--package", package.path, "--builder", "buildah", "-o", tmp_path / "vendored", env=base, cwd=clone)
    assert done.returncode == 0, done.stderr[-3000:]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    done = run("unshare", "-n", "bash", "-c", ALONE, "alone", registry_in(tmp_path, port), port, tmp_path / "vendored", tmp_path / "alone",
               env=env | {"PYTHONPATH": str(clone), "MLSERVE_REGISTRY": f"127.0.0.1:{port}", "MLSERVE_BASE": None, "PIP_FIND_LINKS": None}, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = json.loads(done.stdout)
    assert alone["image"].partition("@")[2] == digests[0].partition("@")[2] and set(alone["attached"]) == {"sbom", "provenance"}


def digest(data):
    return hashlib.sha256(data).hexdigest()


def poison(folder, wheel):
    "The hash of a wheel that was changed, put into the lock and into the list of the folder's files"
    lock, said = folder / "context/lock.txt", folder / "vendor.json"
    values = json.loads(said.read_text())
    old = values["files"][str(wheel.relative_to(folder))].removeprefix("sha256:")
    text = lock.read_text().replace(old, digest(wheel.read_bytes()))
    lock.unlink()
    lock.write_text(text)
    values["files"] |= {str(path.relative_to(folder)): "sha256:" + digest(path.read_bytes()) for path in (wheel, lock)}
    said.write_text(json.dumps(values))


def test_a_vendored_folder_builds_with_every_way_out_blocked(environment, package, tmp_path):
    """By the engine, with proxies and an index that nobody answers for; one byte changed on the way ends it. The image has the documents
    of any other beside it, and `verify` finds them true"""
    from mlserve.release.supply_chain.verify import verify
    done = mlserve("vendor", NOTEBOOK, "--package", package.path, "-o", tmp_path / "vendored", "--json", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    vendored_by = done.stdout
    dead = {k: "http://127.0.0.1:9" for k in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    blocked = environment | dead | {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_FIND_LINKS": None, "MLSERVE_BASE": None}
    built = mlserve("build", "--vendored", tmp_path / "vendored", "--json", env=blocked)
    assert built.returncode == 0, built.stderr[-3000:]
    plain = mlserve("build", NOTEBOOK, "--package", package.path, "--json", env=environment)
    vendored, own = json.loads(built.stdout), json.loads(plain.stdout)
    assert vendored["image"] == own["image"] and set(vendored["attached"]) == {"sbom", "provenance"}
    assert vendored["attached"] == own["attached"] and vendored.keys() == own.keys()
    links = {link["name"]: link for link in verify(vendored["image"], environment["MLFLOW_TRACKING_URI"])["links"]}
    assert [name for name, link in links.items() if link["ok"] is False] == ["record"], links  # nothing of it was recorded
    assert all(links[name]["ok"] for name in ("sbom", "provenance", "wheels", "package", "code", "dockerfile", "labels")), links
    wheel = next((tmp_path / "vendored/context/wheels").glob("numpy-*.whl"))
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    wheel.unlink()  # it may be linked to others
    wheel.write_bytes(data)
    done = mlserve("build", "--vendored", tmp_path / "vendored", env=blocked)
    assert done.returncode == 5 and wheel.name in last_json(done.stderr)["error"]
    expected = json.loads(vendored_by)["digest"]
    poison(tmp_path / "vendored", wheel)  # and now its hash wherever it stands
    for link, change in (("lock", {}), ("wheels", {"lock": "sha256:" + digest((tmp_path / "vendored/context/lock.txt").read_bytes())})):
        values = json.loads((tmp_path / "vendored/vendor.json").read_text())
        (tmp_path / "vendored/vendor.json").write_text(json.dumps(values | change))
        done = mlserve("build", "--vendored", tmp_path / "vendored", env=blocked)
        assert done.returncode == 5 and f"The link {link} is broken" in last_json(done.stderr)["error"], done.stderr[-2000:]
    done = mlserve("build", "--vendored", tmp_path / "vendored", "--expect", expected, env=blocked)
    assert done.returncode == 5 and "The link vendored is broken" in last_json(done.stderr)["error"]


@pytest.mark.matrix
def test_both_builders_put_the_same_files_into_every_layer(edge_image, context_of, state, tmp_path):
    from mlserve.release.image import built_image as image, saved_image
    other = image.build(*context_of(tmp_path / "context"), builder="buildah", state=state)
    layers = [saved_image.read_layers(s, STAGES, hashes=True) for s in (edge_image.saved, image.save(other, tmp_path / "image.tar"))]
    assert saved_image.first_difference(*layers) == {}


@pytest.mark.parametrize("builder", ["docker", "buildah"])
def test_a_registry_that_writes_no_tag_twice_takes_every_push(immutable, state, tmp_path, builder):
    "The second write of a tag, which came with every push, was refused"
    from mlserve.release.image import built_image as image
    host, rule = immutable
    (tmp_path / "Dockerfile").write_text(TINY)

    name = "tags-" + uuid.uuid4().hex[:8]

    def pushed(label, *busy):
        rule.busy = list(busy)
        built = image.build(tmp_path, os.environ["MLSERVE_BASE"], "sha256:" + "0" * 64, {"io.test": label}, builder=builder, state=state)
        reference = image.push(built, f"{host}/{name}", "000000000000")
        assert not rule.busy
        return reference

    assert pushed("one", 429) == pushed("one") != pushed("two", 500)
    tags = httpx.get(f"http://{host}/v2/{name}/tags/list", trust_env=False).json()["tags"]
    assert len(tags) == len(rule.tags) >= 4 and all(t.startswith("000000000000-") for t in tags)


def test_the_dockerfile_has_no_finding():
    done = subprocess.run(["hadolint", ROOT / "docker/Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
