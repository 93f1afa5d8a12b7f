"""A registry, MLflow and a store are cut off, freeze and are slow: the exit code within the budget, and success on the same call when it is over."""
import os
import subprocess
import time
from contextlib import nullcontext, suppress
from functools import partial

import boto3
import pytest
from emulators import mlflow_server, use
from faulty_proxy import Proxy
from mlflow.store.artifact.s3_artifact_repo import _cached_get_s3_client
from servers import patience

from mlserve.errors import MlserveError
from mlserve.package.lock import digest_of
from mlserve.release import record
from mlserve.release.image.normalize import normalize
from mlserve.release.record import logged_package, upload
from mlserve.release.record.mlflow_store import environment
from mlserve.release.registry.client import Remote, attach, put_blob, put_manifest, reach_registry, read_reference, stream_blob
from mlserve.release.registry.image_reader import read_image
from mlserve.release.record.evidence import keep_evidence
from mlserve.release.run import open_run
from mlserve.release.spec import ReleaseSpec

BUDGET = 2  # seconds
OURS = 6  # seconds that a busy machine may take beside the waiting
FAULTS = {"cut": {"reset": True}, "frozen": {"frozen": True}, "slowed": {"delay": 0.2}}
KIND = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture(autouse=True)
def budget(monkeypatch):
    monkeypatch.setenv("MLSERVE_REMOTE_SECONDS", str(BUDGET))
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)


def ended(deed):
    "The exit code that a call comes to, what it says, and after how long"
    began = time.monotonic()
    try:
        deed()
        code, said = 0, ""
    except MlserveError as e:
        code, said = e.code, str(e)
    return code, said, time.monotonic() - began


def suffer(proxy, fault, spare, deed):
    "A call meets a fault after so many answers, and is made again without; what the first one said"
    proxy.spare = spare
    for name, value in FAULTS[fault].items():
        setattr(proxy, name, value)
    code, said, seconds = ended(deed)
    assert proxy.spare == 0, f"it never came to the fault, {proxy.spare} answers were left: {code} {said}"
    proxy.clear()
    with environment(MLSERVE_REMOTE_SECONDS="60"):
        again, why, _ = ended(deed)
    print(f"| {fault} | after {spare} answers | {code} | {seconds:.1f} | {again} |")
    assert code == (0 if fault == "slowed" else 6), (code, said)
    assert fault == "slowed" or seconds < patience(int(os.environ["MLSERVE_REMOTE_SECONDS"]) + OURS), seconds
    assert again == 0, why
    return said


