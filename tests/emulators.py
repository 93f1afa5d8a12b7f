"""Object stores, a registry and a tracking server on this machine, each spoken to over real HTTP, and a small package in each store."""
import contextlib
import http.server
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from commands import ROOT
from faulty_proxy import Proxy
from servers import free_port, until

from mlserve.settings import read_settings

AZURE = pytest.param("az", marks=pytest.mark.matrix)  # its emulator is installed by npm and runs in Node: half a minute of a processor
AZURITE = "azurite@3.37.0"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # published, of the emulator
NAMES = ("AWS_", "AZURE_", "GOOGLE_", "STORAGE_", "FSSPEC_", "MLFLOW_TRACKING_")


def wait_for(port, seconds=60):
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < end, f"nothing listens on {port}"
        time.sleep(0.1)


@contextlib.contextmanager
def mlflow_server(folder, database, workers, **env):
    "A real MLflow server, without its six task workers"
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", str(workers),
               "--backend-store-uri", database, "--artifacts-destination", str(folder / "artifacts")]
    with open(folder / "mlflow.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True,
                                   env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **env})
    url = f"http://127.0.0.1:{port}"

    def healthy():
        assert process.poll() is None, (folder / "mlflow.log").read_text()
        with contextlib.suppress(httpx.HTTPError):
            return http.get("/health").status_code == 200
    try:
        with httpx.Client(base_url=url, trust_env=False, verify=False) as http:  # one for all questions
            until(healthy, 240)  # several workers, on two busy cores
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:  # it waits for its own workers, without end
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


