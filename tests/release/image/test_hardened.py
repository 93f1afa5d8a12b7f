"""The released image under the strictest rules, and what is in it: the flags of the contract, every layer of `docker save`, planted secrets."""
import base64
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import httpx
import pytest

from commands import ROOT, mlserve
from images import config_findings, containing, file_findings, save, text_findings
from containers import HARDENED, address, docker_cli, wait_healthy

PYTHON = "/opt/venv/bin/python"


@pytest.fixture(scope="session")
def saved(engine, release, tmp_path_factory):
    return save(engine, release["image"], tmp_path_factory.mktemp("saved") / "image.tar")


@pytest.fixture(scope="session")
def base(engine, tmp_path_factory):
    "The base, for the control: it has a shell, a package manager and programs with setuid"
    return save(engine, os.environ["MLSERVE_BASE"], tmp_path_factory.mktemp("base") / "image.tar")


def inside(container, code):
    "Run Python in a container, as its own user; what it printed"
    done = docker_cli("exec", container.id, PYTHON, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def status(container):
    return dict(line.split(":\t") for line in inside(container, "print(open('/proc/1/status').read())").splitlines() if ":\t" in line)


def answers(url, released):
    "The golden answers, over the network"
    from mlserve.client import Client
    from mlserve.package import golden
    from mlserve.tensors import compare
    inputs, outputs = golden(released)
    assert compare(outputs, Client(url).infer(inputs), **released.tolerance).passed


@pytest.mark.parametrize("flags", [["--user", "10001:10001"], ["--user", "4242:0"], pytest.param(["--user", "10001:10001", "--init"], marks=pytest.mark.matrix),
                                   pytest.param([], marks=pytest.mark.matrix)], ids=["uid of the image", "arbitrary uid", "init", "no user given"])
def test_it_works_unchanged_under_the_flags_of_the_contract(release, released, start, flags):
    "No user is the image's own, which `test_the_configuration_is_hardened` holds; below another process 1 a server is stopped by `test_server.py`"
    container = start(release["image"], *HARDENED, *flags, "-v", f"{released.path.parent}:/models:ro", "-e", "MLSERVE_DRAIN_DELAY=0")
    wait_healthy(container)
    answers(address(container), released)
    found = status(container)
    assert {found[k] for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert found["NoNewPrivs"] == "1" and found["Seccomp"] == "2"
    assert found["Uid"].split()[0] == (flags[1].split(":")[0] if "--user" in flags else "10001")
    container.stop(timeout=45)
    assert container.wait()["StatusCode"] == 0


def test_baked_it_works_without_any_network(release, released, engine):
    "Healthy by the image's own HEALTHCHECK, and the golden answers from within"
    done = docker_cli("run", "-d", "--network", "none", *HARDENED, "--user", "10001:10001", release["image"])
    assert done.returncode == 0, done.stderr
    container = engine.containers.get(done.stdout.strip())
    try:
        wait_healthy(container)
        probe = container.attrs["Config"]["Healthcheck"]["Test"]
        assert probe[0] == "CMD" and docker_cli("exec", container.id, *probe[1:]).returncode == 0
        code = """
from mlserve.client import Client
from mlserve.package import golden, load_package
from mlserve.tensors import compare
p = load_package('/models/package'); i, o = golden(p)
print(compare(o, Client('http://127.0.0.1:8080').infer(i), **p.tolerance).passed)
"""
        assert inside(container, code).strip() == "True"
        assert inside(container, "import os; print(sorted(os.listdir('/sys/class/net')))").strip() == "['lo']"
    finally:
        container.remove(force=True, v=True)


WALK = """
import os, sys
found = []
for here, folders, files in os.walk('/'):
    if here == '/': folders[:] = [f for f in folders if f not in ('proc', 'sys', 'dev', 'tmp')]
    found += [p for p in [here] + [os.path.join(here, f) for f in files] if not os.path.islink(p) and os.access(p, os.W_OK)]
print(found)
"""


@pytest.mark.parametrize("user", ["10001:10001", "4242:0"])
def test_nothing_can_be_written_but_tmp_even_on_a_writable_root(release, start, user):
    "By the files' own modes: the root is not read-only here, and no flag of the engine helps"
    container = start(release["image"], "--user", user)
    wait_healthy(container)
    assert eval(inside(container, WALK)) == []
    assert inside(container, "open('/tmp/x', 'w').write('x'); print(open('/tmp/x').read())").strip() == "x"


def test_a_test_load_leaves_no_file_on_a_writable_root(release, released, start):
    "`docker diff` stays empty; with a control, so that an empty answer means something"
    container = start(release["image"], "--tmpfs", "/tmp", "--user", "10001:10001")
    wait_healthy(container)
    body = (json.dumps({"inputs": [[[[0.0] * 8] * 8]]}), b"{", b"")
    with httpx.Client(base_url=address(container), trust_env=False) as client:
        codes = {client.post("/predict", content=body[i % 3], headers={"Content-Type": "application/json"}).status_code for i in range(300)}
        codes |= {client.get(p).status_code for p in ("/v2", "/v2/models/digits", "/metrics", "/v2/health/live", "/nowhere")}
    assert codes <= {200, 400, 404}, codes
    for _ in range(10):
        answers(address(container), released)
    assert docker_cli("diff", container.id).stdout == ""
    assert docker_cli("exec", "--user", "0", container.id, PYTHON, "-c", "open('/planted', 'w')").returncode == 0
    assert "A /planted" in docker_cli("diff", container.id).stdout


def test_the_server_is_process_one_and_buries_orphans(release, start):
    "No shell in front of it; a process whose parent has gone is waited for"
    container = start(release["image"], *HARDENED, "--user", "10001:10001")
    wait_healthy(container)
    command = inside(container, "print(open('/proc/1/cmdline').read().split(chr(0))[:3])")
    assert eval(command) == [PYTHON, "-m", "mlserve.serving.server"]
    inside(container, "import os, time\nif os.fork() == 0:\n    if os.fork() == 0: time.sleep(0.5)\n    os._exit(0)\nos.wait()")
    time.sleep(2)
    states = "import os; print([open(f'/proc/{p}/stat').read().split()[2] for p in os.listdir('/proc') if p.isdigit()])"
    assert "Z" not in eval(inside(container, states))


def test_no_page_for_people_is_served(release, start):
    "The interface at `/docs` is off in images; `/` says who answers, as JSON, also to a browser"
    container = start(release["image"])
    wait_healthy(container)
    got = {p: httpx.get(address(container) + p, trust_env=False).status_code for p in ("/docs", "/redoc", "/openapi.json", "//v2/docs", "/v2/../docs")}
    assert set(got.values()) == {404}, got
    card = httpx.get(address(container) + "/", headers={"accept": "text/html"}, trust_env=False)
    assert card.headers["content-type"] == "application/json" and card.json()["package"] == release["package"]


def test_no_file_of_the_image_is_more_than_it_should_be(saved):
    "Of root, writable for nobody, no setuid, no shell, no installer, no compiler, nothing of a workstation"
    assert file_findings(saved.files()) == []


def test_the_base_has_what_the_image_has_not(base):
    "The control: the same questions find a shell, a package manager, an installer's leavings and setuid programs in the base"
    found = file_findings(base.files())
    for kind in ("shell: ", "manager: ", "setuid or setgid: "):
        assert any(f.startswith(kind) for f in found), kind


def test_no_content_of_the_image_is_more_than_it_should_be(saved):
    "Nobody can log in, no password, byte code with hashes, every file at time zero, nothing that looks like a key"
    assert text_findings(saved) == []


def test_the_configuration_is_hardened(saved, engine, base):
    assert config_findings(saved.config) == []
    assert len(config_findings(base.config | {"config": base.config.get("config") or {}})) >= 8


PLANTED = """FROM {base}
RUN mkdir -p /etc/x /work/.git && echo 'svc:x:5:5::/:/bin/sh' >> /etc/passwd \\
    && printf -- '-----BEGIN PRIVATE KEY-----\\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQ\\n' > /etc/x/key \\
    && touch /work/open /work/.git/config /work/mine && chmod 666 /work/open && chown 7 /work/mine && printf '0000\\0\\0\\0\\0' > /work/a.pyc \\
    && cp /bin/true /work/root && chmod 4755 /work/root
USER app
ENV API_TOKEN=hunter2
ENTRYPOINT ["/bin/sh", "-c", "true"]
"""


def test_planted_faults_are_found(engine, tmp_path):
    "The control of the three tests above, one planted fault for each question"
    from mlserve.release.image.engine import find_builder
    (tmp_path / "Dockerfile").write_text(PLANTED.format(base=os.environ["MLSERVE_BASE"]))
    builder = find_builder()
    done = subprocess.run([builder.command, "build", "-q", "--network", "none", str(tmp_path)], env=os.environ | builder.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    try:
        bad = save(engine, done.stdout.strip(), tmp_path / "bad.tar")
        files = "\n".join(file_findings(bad.files()))
        for sentence in ("writable for others: /work/open 666", "not of root: /work/mine 7:0", "belongs to a workstation: /work/.git", "setuid or setgid: /work/root"):
            assert sentence in files
        texts = text_findings(bad)
        for sentence in ("can log in: svc", "looks like a secret: /etc/x/key", "byte code with a time: /work/a.pyc", "has a time: /work/open"):
            assert sentence in texts
        config = "\n".join(config_findings(bad.config))
        for sentence in ("user: 'app'", "entrypoint: ['/bin/sh'", "environment: API_TOKEN", "health check", "stop signal", "label: io.mlserve.lock"):
            assert sentence in config
        assert containing(bad, "hunter2") and containing(bad, "MIIEvQIBADANBg") and not containing(bad, "hunter3")
    finally:
        engine.images.remove(done.stdout.strip(), force=True)


@pytest.fixture
def index(tmp_path):
    "A package index that wants a password, with one package of a few bytes; (its address with the password, what it was asked)"
    folder, secret, asked = tmp_path / "index", "hunter2-of-the-index", []
    folder.mkdir()
    name, info = "mlserve_scratch-1.0-py3-none-any.whl", "mlserve_scratch-1.0.dist-info"
    with zipfile.ZipFile(folder / name, "w") as z:
        z.writestr("mlserve_scratch.py", "")
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: mlserve-scratch\nVersion: 1.0\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    sha = hashlib.sha256((folder / name).read_bytes()).hexdigest()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            right = self.headers.get("Authorization") == "Basic " + base64.b64encode(f"reader:{secret}".encode()).decode()
            page = {"/simple/mlserve-scratch/": f'<a href="/{name}#sha256={sha}">{name}</a>'.encode(), f"/{name}": (folder / name).read_bytes()}.get(self.path)
            asked.append((self.path, right))
            self.send_response(401 if not right else 404 if page is None else 200)
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream")
            self.end_headers()
            if right and page:
                self.wfile.write(page)

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://reader:{secret}@127.0.0.1:{server.server_port}/simple", asked
    server.shutdown()


def test_no_secret_of_the_builder_is_in_the_image(environment, engine, release, index, tmp_path):
    "Passwords in the environment, in an index, in a proxy of the engine's client, and files beside the notebook: none is in a layer, name, history, variable or label"
    secrets = {k: f"hunter2-{k}" for k in ("aws", "token", "proxy", "dotenv", "key", "git", "netrc")}
    work = tmp_path / "work"
    shutil.copytree(ROOT / "tests/notebooks", work)
    (work / ".env").write_text(f"API_KEY={secrets['dotenv']}\n")
    (work / "id_rsa").write_text(f"-----BEGIN PRIVATE KEY-----\n{secrets['key']}\n")
    (work / ".git").mkdir()
    (work / ".git/config").write_text(f"[remote]\nurl = https://me:{secrets['git']}@example.com\n")
    (work / "mlserve.toml").write_text('requirements = ["mlserve-scratch==1.0"]\n')
    client, home = tmp_path / "docker", tmp_path / "home"
    client.mkdir(), home.mkdir()
    proxy = f"http://me:{secrets['proxy']}@127.0.0.1:9"
    (client / "config.json").write_text(json.dumps({"proxies": {"default": {"httpProxy": proxy, "httpsProxy": proxy, "noProxy": "127.0.0.1"}}}))
    (home / ".netrc").write_text(f"machine example.com login me password {secrets['netrc']}\n")
    url, asked = index
    env = {**environment, "AWS_SECRET_ACCESS_KEY": secrets["aws"], "API_TOKEN": secrets["token"], "PIP_EXTRA_INDEX_URL": url, "NO_PROXY": "127.0.0.1",
           "DOCKER_CONFIG": str(client), "HOME": str(home), "MLSERVE_STATE": str(tmp_path / "state")}
    shutil.copytree(Path(environment["MLSERVE_STATE"]) / "wheels", tmp_path / "state/wheels", copy_function=os.link)
    done = mlserve("release", work / "edge.ipynb", "--json", env=env)  # without torch: the whole image is searched, twice
    assert done.returncode == 0, done.stderr[-4000:]
    assert ("/simple/mlserve-scratch/", True) in asked, "the index was not asked with its password"
    image = json.loads(done.stdout)["image"]
    saved = save(engine, image, tmp_path / "image.tar")
    assert any("mlserve_scratch.py" in m.name for _, m, _ in saved.members()), "the package of the index is in the image"
    assert containing(saved, "hunter2", str(work), str(home)) == []
    host, rest = image.split("/", 1)
    repository, digest = rest.split("@")
    held = httpx.get(f"http://{host}/v2/{repository}/manifests/{digest}", trust_env=False,
                     headers={"Accept": "application/vnd.docker.distribution.manifest.v2+json"})
    assert held.status_code == 200 and "hunter2" not in held.text
    assert file_findings(saved.files()) == []


@pytest.mark.parametrize("device, delivery", [("cpu", "baked"), pytest.param("cpu", "store", marks=pytest.mark.matrix), pytest.param("cuda", "baked", marks=pytest.mark.matrix), ("cuda", "store")])
def test_checkov_has_no_finding(checkov, device, delivery, tmp_path):
    "With one rule answered in the file itself; and a file that breaks another is found"
    from mlserve.release.image.dockerfile import ImageSpec, render

    def ask(text):
        (tmp_path / "Dockerfile").write_text(text)
        summary, failed = checkov(tmp_path, "dockerfile")
        return summary, [check for check, _ in failed]
    text = render(ImageSpec("python:3.11-slim-bookworm", device, delivery))
    summary, failed = ask(text)
    assert failed == [] and summary["passed"] > 20 and summary["skipped"] <= 1 and not summary["parsing_errors"]
    if (device, delivery) == ("cpu", "baked"):
        assert "CKV_DOCKER_8" in ask(text.replace("USER 10001:10001", "USER root"))[1]
        assert "CKV_DOCKER_7" in ask(text.replace("# checkov:skip=CKV_DOCKER_7", "# "))[1]
