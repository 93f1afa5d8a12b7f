"""Where packages come from: every store, every fault on the way, and nothing served that was not released."""
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import ROOT, TESTS
from emulators import AZURE, NAMES, use

from mlserve.errors import IntegrityError, LocalResource, MlserveError, Refused, RemoteUnavailable
from mlserve.package.lock import digest_of
from mlserve.serving.delivery import object_store as remote
from mlserve.serving.delivery.cache import finished, unfinished
from mlserve.serving.delivery.resolver import open_package


def tree(path):
    "Every file below a folder, with its bytes"
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}


def left(cache):
    "What a failed delivery left, apart from the lock that replicas wait for"
    return [n for n in tree(cache) if not n.endswith(".lock") or n.endswith("package.lock")] if Path(cache).exists() else []


@pytest.fixture
def uri(store, stored_package):
    "The package in the store"
    if not hasattr(store, "uri"):
        store.uri = store.upload("tiny/1", stored_package.path)
    return store.uri


def test_every_store_gives_the_package_and_the_cache_gives_it_again(store, uri, stored_package, settings):
    events = []
    opened = open_package(settings(uri), lambda event, **fields: events.append((event, fields)))
    assert tree(opened.path) == tree(stored_package.path) and opened.digest == stored_package.digest
    assert events[-1][0] == "package_fetched" and events[-1][1]["bytes"] > 0
    before = store.proxy.connections
    assert open_package(settings(uri)) == opened and store.proxy.connections == before


def test_a_logged_model_by_its_id(registry, stored_package, settings, monkeypatch):
    use(monkeypatch, registry)
    registry.upload("by-id", stored_package.path)
    assert tree(open_package(settings(registry.ids["by-id"])).path) == tree(stored_package.path)