@pytest.fixture(scope="module")
def mlflow(tracking):
    with Proxy(int(tracking.rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture
def store(mlflow, deeds, monkeypatch):
    "The address of MLflow behind a proxy; MLflow itself had set the variable to where the things of the test were made"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mlflow.port}")
    yield os.environ["MLFLOW_TRACKING_URI"]
    mlflow.clear()


@pytest.fixture(scope="module")
def logged(tracking, double):
    return logged_package.log_package(double, uri=tracking)


@pytest.fixture
def deeds(tracking, logged, double, tmp_path):
    "What a release does in MLflow, on things of this test's own: name → call, and the answers before the fault"
    name, book, image = f"cuts{time.monotonic_ns()}", tmp_path / "cuts.ipynb", "registry.test/cuts@sha256:" + "a" * 64
    book.write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    pair = record.record(f"{name}-known", logged, image, uri=tracking)
    record.mark(pair, "cpu", {"passed": True}, tracking)
    spec = ReleaseSpec(name="cuts", notebook=book, state=tmp_path / "state")
    return {
        "open": (2, lambda: open_run(spec)),
        "log": (4, lambda: logged_package.log_package(double)),
        "record": (4, lambda: record.record(name, logged, image)),
        "evidence": (1, lambda: keep_evidence(logged.run_id, tmp_path)),
        "promote": (9, lambda: record.promote(pair.name, pair.version)),
    }


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("point", ["open", "log", "record", "evidence", "promote"])
def test_R3_mlflow_goes_away(mlflow, store, deeds, point, fault):
    spare, deed = deeds[point]
    said = suffer(mlflow, fault, spare, deed)
    assert fault == "slowed" or store in said


def test_R3_an_object_store_that_mlflow_sends_its_clients_to_goes_away(s3, double, monkeypatch, tmp_path):
    "Nothing stands between, so boto3's patience counts, and its exceptions; and what can't be asked for is not missing"
    use(monkeypatch, s3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
    store = record.client()
    store.create_experiment("mlserve", artifact_location=f"s3://models/{time.monotonic_ns()}")
    logged = logged_package.log_package(double)
    (tmp_path / "check.json").write_text("{}")
    keep_evidence(logged.run_id, tmp_path)
    deeds = [lambda: logged_package.log_package(double), lambda: keep_evidence(logged.run_id, tmp_path),
             lambda: logged_package.fetch_package(logged, tmp_path / f"{time.monotonic_ns()}"),
             lambda: logged_package.artifact_hash(store, logged.run_id, "evidence/check.json")]
    for fault in FAULTS:
        for deed in deeds:
            _cached_get_s3_client.cache_clear()  # MLflow keeps its client for five minutes, with the budget that it was made with
            suffer(s3.proxy, fault, 0, deed)
    assert logged_package.artifact_hash(store, logged.run_id, "evidence/other.json") == "nothing"
    assert not boto3.DEFAULT_SESSION._session.get_default_client_config(), "a notebook's own clients are left alone"


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("spare", range(0, 40, 2))
def test_R3_mlflow_goes_away_anywhere_in_a_chain_of_calls(mlflow, store, deeds, spare, fault):
    suffer(mlflow, fault, spare, lambda: [deed() for _, deed in deeds.values()])


@pytest.fixture(scope="module")
def pushed():
    "A registry behind a proxy, and an image of a few bytes in it, by its digest"
    host = os.environ["MLSERVE_REGISTRY"]
    with Proxy(int(host.rpartition(":")[2]), host.rpartition(":")[0]) as proxy:
        remote = Remote(read_reference(f"127.0.0.1:{proxy.port}/cuts:1"))
        parts = {"config": put_blob(remote, b'{"architecture": "amd64", "os": "linux", "config": {}}') | {"mediaType": "application/vnd.oci.image.config.v1+json"},
                 "layers": [put_blob(remote, b"a layer") | {"mediaType": "application/vnd.oci.image.layer.v1.tar"}]}
        digest, _ = put_manifest(remote, {"schemaVersion": 2, "mediaType": KIND, **parts})
        yield proxy, f"127.0.0.1:{proxy.port}/cuts@{digest}"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("point", ["reach", "normalize", "attach", "read", "layer"])
def test_R1_a_registry_goes_away(pushed, point, fault):
    proxy, image = pushed

    def remote():
        return Remote(read_reference(image))
    subject = {"mediaType": KIND, "digest": image.partition("@")[2], "size": 1}
    spare, deed = {
        "reach": (0, lambda: reach_registry(image.partition("@")[0])),
        "normalize": (3, lambda: normalize(image, "1", time.monotonic_ns() % 10**9)),
        "attach": (2, lambda: attach(remote(), subject, "text/plain", f"a note at {time.monotonic_ns()}".encode())),
        "read": (1, lambda: read_image(read_reference(image))),
        "layer": (0, lambda: list(stream_blob(remote(), digest_of(b"a layer")))),
    }[point]
    said = suffer(proxy, fault, spare, deed)
    assert fault == "slowed" or "The registry 127.0.0.1" in said


@pytest.mark.parametrize("spare", [0, "reach", *(pytest.param(n, marks=pytest.mark.soak) for n in (2, 7, 13))])
@pytest.mark.parametrize("fault", FAULTS)
def test_R1_a_store_goes_away(s3, stored_package, monkeypatch, spare, fault):
    use(monkeypatch, s3)
    monkeypatch.setenv("MLSERVE_REMOTE_SECONDS", "60" if fault == "slowed" else "5")  # on a busy machine its client alone takes seconds to be loaded
    place = f"{s3.root}/cuts{time.monotonic_ns()}"
    deed = partial(upload.reach_store, place) if spare == "reach" else partial(upload.upload_package, stored_package, place)
    said = suffer(s3.proxy, fault, 0 if spare == "reach" else spare, deed)
    assert fault == "slowed" or s3.root in said
    assert fault == "slowed" or spare in (13, "reach") or "files." in said, said


@pytest.fixture
def small(tmp_path):
    "A file system of a megabyte"
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("fault, kind", [("full", "server"), ("full", "file"), ("read-only", "file"), pytest.param("read-only", "server", marks=pytest.mark.soak)])
def test_R2_an_artifact_store_takes_nothing_more(kind, fault, small, double, tmp_path, monkeypatch):
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow/artifacts").symlink_to(small)
    database = f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    with mlflow_server(tmp_path / "mlflow", database, 1) if kind == "server" else nullcontext(database) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        book = tmp_path / "train.ipynb"
        book.write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
        spec = ReleaseSpec(name="small", notebook=book, state=tmp_path / "state")
        run = open_run(spec)
        deeds = [partial(open_run, spec), partial(logged_package.log_package, double), run.keep]
        if fault == "full":
            with suppress(OSError), open(small / "rest", "wb") as rest:
                while True:
                    rest.write(bytes(4096))
                    rest.flush()
            (run.folder / "check.json").write_text(" " * 8192)
        else:
            (run.folder / "check.json").write_text("{}")
            subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        for deed in deeds:
            code, said, _ = ended(deed)
            assert code == {"file": 7, "server": 6}[kind] and uri in said, (code, said)
            assert kind == "file" or "its artifact store has room" in said
        (small / "rest").unlink(missing_ok=True) if fault == "full" else subprocess.run(["mount", "-o", "remount,rw", small], check=True)
        assert [ended(deed)[0] for deed in deeds] == [0, 0, 0]