class Place:
    "A store behind a proxy"

    def __init__(self, kind, port, root, put):
        self.kind, self.root, self.put = kind, root, put
        self.proxy = Proxy(port)

    def env(self, port=None):
        "What an operator sets to reach it"
        url = f"http://127.0.0.1:{port or self.proxy.port}"
        account = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={AZURE_KEY};BlobEndpoint={url}/devstoreaccount1;"
        return {
            "s3": {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_DEFAULT_REGION": "us-east-1"},
            "gs": {"STORAGE_EMULATOR_HOST": url, "FSSPEC_GS_TOKEN": "anon"},
            "az": {"AZURE_STORAGE_CONNECTION_STRING": account},
            "registry": {"MLFLOW_TRACKING_URI": url},
        }[self.kind]

    def upload(self, name, folder):
        "A folder's files under a name; its address"
        for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            self.put(f"{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return f"{self.root}/{name}"


def use(monkeypatch, place, port=None):
    "Make the environment one that reaches this place, and no other"
    import fsspec
    for name in list(os.environ):
        if name.startswith(NAMES):
            monkeypatch.delenv(name)
    for name, value in place.env(port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"} if place.kind == "gs" else {})
    place.proxy.clear()


@pytest.fixture(scope="session")
def stored_package(tmp_path_factory):
    "A model of a few kilobytes"
    import torch

    from mlserve.package import save_package
    torch.manual_seed(0)
    return save_package(torch.nn.Linear(4, 2), tmp_path_factory.mktemp("tiny") / "package", "tiny", {"x": torch.rand(3, 4)}, ["y"])


@pytest.fixture(scope="session")
def s3():
    import boto3
    from moto.server import ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id="key", aws_secret_access_key="hunter2", region_name="us-east-1")
    client.create_bucket(Bucket="models")
    with (place := Place("s3", port, "s3://models", lambda key, data: client.put_object(Bucket="models", Key=key, Body=data))).proxy:
        yield place
    server.stop()


@pytest.fixture(scope="session")
def gs():
    from gcp_storage_emulator.server import create_server
    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="models")
    server.start()
    wait_for(port)

    def put(key, data):
        url = f"http://127.0.0.1:{port}/upload/storage/v1/b/models/o"
        httpx.post(url, params={"uploadType": "media", "name": key}, content=data, trust_env=False).raise_for_status()

    with (place := Place("gs", port, "gs://models", put)).proxy:
        yield place
    server.stop()


def azurite():
    "The program, installed under state/ the first time"
    main = ROOT / "state/azurite/node_modules/azurite/dist/src/blob/main.js"
    if not main.exists():
        assert shutil.which("npm"), "The tests of Azure's store need npm: apt-get install npm"
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", ROOT / "state/azurite", AZURITE], check=True, timeout=600)
    return main


@pytest.fixture(scope="session")
def az(tmp_path_factory):
    port, folder = free_port(), tmp_path_factory.mktemp("azurite")
    command = ["node", azurite(), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent", "--skipApiVersionCheck",
               "--disableTelemetry", "--inMemoryPersistence"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        from azure.storage.blob import BlobServiceClient
        place = Place("az", port, "az://models", lambda key, data: client.get_blob_client("models", key).upload_blob(data, overwrite=True))
        client = BlobServiceClient.from_connection_string(place.env(port)["AZURE_STORAGE_CONNECTION_STRING"])
        client.create_container("models")
        with place.proxy:
            yield place
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def registry(tracking, state):
    "An MLflow server; `upload` makes a model version, and `versions` remembers each"
    port = int(tracking.rsplit(":", 1)[1])
    place = Place("registry", port, "models:", None)
    place.ids = {}

    def upload(name, folder):
        from mlflow import MlflowClient
        client = MlflowClient(tracking_uri=tracking, registry_uri=tracking)
        experiment = client.get_experiment_by_name("deliveries")
        experiment = experiment.experiment_id if experiment else client.create_experiment("deliveries")
        model = client.create_logged_model(experiment, name=name.replace("/", "-"))
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        registered = name.replace("/", "-")
        with contextlib.suppress(Exception):
            client.create_registered_model(registered)
        version = client.create_model_version(registered, source=f"models:/{model.model_id}", model_id=model.model_id).version
        place.ids[name] = f"models:/{model.model_id}"
        return f"models:/{registered}/{version}"

    place.upload = upload
    with place.proxy:
        yield place


class Immutable(http.server.BaseHTTPRequestHandler):
    "A real registry, behind a rule of ECR and Harbor: no tag is written a second time; and now and then it is busy"
    protocol_version = "HTTP/1.1"
    upstream, tags, busy = "", {}, []

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def refusal(self, data):
        where, _, name = self.path.partition("/manifests/")
        if self.command != "PUT" or not name:
            return None
        if self.busy:
            return self.busy.pop(0)
        if ":" in name:
            return None
        return None if self.tags.setdefault((where, name), data) is data else 400

    def answer(self):
        data = self.body()
        if status := self.refusal(data):
            code = {400: "TAG_INVALID", 429: "TOOMANYREQUESTS"}.get(status, "UNKNOWN")
            answer = httpx.Response(status, json={"errors": [{"code": code, "message": "the answer of the rule"}]}, headers={"Retry-After": "0"})
        else:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length", "connection", "accept-encoding")}
            answer = httpx.request(self.command, self.upstream + self.path, headers=headers, content=data, trust_env=False, timeout=60)
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.headers["Content-Length"] if self.command == "HEAD" and "Content-Length" in answer.headers else str(len(answer.content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def immutable():
    "Host and port of the machine's registry, with tags that cannot be written again"
    rule = type("Rule", (Immutable,), {"upstream": f"http://{os.environ['MLSERVE_REGISTRY']}", "tags": {}, "busy": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), rule)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", rule
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["s3", "gs", AZURE, "registry"])
def store(request, monkeypatch):
    "Each kind of store in turn, reached through its proxy"
    place = request.getfixturevalue(request.param)
    use(monkeypatch, place)
    yield place
    place.proxy.clear()


@pytest.fixture
def settings(stored_package, tmp_path):
    "Settings for a place, with a cache of the test's own"
    def make(uri, digest=stored_package.digest, **more):
        values = {"MLSERVE_PACKAGE": uri, "MLSERVE_PACKAGE_DIGEST": digest, "MLSERVE_CACHE": tmp_path / "cache", "MLSERVE_FETCH_SECONDS": 60, **more}
        return read_settings({k: str(v) for k, v in values.items() if v is not None})
    return make


@contextlib.contextmanager
def counted_s3(address):
    "A store that other machines reach, and what each asked of it: address of a client to [requests, bytes]"
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server
    app, asked = DomainDispatcherApplication(create_backend_app), {}

    def counted(environ, start_response):
        count = asked.setdefault(environ["REMOTE_ADDR"], [0, 0])

        def start(status, headers, *more):
            count[0] += 1
            count[1] += int(dict(headers).get("Content-Length", 0)) if environ["REQUEST_METHOD"] == "GET" else 0
            return start_response(status, headers, *more)
        return app(environ, start)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server(address, 0, counted, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"AWS_ENDPOINT_URL": f"http://{address}:{server.server_port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_DEFAULT_REGION": "us-east-1"}
    boto3.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"], aws_access_key_id="key", aws_secret_access_key="hunter2", region_name="us-east-1").create_bucket(Bucket="models")
    try:
        yield env, asked
    finally:
        server.shutdown()
        server.server_close()