def test_a_read_only_cache_that_is_complete_serves(s3, stored_package, settings, tmp_path, monkeypatch):
    use(monkeypatch, s3)
    asked = settings(s3.upload("readonly", stored_package.path))
    open_package(asked)
    subprocess.run(["mount", "--bind", tmp_path / "cache", tmp_path / "cache"], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", tmp_path / "cache"], check=True)
        assert open_package(asked).digest == stored_package.digest
        with pytest.raises(LocalResource, match="cannot be written: Read-only") as e:
            open_package(settings(s3.upload("other", stored_package.path), digest_of(b"other")))
        assert "MLSERVE_CACHE" in e.value.mend
    finally:
        subprocess.run(["umount", tmp_path / "cache"], check=True)


# W1: cuts, slow stores, silence

def test_a_cut_at_any_offset_is_mended(store, uri, stored_package, settings, tmp_path):
    before = store.proxy.down
    open_package(settings(uri, MLSERVE_CACHE=tmp_path / "whole"))
    total, count = store.proxy.down - before, 24 if store.kind == "s3" else 8
    for n in range(count):
        store.proxy.cut = store.proxy.down + 1 + n * (total - 2) // (count - 1)
        opened = open_package(settings(uri, MLSERVE_CACHE=tmp_path / str(n)))
        assert store.proxy.cut is None, "the cut did not happen"
        assert tree(opened.path) == tree(stored_package.path)


def test_a_connection_that_is_always_reset_ends_with_the_budget(store, uri, settings, tmp_path):
    store.proxy.reset = True
    start = time.monotonic()
    with pytest.raises(RemoteUnavailable, match=r"could not be read within 1.5 s; \w+\."):
        open_package(settings(uri, MLSERVE_FETCH_SECONDS=1.5))
    assert time.monotonic() - start < 5 and not left(tmp_path / "cache")


def test_a_store_that_falls_silent_ends_with_the_budget(store, uri, settings):
    store.proxy.frozen = True
    with pytest.raises(RemoteUnavailable, match="within 1.5 s"):
        open_package(settings(uri, MLSERVE_FETCH_SECONDS=1.5))


def test_a_connection_that_nobody_answers_costs_a_try_and_not_the_delivery(store, uri, stored_package, settings):
    store.proxy.lost = 1
    assert open_package(settings(uri, MLSERVE_FETCH_SECONDS=20)).digest == stored_package.digest
    assert not store.proxy.lost


def test_slow_down_is_tried_again(store, uri, stored_package, settings):
    busy = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    store.proxy.answers = [busy, busy]
    assert open_package(settings(uri)).digest == stored_package.digest


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_the_store_is_not_tried_again(store, uri, settings, status):
    answer = f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    store.proxy.answers, before = [answer] * 30, store.proxy.connections
    with pytest.raises(RemoteUnavailable, match=f"answered {status}"):
        open_package(settings(uri, MLSERVE_FETCH_SECONDS=8))
    assert store.proxy.connections - before <= 3


def test_a_missing_object_is_named(s3, stored_package, settings, monkeypatch):
    use(monkeypatch, s3)
    with pytest.raises(RemoteUnavailable, match="models/nothing/package.lock.*404"):
        open_package(settings("s3://models/nothing"))
    s3.put("partly/package.lock", (stored_package.path / "package.lock").read_bytes())
    with pytest.raises(RemoteUnavailable, match="models/partly/.*404"):
        open_package(settings("s3://models/partly"))


def test_what_was_fetched_before_a_failure_is_not_fetched_again(s3, settings, monkeypatch, tmp_path):
    big = tmp_path / "big"
    big.mkdir()
    for n in range(4):
        (big / f"part{n}").write_bytes(os.urandom(3_000_000))
    lock = "".join(f"{p.name} {p.stat().st_size} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in sorted(big.iterdir())).encode()
    (big / "package.lock").write_bytes(lock)
    use(monkeypatch, s3)
    uri = s3.upload("big", big)
    s3.proxy.cut = s3.proxy.down + 9_500_000
    monkeypatch.setattr("mlserve.serving.delivery.download.is_final", lambda e: True)
    with pytest.raises(RemoteUnavailable):
        open_package(settings(uri, digest_of(lock)))
    have = sum(json.loads(line)[2] for line in (tmp_path / "cache/.partial").glob("*.parts").__next__().read_text().split("\n") if line)
    before = s3.proxy.down
    with pytest.raises(IntegrityError, match="MLmodel"):  # whole, but no model
        open_package(settings(uri, digest_of(lock)))
    assert have > 0 and s3.proxy.down - before < 12_000_000 - have + 100_000


# W3: bytes that differ

def damages(data, count):
    "Flipped bytes and truncations, spread over a file"
    for n in range(count):
        at = n * (len(data) - 1) // max(count - 1, 1)
        yield data[:at] + bytes([data[at] ^ (1 << n % 8)]) + data[at + 1:]
        if n % 2 == 0:
            yield data[:at]


COUNT = {"path": 0, "s3": 0, "gs": 0, "az": 0, "registry": 0, "cache": 0, "wire": 0}


def test_a_damaged_volume_is_refused(stored_package, settings, tmp_path):
    for name, data in tree(stored_package.path).items():
        for bad in damages(data, 14):
            folder = tmp_path / "volume"
            for other, good in tree(stored_package.path).items():
                (folder / other).parent.mkdir(parents=True, exist_ok=True)
                (folder / other).write_bytes(bad if other == name else good)
            with pytest.raises(IntegrityError, match=name.split("/")[-1]):
                open_package(settings(folder))
            COUNT["path"] += 1


@pytest.mark.parametrize("kind", ["s3", "gs", AZURE])
def test_a_damaged_object_is_refused(kind, request, stored_package, settings, tmp_path, monkeypatch):
    place = request.getfixturevalue(kind)
    use(monkeypatch, place)
    uri, count = place.upload("damaged", stored_package.path), {"s3": 2, "gs": 6, "az": 3}[kind]
    for name, data in tree(stored_package.path).items():
        for n, bad in enumerate(damages(data, count)):
            place.put(f"damaged/{name}", bad or data[:1])  # one of the emulators takes no empty object
            cache = tmp_path / f"{name}-{n}"
            with pytest.raises(IntegrityError):
                open_package(settings(uri, MLSERVE_CACHE=cache))
            assert not finished(cache, stored_package.digest).exists()
            COUNT[kind] += 1
        place.put(f"damaged/{name}", data)
    assert open_package(settings(uri)).digest == stored_package.digest


@pytest.mark.parametrize("kind", ["s3", "gs", AZURE])
def test_a_damaged_object_is_mended_by_uploading_again(kind, request, stored_package, settings, tmp_path, monkeypatch):
    "Of one size with the right one, so that only its hash tells them apart"
    from types import SimpleNamespace

    from mlserve.release.record.upload import place_of, upload_package
    place = request.getfixturevalue(kind)
    use(monkeypatch, place)
    uri = place_of(SimpleNamespace(delivery="store", store=f"{place.root}/mended"), stored_package.digest)
    assert upload_package(stored_package, uri) > 0
    for name, data in tree(stored_package.path).items():
        place.put(f"{uri.removeprefix(place.root + '/')}/{name}", bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(IntegrityError):
            open_package(settings(uri, MLSERVE_CACHE=tmp_path / name))
        assert upload_package(stored_package, uri) == len(data)
        assert tree(open_package(settings(uri, MLSERVE_CACHE=tmp_path / name)).path) == tree(stored_package.path)
    assert upload_package(stored_package, uri) == 0


@pytest.mark.parametrize("kind", ["s3", "gs", AZURE])
def test_an_upload_goes_where_the_environment_says_now(kind, request, monkeypatch):
    "A client that was made before is not used again"
    from mlserve.release.record.upload import reach_store
    place = request.getfixturevalue(kind)
    use(monkeypatch, place)
    reach_store(f"{place.root}/now")
    use(monkeypatch, place, port=9)
    monkeypatch.setenv("MLSERVE_REMOTE_SECONDS", "3")
    with pytest.raises(RemoteUnavailable):
        reach_store(f"{place.root}/now")


def test_missing_credentials_are_said(s3, stored_package, settings, monkeypatch):
    from mlserve.release.record.upload import reach_store
    use(monkeypatch, s3)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    for call in (lambda: open_package(settings("s3://models/tiny")), lambda: reach_store("s3://models/tiny")):
        with pytest.raises(RemoteUnavailable, match=r"found no credentials \(AWS_ACCESS_KEY_ID …\)"):
            call()


def test_a_damaged_registry_is_refused(registry, stored_package, settings, state, tmp_path, monkeypatch):
    use(monkeypatch, registry)
    uri = registry.upload("damaged", stored_package.path)
    folder = next(state.glob(f"mlflow/artifacts/**/{registry.ids['damaged'].split('/')[1]}/artifacts"))
    for name, data in tree(stored_package.path).items():
        for n, bad in enumerate(damages(data, 3)):
            (folder / name).write_bytes(bad)
            with pytest.raises(IntegrityError):
                open_package(settings(uri, MLSERVE_CACHE=tmp_path / f"{name}-{n}"))
            COUNT["registry"] += 1
        (folder / name).write_bytes(data)
    assert open_package(settings(uri)).digest == stored_package.digest


def test_bytes_flipped_on_the_wire_are_refused(store, uri, stored_package, settings, tmp_path):
    for name, data in tree(stored_package.path).items():
        middle = len(data) // 2
        store.proxy.flip = (data[middle:middle + 12], bytes(b ^ 1 for b in data[middle:middle + 12]))
        with pytest.raises(IntegrityError):
            open_package(settings(uri, MLSERVE_CACHE=tmp_path / name))
        store.proxy.flip = None
        assert open_package(settings(uri, MLSERVE_CACHE=tmp_path / name)).digest == stored_package.digest  # the next start is right
        COUNT["wire"] += 1


def test_a_damaged_cache_is_fetched_again(gs, stored_package, settings, monkeypatch):
    use(monkeypatch, gs)
    asked = settings(gs.upload("healed", stored_package.path))
    opened = open_package(asked)
    for name, data in tree(stored_package.path).items():
        for bad in damages(data, 2):
            (opened.path / name).write_bytes(bad)
            events = []
            assert tree(open_package(asked, lambda event, **fields: events.append(event)).path) == tree(stored_package.path)
            assert "package_damaged" in events
            COUNT["cache"] += 1


def test_more_than_two_hundred_damages_were_refused():
    "Runs after the tests above, in this file's order"
    assert sum(COUNT.values()) >= 200 and all(count for kind, count in COUNT.items() if kind != "az"), COUNT


def test_an_object_replaced_while_it_is_read_is_refused(s3, settings, monkeypatch, tmp_path):
    data = os.urandom(20_000_000)
    lock = f"model {len(data)} {hashlib.sha256(data).hexdigest()}\n".encode()
    s3.put("swapped/package.lock", lock)
    s3.put("swapped/model", data)
    use(monkeypatch, s3)
    monkeypatch.setattr(remote.ObjectStore, "part", 500_000)
    s3.proxy.rate, before = 2_000_000, s3.proxy.down

    def swap():
        while s3.proxy.down - before < 5_000_000:
            time.sleep(0.01)
        s3.put("swapped/model", data[::-1])

    thread = threading.Thread(target=swap)
    thread.start()
    with pytest.raises(IntegrityError, match="model' .*is not what its lock says: expected"):  # its bytes, or its end if moto was asked while it wrote
        open_package(settings("s3://models/swapped", digest_of(lock)))
    thread.join()
    assert not left(tmp_path / "cache")


# W5, W7: what a store says is not believed

HOSTILE = ["../escape", "/tmp/mlserve-escape", "a/../../escape", "a//b", "./a", "a\\b", "a\0b", "NUL", "com1.txt", "package.lock", "x" * 256,
           "registered_model_meta", "a\rb", "..", "a/..", "\x7f"]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_name_is_refused_before_anything_is_written(s3, settings, tmp_path, monkeypatch, name):
    use(monkeypatch, s3)
    lock = f"{name} 5 {'0' * 64}\n".encode()
    s3.put("hostile/package.lock", lock)
    with pytest.raises(Refused, match="plain paths"):
        open_package(settings("s3://models/hostile", digest_of(lock)))
    assert not left(tmp_path / "cache") and not Path("/tmp/mlserve-escape").exists() and not (tmp_path / "escape").exists()


@pytest.mark.parametrize("lock, why", [
    (b"".join(b"f%d 0 %s\n" % (n, b"0" * 64) for n in range(10_001)), "10001 files"),
    (b"a 999999999999 " + b"0" * 64 + b"\n", "999999999999 bytes"),
    (b"".join(b"f%d 0 %s\n" % (n, b"0" * 64) for n in range(70_000)), "larger than"),
    (b"a 1 " + b"0" * 64 + b"\n" + b"a/b 1 " + b"0" * 64 + b"\n", "as a folder"),
    (b"a 1 " + b"0" * 64 + b"\n" + b"a 1 " + b"0" * 64 + b"\n", "twice"),
], ids=["entries", "size", "lock", "prefix", "twice"])
def test_a_lock_over_the_limits_is_refused(s3, settings, tmp_path, monkeypatch, lock, why):
    use(monkeypatch, s3)
    s3.put("huge/package.lock", lock)
    with pytest.raises(Refused, match=why):
        open_package(settings("s3://models/huge", digest_of(lock)))
    assert not left(tmp_path / "cache")


@pytest.mark.parametrize("uri", ["s3://models/tiny", "gs://models/tiny", "az://models/tiny", "models:/tiny/1"])
def test_a_remote_package_without_a_digest_is_refused(settings, uri):
    with pytest.raises(Refused, match="without a digest"):
        open_package(settings(uri, digest=None))


def test_a_file_that_the_environment_names_in_vain_is_this_machines_fault_and_no_404(s3, stored_package, settings, monkeypatch):
    asked = settings(s3.upload("told", stored_package.path))
    use(monkeypatch, s3)
    monkeypatch.setenv("AWS_CA_BUNDLE", "company.pem")
    with pytest.raises(LocalResource, match="names for the store .* unset AWS_CA_BUNDLE"):
        open_package(asked)


# W9: requests to where nobody meant to send them

class Metadata:
    "A fake metadata service that counts who asks"

    def __enter__(self):
        outer, self.hits = self, 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.hits += 1
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"credentials")
            do_HEAD = do_PUT = do_GET

            def log_message(self, *_): pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def redirect(self, status=307):
        "An answer that sends the client here"
        return (f"HTTP/1.1 {status} Moved\r\nLocation: http://{self.url}/latest/meta-data\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").encode()


def test_no_address_of_a_package_reaches_another_host(settings, s3, monkeypatch):
    use(monkeypatch, s3)
    with Metadata() as metadata:
        port = metadata.url.split(":")[1]
        for place in [f"http://{metadata.url}/p", f"https://{metadata.url}/p", f"HTTP://{metadata.url}/p", "file:///etc/passwd", f"ftp://{metadata.url}/p",
                      f"s3://{metadata.url}/p", f"s3://localhost:{port}/p", f"s3://user:pass@{metadata.url}/p", f"gs://{metadata.url}/p",
                      f"az://{metadata.url}/p", f"abfs://models@{metadata.url}/p", f"s3://[::ffff:127.0.0.1]:{port}/p", "s3://169.254.169.254/latest/meta-data",
                      f"models://{metadata.url}/tiny/1", "models:/tiny@production", "models:/tiny/latest", "github://a:b@c/d", "memory://a/b",
                      f"simplecache::http://{metadata.url}/p", f"s3://models/p?endpoint={metadata.url}", "data:,x", f"reference://{metadata.url}"]:
            with pytest.raises(Refused):
                open_package(settings(place))
        assert metadata.hits == 0


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_of_the_store_is_not_followed(store, uri, settings, status):
    with Metadata() as metadata:
        store.proxy.answers = [metadata.redirect(status)] * 30
        with pytest.raises(Refused, match="a redirect"):
            open_package(settings(uri))
        assert metadata.hits == 0


def test_the_metadata_service_of_the_tests_would_be_reached(s3, stored_package, settings, monkeypatch):
    "Without the guard, the library follows: so the test above can fail"
    use(monkeypatch, s3)

    async def follow(session, context, params): pass
    monkeypatch.setattr(remote, "_stop", follow)
    with Metadata() as metadata:
        s3.proxy.answers = [metadata.redirect()] * 30
        with pytest.raises(MlserveError):
            open_package(settings(s3.upload("followed", stored_package.path), MLSERVE_FETCH_SECONDS=15))
        assert metadata.hits > 0


def test_a_registry_may_not_name_a_host(registry, settings, monkeypatch):
    use(monkeypatch, registry)
    with Metadata() as metadata:
        for root in [f"http://{metadata.url}/p", f"mlflow-artifacts://{metadata.url}/p", f"s3://{metadata.url}/p", "file:///etc", "/etc"]:
            body = json.dumps({"artifact_uri": root}).encode()
            registry.proxy.answers = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)]
            with pytest.raises(Refused):
                open_package(settings("models:/tiny/1"))
        assert metadata.hits == 0


# W2, W4, W10: processes that are killed, that race, and that find no room

class Children:
    "A process that opens packages in forks of itself"

    def __init__(self, env, log):
        self.log = log
        self.process = subprocess.Popen([sys.executable, TESTS / "fetch_package.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**{k: v for k, v in os.environ.items() if not k.startswith(NAMES)}, **env}, cwd=ROOT)
        assert self.process.stdout.readline() == "ready\n"

    def start(self, env, times=1, stop=False):
        self.log.write_text("")
        self.process.stdin.write(json.dumps({"env": {k: str(v) for k, v in env.items()}, "log": str(self.log), "times": times, "stop": stop}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def codes(self):
        return json.loads(self.process.stdout.readline())

    def run(self, env, times=1):
        self.start(env, times)
        return self.codes()

    def traced(self, env, inject):
        "Run under strace, with a fault planted in its system calls"
        [pid] = self.start(env, stop=True)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)
        call = inject.split(":")[0]
        tracer = subprocess.Popen(["strace", "-f", "-p", str(pid), "-e", f"trace={call}", "-e", f"inject={inject}"], stderr=subprocess.PIPE, text=True)
        assert "attached" in tracer.stderr.readline()
        os.kill(pid, 18)
        [code] = self.codes()
        return code, tracer.communicate(timeout=30)[1]


@pytest.fixture(scope="module")
def children(gs, tmp_path_factory):
    made = Children(gs.env(), tmp_path_factory.mktemp("children") / "log")
    yield made
    made.process.stdin.close()
    made.process.wait(20)


def asked_for(uri, digest, cache, **more):
    return {"MLSERVE_PACKAGE": uri, "MLSERVE_PACKAGE_DIGEST": digest, "MLSERVE_CACHE": cache, "MLSERVE_FETCH_SECONDS": 30, **more}


@pytest.mark.parametrize("call", ["pwrite64", "write", "fsync", "rename", "ftruncate", "mkdir", "unlink"])
def test_a_kill_at_any_write_leaves_nothing_that_is_not_whole(gs, stored_package, children, tmp_path, call):
    gs.proxy.clear()
    uri, killed = gs.upload("killed", stored_package.path), 0
    for n in range(1, 30):
        cache = tmp_path / str(n)
        code, _ = children.traced(asked_for(uri, stored_package.digest, cache), f"{call}:signal=KILL:when={n}")
        whole = finished(cache, stored_package.digest)
        if whole.exists():
            assert tree(whole) == tree(stored_package.path)
        if code == 0:
            break
        assert code == -9
        killed += 1
        assert children.run(asked_for(uri, stored_package.digest, cache)) == [0]
        assert tree(whole) == tree(stored_package.path) and not unfinished(cache, stored_package.digest).exists()
    assert code == 0
    assert killed or call in ("ftruncate", "unlink"), f"no {call} was made"


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(s3, tmp_path, settings, monkeypatch):
    use(monkeypatch, s3)
    lock = f"model 12000000 {'0' * 64}\n".encode()
    s3.put("large/package.lock", lock)
    cache = tmp_path / "small"
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", cache], check=True)
    try:
        with pytest.raises(LocalResource, match=r"need 12000000 bytes, have \d+"):
            open_package(settings("s3://models/large", digest_of(lock), MLSERVE_CACHE=cache))
        assert not left(cache)
    finally:
        subprocess.run(["umount", cache], check=True)


def test_a_disk_that_fills_meanwhile_is_left_clean(gs, stored_package, children, tmp_path):
    gs.proxy.clear()
    code, _ = children.traced(asked_for(gs.upload("full", stored_package.path), stored_package.digest, tmp_path / "cache"), "pwrite64:error=ENOSPC:when=1")
    assert code == 7 and "need" in children.log.read_text() and not left(tmp_path / "cache")


def test_eight_replicas_make_one_download(gs, stored_package, children, tmp_path):
    gs.proxy.clear()
    uri = gs.upload("raced", stored_package.path)
    before = gs.proxy.down
    assert children.run(asked_for(uri, stored_package.digest, tmp_path / "one")) == [0]
    once, before = gs.proxy.down - before, gs.proxy.down
    gs.proxy.delay = 0.05
    assert children.run(asked_for(uri, stored_package.digest, tmp_path / "cache"), times=8) == [0] * 8
    assert gs.proxy.down - before <= once * 1.1
    events = [json.loads(line)["event"] for line in children.log.read_text().splitlines()]
    assert events.count("package_fetched") == 1
    assert tree(finished(tmp_path / "cache", stored_package.digest)) == tree(stored_package.path)


def test_a_cache_that_cannot_be_written_is_said(gs, stored_package, children, tmp_path):
    (tmp_path / "file").write_text("")
    assert children.run(asked_for("gs://models/raced", stored_package.digest, tmp_path / "file/cache")) == [7]
    assert "MLSERVE_CACHE" in children.log.read_text()


def test_no_credential_is_ever_printed(s3, stored_package, children, tmp_path):
    "Every failure of a delivery, with secrets in the environment and in the addresses"
    secret, said = "SENTINEL-b1946ac9", ""
    s3.proxy.clear()
    env = {"AWS_ACCESS_KEY_ID": secret, "AWS_SECRET_ACCESS_KEY": secret, "AWS_SESSION_TOKEN": secret, "MLFLOW_TRACKING_PASSWORD": secret,
           "MLFLOW_TRACKING_USERNAME": "user", "MLFLOW_TRACKING_URI": f"http://user:{secret}@127.0.0.1:9", "AWS_DEFAULT_REGION": "us-east-1",
           "AZURE_STORAGE_CONNECTION_STRING": f"AccountName={secret};AccountKey={secret}=;BlobEndpoint=http://127.0.0.1:9/{secret}?sig={secret}"}
    moved = f"HTTP/1.1 302 Moved\r\nLocation: http://127.0.0.1:9/{secret}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    denied = f"HTTP/1.1 403 No\r\nContent-Length: {len(secret)}\r\nConnection: close\r\n\r\n{secret}".encode()
    for place, answers, endpoint, code in [
            ("s3://models/tiny", [], "http://127.0.0.1:9", 6), ("s3://models/tiny", [moved] * 9, None, 8), ("s3://models/tiny", [denied] * 9, None, 6),
            (f"s3://user:{secret}@models/tiny", [], None, 8), (f"s3://models/tiny?sig={secret}", [], None, 8), (f"https://user:{secret}@host/p", [], None, 8),
            (f"models:/tiny@{secret}", [], None, 8), ("models:/tiny/1", [], None, 6), ("az://models/tiny", [], None, None), ("gs://models/none", [], None, 6)]:
        s3.proxy.answers = list(answers)
        asked = asked_for(place, stored_package.digest, tmp_path / "cache", MLSERVE_FETCH_SECONDS=20 if answers or place.startswith("gs:") else 1, **env)
        got = children.run({**asked, "AWS_ENDPOINT_URL": endpoint or s3.env()["AWS_ENDPOINT_URL"]})
        assert got == [code] if code else got[0] in (6, 7), (place.split(":")[0], got, children.log.read_text().replace(secret, "***"))
        said += children.log.read_text()
    assert "could not be read" in said and secret not in said


def test_a_server_that_is_given_another_digest_is_never_ready(s3, stored_package, tmp_path):
    from commands import last_json, run
    s3.proxy.clear()
    uri = s3.upload("server", stored_package.path)
    for digest, more, code in [("sha256:" + "0" * 64, {}, 5), (stored_package.digest, {"MLSERVE_PACKAGE": "s3://models/none"}, 6),
                               (stored_package.digest, {"MLSERVE_CACHE": "/dev/null/cache"}, 7), (stored_package.digest, {"MLSERVE_PACKAGE": "models:/tiny@live"}, 8)]:
        env = {**s3.env(), **asked_for(uri, digest, tmp_path / "cache", MLSERVE_PORT=0, MLSERVE_HOST="127.0.0.1"), **more}
        done = run(sys.executable, "-m", "mlserve.serving.server", env={k: str(v) for k, v in env.items()}, timeout=60)
        assert done.returncode == last_json(done.stderr)["code"] == code and '"ready"' not in done.stdout + done.stderr


# W12: answers without end, and connections that never last

@pytest.fixture
def endless():
    "A server of this machine that answers everything without end, with a length or without"
    class Endless(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        sent = 0

        def do_GET(self):
            self.send_response(206 if "Range" in self.headers else 200)
            if self.server.announced:
                self.send_header("Content-Length", str(2**40))
            self.send_header("Content-Range", f"bytes 0-{2**40 - 1}/{2**40}")
            self.send_header("ETag", '"1"')
            self.end_headers()
            while True:
                try:
                    self.wfile.write(b" " * 2**16)
                except OSError:
                    self.close_connection = True
                    return
                Endless.sent += 2**16
        do_HEAD = do_POST = do_GET

        def log_message(self, *args):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.daemon_threads, server.announced, server.counter = True, True, Endless
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("announced", [True, False])
def test_an_answer_without_end_stops_at_its_limit(store, uri, settings, endless, announced, tmp_path, monkeypatch):
    "The lock of a store, and the registry's own answer: little is read, and memory is flat"
    import resource
    endless.announced = announced
    open_package(settings(uri))  # whatever is imported late is so
    use(monkeypatch, store, port=endless.server_address[1])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises((Refused, IntegrityError, RemoteUnavailable)) as e:
        open_package(settings(uri, MLSERVE_FETCH_SECONDS=20, MLSERVE_CACHE=tmp_path / "other"))
    assert e.value.code in (5, 8), e.value
    assert time.monotonic() - start < 15
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 100e6
    assert endless.counter.sent < 200e6


def test_a_download_that_is_cut_all_the_time_goes_on_from_where_it_was(store, uri, stored_package, settings, tmp_path):
    "Every connection ends after some thousand bytes of its answer: whoever begins again never ends; on a machine that is busy each costs its time"
    store.proxy.every = 2500
    try:
        opened = open_package(settings(uri, MLSERVE_FETCH_SECONDS=60))
    finally:
        store.proxy.every = None
    assert tree(opened.path) == tree(stored_package.path)
