"""What lies beside an image, and what `verify` and `diff` say of it: one real release, damaged in one place after another."""
import base64
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import time
from pathlib import Path

import httpx
import pytest

from commands import ROOT, last_json, mlserve
from mlserve import errors
from mlserve.package.lock import digest_of
from mlserve.release.supply_chain import provenance
from mlserve.release import record
from mlserve.release.registry.client import Remote, _index, _tagged, attach, blob, manifest, put_blob, put_manifest, read_reference, referrers
from mlserve.release.registry.image_reader import read_image
from mlserve.release.supply_chain.sbom import read_sbom, write_sbom
from mlserve.release.supply_chain.links import chain
from mlserve.release.supply_chain.verify import verify
from faulty_proxy import Proxy

EDGE = ROOT / "tests/notebooks/edge.ipynb"


@pytest.fixture(scope="session")
def edge(environment):
    "A small model from notebook to checked pair, with nothing beside the image but what a release puts there"
    done = mlserve("release", EDGE, "--json", env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def own_registry(tmp_path_factory):
    "A registry of the tests' own, whose files may be damaged: its address and its folder"
    folder = tmp_path_factory.mktemp("registry")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (folder / "config.yml").write_text(f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}, delete: {{enabled: true}}}}\n"
                                       f"http: {{addr: 127.0.0.1:{port}}}\n")
    process = subprocess.Popen(["docker-registry", "serve", folder / "config.yml"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(80):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/v2/", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.25)
        yield f"127.0.0.1:{port}", folder / "data"
    finally:
        process.terminate()
        process.wait(20)


def copy(image, host, name):
    "Copy an image and what lies beside it to another registry"
    source = Remote(read_reference(image))
    found = read_image(image, source)
    target = Remote(read_reference(f"{host}/{name}@{found.digest}"))

    def one(digest):
        data, kind = manifest(source, digest)
        value = json.loads(data)
        for d in [value["config"], *value["layers"]]:
            put_blob(target, blob(source, d["digest"]))
        target.ask("PUT", f"manifests/{digest}", ok=(201,), content=data, headers={"Content-Type": kind})
    one(found.digest)
    listed = referrers(source, found.digest)
    for d in listed:
        one(d["digest"])
    put_manifest(target, {"schemaVersion": 2, "mediaType": _index, "manifests": listed}, found.digest.replace(":", "-"))
    return f"{host}/{name}@{found.digest}"


@pytest.fixture(scope="session")
def copied(edge, own_registry):
    return copy(edge["image"], own_registry[0], "edge")


def retar(data, change):
    "A layer with its members changed: `change(members)` gets and gives {name: (TarInfo, bytes or None)}"
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as old:
        members = {m.name.lstrip("./"): (m, old.extractfile(m).read() if m.isfile() else None) for m in old}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as new:
        for info, content in change(members).values():
            if content is not None:
                info.size = len(content)
            new.addfile(info, io.BytesIO(content) if content is not None else None)
    return out.getvalue()


def planted(image, layer=None, change=None, config=None):
    "Push an image that differs from another in one layer (counted from the end) or in its configuration"
    reference = read_reference(image)
    remote = Remote(reference)
    found = read_image(image, remote)
    value, settings = json.loads(json.dumps(found.manifest)), json.loads(json.dumps(found.config))
    if change:
        plain = retar(blob(remote, value["layers"][layer]["digest"]), change)
        settings["rootfs"]["diff_ids"][layer] = digest_of(plain)
        value["layers"][layer] |= put_blob(remote, gzip.compress(plain, 1, mtime=0))
    if config:
        config(settings)
    value["config"] |= put_blob(remote, json.dumps(settings).encode())
    digest, _ = put_manifest(remote, value)
    return f"{reference.host}/{reference.repository}@{digest}"


def adopted(image, edge, tracking, like, **tags):
    "All that somebody with every password could do to make a planted image look released: new documents, new version"
    remote = Remote(read_reference(like))
    new = read_image(image)
    bill, origin = provenance.confirm_attached(like, {k: next(d for d in record.read_pair("edge", edge["version"], tracking).tags.items() if d[0] == f"mlserve.{k}")[1] for k in provenance.kinds})
    where = f"{new.reference.host}/{new.reference.repository}@{new.digest}"
    laid = provenance.lay(new, remote, write_sbom(type(bill)(**(vars(bill) | {"image": where}))), provenance.write_provenance(type(origin)(**(vars(origin) | {"image": where})), bill.version))
    pair = record.read_pair("edge", edge["version"], tracking)
    more = {k: v for k, v in pair.tags.items() if k not in ("mlserve.image", "mlserve.status") and not k.startswith("mlserve.check.")}
    logged = record.Logged(pair.run_id, pair.model_id, pair.package)
    return record.record("edge", logged, where, {**more, **{f"mlserve.{k}": v for k, v in laid.items()}, **tags}, tracking)


def edit(pattern, data):
    "A change of the one member that a pattern names"
    def change(members):
        [name] = [n for n in members if re.search(pattern, n)]
        info, content = members[name]
        return members | {name: (info, data(content))}
    return change


def extra(name, content):
    "A change that adds a file"
    def change(members):
        return members | {name: (tarfile.TarInfo(name), content)}
    return change


def forged(members):
    "A changed module, with the list of its distribution and the head of its byte code changed to match"
    [module] = [n for n in members if n.endswith("site-packages/idna/core.py")]
    [listing] = [n for n in members if re.search(r"site-packages/idna-[\d.]+\.dist-info/RECORD$", n)]
    content = members[module][1] + b"\n# forged\n"
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
    rows = re.sub(rb"idna/core\.py,sha256=[^,]+,\d+", b"idna/core.py,sha256=" + digest + b"," + str(len(content)).encode(), members[listing][1])
    [compiled] = [n for n in members if n.endswith("site-packages/idna/__pycache__/core.cpython-311.pyc")]
    head = members[compiled][1][:8] + importlib.util.source_hash(content)
    return members | {module: (members[module][0], content), listing: (members[listing][0], rows), compiled: (members[compiled][0], head + members[compiled][1][16:])}


def labelled(config):
    config["config"]["Labels"]["io.mlserve.lock"] = "sha256:" + "0" * 64


def preloading(config):
    config["config"]["Env"].append("LD_PRELOAD=/tmp/x.so")


def as_root(config):
    config["config"]["User"] = "0:0"


def flip(content):
    return content[:len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1:]


WHEELS, WEIGHTS, CODE = -4, -3, -1  # layers, counted from the end
PLANTS = {  # what is done to which layer, and the first link that must break
    "a byte of the weights": (WEIGHTS, edit(r"package/model\.onnx$", flip), None, "package", "model.onnx"),
    "a file beside the weights": (WEIGHTS, extra("models/package/handler.py", b"import os\n"), None, "package", "handler.py"),
    "a byte of a wheel's file": (WHEELS, edit(r"site-packages/idna/core\.py$", flip), None, "wheels", "idna/core.py"),
    "a wheel's file and its list": (WHEELS, forged, None, "wheels", "idna installed"),
    "a file that no wheel has": (WHEELS, extra("opt/venv/lib/python3.11/site-packages/evil.pth", b"import evil\n"), None, "wheels", "evil.pth"),
    "old byte code": (WHEELS, edit(r"site-packages/idna/__pycache__/core\.cpython-311\.pyc$", lambda c: c[:8] + bytes(8) + c[16:]), None, "wheels", "core.cpython-311.pyc"),
    "a module of the server": (CODE, edit(r"mlserve/serving/http/app\.py$", lambda c: c + b"\n"), None, "code", "mlserve/serving/http/app.py"),
    "a file of the system": (CODE, extra("etc/ld.so.preload", b"/tmp/x.so\n"), None, "base", "etc/ld.so.preload"),
    "a label": (None, None, labelled, "labels", "io.mlserve.lock"),
    "a variable": (None, None, preloading, "dockerfile", "LD_PRELOAD"),
    "the user": (None, None, as_root, "dockerfile", "user"),
}


def broken(result):
    return {l["name"]: l for l in result["links"] if l["ok"] is False}


@pytest.fixture
def once(monkeypatch, session={}):
    "Layers are read once for all tests that damage none of them in the registry: a digest names the same bytes each time"
    from mlserve.release.supply_chain import links, verify as room
    read = room.read_layer

    def remembered(remote, descriptor, keep=re.compile("$^")):
        key = descriptor["digest"], keep.pattern
        if key not in session:
            session[key] = read(remote, descriptor, keep)
        return session[key]
    for each in (links, room):
        monkeypatch.setattr(each, "read_layer", remembered)


def test_a_release_is_whole(edge, environment):
    done = mlserve("verify", edge["image"], "--json", env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["broken"] == [] and result["version"] == edge["version"]
    assert [l["name"] for l in result["links"]] == list(chain) and all(l["ok"] and l["looked"] for l in result["links"])
    assert next(l for l in result["links"] if l["name"] == "wheels")["looked"] > 1000


def test_a_copy_in_another_registry_is_whole(copied, tracking):
    assert verify(copied, tracking)["broken"] == []


def test_a_tag_is_refused(edge, environment):
    done = mlserve("verify", edge["image"].partition("@")[0] + ":latest", env=environment)
    assert done.returncode == 2 and "names no digest" in last_json(done.stderr)["error"]


@pytest.mark.parametrize("what", PLANTS)
def test_a_planted_break_is_found_and_named(once, copied, edge, tracking, what):
    "Whoever planted it also wrote new documents and a new version around it; the link is named all the same"
    layer, change, config, name, where = PLANTS[what]
    image = planted(copied, layer, change, config)
    adopted(image, edge, tracking, copied)
    result = verify(image, tracking)
    assert result["broken"][0] == name and where in broken(result)[name]["where"], result["broken"]
    allowed = {"package": {"package", "sbom", "labels"}, "code": {"code", "labels"}}.get(name, {name})
    assert set(result["broken"]) <= allowed, broken(result)


def test_a_planted_image_without_documents_or_version(copied, environment):
    "The same as a user meets it: exit 5, the first link named, the others listed"
    image = planted(copied, WEIGHTS, edit(r"package/model\.onnx$", lambda content: content + b"\0"))
    done = mlserve("verify", image, "--json", env=environment)
    assert done.returncode == 5, done.stderr
    assert json.loads(done.stdout)["broken"][0] == "package"
    last = last_json(done.stderr)
    assert last["code"] == 5 and "the link package is broken" in last["error"] and "record" in last["error"]
    assert "BROKEN" in mlserve("verify", image, env=environment).stdout


@pytest.mark.parametrize("tag", ["package", "lock", "base", "notebook", "sbom", "provenance", "source"])
def test_a_changed_tag_of_the_record_is_the_records(once, copied, edge, tracking, tag):
    from mlflow import MlflowClient
    client, key = MlflowClient(tracking_uri=tracking), f"mlserve.{tag}"
    before = client.get_model_version("edge", edge["version"]).tags[key]
    client.set_model_version_tag("edge", edge["version"], key, "sha256:" + "0" * 64)
    try:
        result = verify(copied, tracking)
        assert result["broken"] == ["record"] and broken(result)["record"]["where"] == f"tag {key}"
    finally:
        client.set_model_version_tag("edge", edge["version"], key, before)
    assert verify(copied, tracking)["ok"]


def test_another_notebook_among_the_evidence(once, copied, edge, tracking, tmp_path):
    from mlflow import MlflowClient
    client = MlflowClient(tracking_uri=tracking)
    kept = Path(client.download_artifacts(edge["run"], "evidence/edge.ipynb", str(tmp_path)))
    text = kept.read_text()
    try:
        kept.write_text(text.replace("uniform(-1, 1", "uniform(-2, 2"))
        client.log_artifact(edge["run"], str(kept), "evidence")
        assert verify(copied, tracking)["broken"] == ["notebook"]
    finally:
        kept.write_text(text)
        client.log_artifact(edge["run"], str(kept), "evidence")
    assert verify(copied, tracking)["ok"]


def stored(own_registry, digest):
    hexa = digest.removeprefix("sha256:")
    return own_registry[1] / f"docker/registry/v2/blobs/sha256/{hexa[:2]}/{hexa}/data"


@pytest.mark.parametrize("layer", [0, -1])
def test_a_damaged_layer_in_the_registry(copied, own_registry, tracking, environment, layer):
    "One bit on the registry's disk: the layer is named, and nothing is said of what was in it"
    path = stored(own_registry, read_image(copied).manifest["layers"][layer]["digest"])
    data = path.read_bytes()
    path.write_bytes(flip(data))
    try:
        done = mlserve("verify", copied, "--json", env=environment)
    finally:
        path.write_bytes(data)
    result = json.loads(done.stdout)
    assert done.returncode == 5 and result["broken"] == ["layers"], done.stderr
    assert re.match(r"layer \d of \d", broken(result)["layers"]["where"]) and broken(result)["layers"]["found"].startswith("sha256:")
    assert next(l for l in result["links"] if l["name"] == "package")["ok"] is None


def test_a_damaged_manifest_in_the_registry(copied, own_registry, tracking):
    path = stored(own_registry, copied.partition("@")[2])
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"schemaVersion":', b'"schemaVersion": '))
    try:
        assert verify(copied, tracking)["broken"] == ["layers"]
    finally:
        path.write_bytes(data)


def test_a_registry_that_is_away_is_no_finding(edge, environment):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        image = edge["image"].replace(edge["image"].split("/")[0], f"127.0.0.1:{s.getsockname()[1]}")
    done = mlserve("verify", image, env=environment)
    assert done.returncode == 6 and done.stdout == ""


def attached(edge, tracking):
    tags = record.read_pair("edge", edge["version"], tracking).tags
    return {k: tags[f"mlserve.{k}"] for k in provenance.kinds}


def test_what_lies_beside_the_image(edge, tracking):
    "Standard readers find both documents, and they say what is true"
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    remote = Remote(read_reference(edge["image"]))
    digest = edge["image"].partition("@")[2]
    kinds = {d["artifactType"]: d["digest"] for d in referrers(remote, digest)}
    assert kinds == {provenance.kinds[k]: v for k, v in attached(edge, tracking).items()}
    index = json.loads(remote.ask("GET", f"manifests/{digest.replace(':', '-')}", headers={"Accept": _index}).content)
    assert {m["digest"] for m in index["manifests"]} == set(kinds.values())
    docs = {k: provenance.read_attached(remote, v) for k, v in attached(edge, tracking).items()}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(docs["sbom"].data.decode()) is None
    bill, statement = read_sbom(docs["sbom"].data), json.loads(docs["provenance"].data)
    assert {"onnxruntime", "numpy", "fastapi"} <= {w.name for w in bill.wheels} and "torch" not in {w.name for w in bill.wheels}
    assert "libc6" in bill.debian and "model.onnx" in bill.weights and "mlserve/serving/server.py" in bill.code
    assert statement["_type"] == "https://in-toto.io/Statement/v1" and statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert statement["subject"][0]["digest"]["sha256"] == digest.removeprefix("sha256:")
    assert statement["predicate"]["mlserve_slsaBuildLevel"] == 1 and statement["predicate"]["runDetails"]["builder"]["id"].endswith("unhosted")
    names = {r["name"] for r in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert {"base", "package", "server", "executed", "notebook", "onnxruntime"} <= names


def test_the_labels(edge):
    labels = read_image(edge["image"]).labels
    freeze = dict(p.split("==") for p in labels["io.mlserve.freeze"].split())
    assert "onnxruntime" in freeze and "torch" not in freeze
    assert re.fullmatch("sha256:[0-9a-f]{64} model.onnx", labels["io.mlserve.weights"])
    for key in ("package", "lock", "code", "dockerfile"):
        assert re.fullmatch("sha256:[0-9a-f]{64}", labels[f"io.mlserve.{key}"]), key
    assert labels["org.opencontainers.image.base.digest"].startswith("sha256:") and re.fullmatch("[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])
    assert not any("cuda" in k for k in labels) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", labels["org.opencontainers.image.created"])
    text = json.dumps(labels)
    assert edge["run"] not in text and "m-" + edge["run"] not in text and str(ROOT) not in text


def confirm_fails(image, docs, said):
    with pytest.raises(errors.IntegrityError, match=said) as e:
        provenance.confirm_attached(image, docs)
    assert e.value.code == 5


def test_a_document_that_is_missing_stale_or_of_another_image(copied, edge, tracking, own_registry):
    "Before the record: each of them is refused, and the untouched ones pass"
    docs = attached(edge, tracking)
    remote = Remote(read_reference(copied))
    provenance.confirm_attached(copied, docs)
    confirm_fails(copied, docs | {"sbom": "sha256:" + "0" * 64}, "is not listed beside")
    other = planted(copied, config=labelled)
    confirm_fails(other, docs, "is not listed beside")
    there, new = read_image(copied, remote), read_image(other)
    data = {k: provenance.read_attached(remote, v).data for k, v in docs.items()}
    laid = provenance.lay(new, remote, data["sbom"], data["provenance"])  # of the earlier build, attached to this one
    confirm_fails(other, laid, "The SBOM is about")
    tagged = _tagged(remote, there.digest)
    try:
        put_manifest(remote, {"schemaVersion": 2, "mediaType": _index, "manifests": [*tagged, *_tagged(remote, new.digest)]}, there.digest.replace(":", "-"))
        confirm_fails(copied, laid, "refers to")
        bill = read_sbom(data["sbom"])
        stale = attach(remote, there.subject, provenance.kinds["sbom"], write_sbom(type(bill)(**(vars(bill) | {"wheels": bill.wheels[1:]}))))
        confirm_fails(copied, docs | {"sbom": stale}, "different wheels")
    finally:
        put_manifest(remote, {"schemaVersion": 2, "mediaType": _index, "manifests": tagged}, there.digest.replace(":", "-"))
    path = stored(own_registry, json.loads(manifest(remote, docs["sbom"])[0])["layers"][0]["digest"])
    kept = path.read_bytes()
    try:
        path.write_bytes(flip(kept))
        confirm_fails(copied, docs, "the registry sent")
    finally:
        path.write_bytes(kept)


def test_documents_that_are_gone_break_their_links(once, copied, own_registry, tracking):
    digest = copied.partition("@")[2]
    remote = Remote(read_reference(copied))
    tagged = _tagged(remote, digest)
    try:
        put_manifest(remote, {"schemaVersion": 2, "mediaType": _index, "manifests": []}, digest.replace(":", "-"))
        result = verify(copied, tracking)
        assert {"sbom", "provenance"} <= set(result["broken"]) and broken(result)["sbom"]["found"] == "nothing"
        put_manifest(remote, {"schemaVersion": 2, "mediaType": _index, "manifests": tagged[:1]}, digest.replace(":", "-"))
        assert len(set(verify(copied, tracking)["broken"]) & {"sbom", "provenance"}) == 1
    finally:
        put_manifest(remote, {"schemaVersion": 2, "mediaType": _index, "manifests": tagged}, digest.replace(":", "-"))


def test_a_release_with_a_stale_document_is_not_recorded(edge, environment, tracking, tmp_path):
    "The notebook that records asks for the documents once more, and creates no version without them"
    from mlflow import MlflowClient
    from mlserve.release.notebook import run_notebook
    from mlserve.release.run import pipelines
    run = Path(edge["evidence"][0]).parent
    for name in ("spec.json", "build.json"):
        shutil.copy(run / name, tmp_path)
    built = json.loads((tmp_path / "build.json").read_text())
    built["attached"]["sbom"] = built["attached"]["provenance"]
    (tmp_path / "build.json").write_text(json.dumps(built))
    before = len(MlflowClient(tracking_uri=tracking).search_model_versions("name='edge'"))
    os.environ |= environment
    try:
        with pytest.raises(errors.IntegrityError, match="no bill of materials"):
            run_notebook(pipelines() / "record_release.ipynb", {"run_dir": str(tmp_path), "run_id": edge["run"]}, tmp_path / "out.ipynb")
    finally:
        for k in environment:
            os.environ.pop(k)
    assert len(MlflowClient(tracking_uri=tracking).search_model_versions("name='edge'")) == before


def test_other_bytes_on_the_way_are_found_before_the_record(edge, environment, tracking):
    "A proxy before the registry changes one byte of the manifest that is read back: the build ends with 5"
    host = edge["image"].split("/")[0]
    package = Path(edge["evidence"][0]).parent / "package"
    with Proxy(int(host.partition(":")[2])) as proxy:
        there = f"127.0.0.1:{proxy.port}"
        image = edge["image"].replace(host, there)
        provenance.confirm_pushed(image)
        layer = read_image(edge["image"]).manifest["layers"][-1]["digest"].encode()
        proxy.flip = (b'"digest":"' + layer, b'"digest":"' + layer[:-1] + (b"0" if layer[-1:] != b"0" else b"1"))
        with pytest.raises(errors.IntegrityError, match="the registry sent"):
            provenance.confirm_pushed(image)
        done = mlserve("build", EDGE, "--package", package, env={**environment, "MLSERVE_REGISTRY": there})
        assert done.returncode == 5, done.stderr[-2000:]
        assert done.stdout == "" and re.search("sent|serves", last_json(done.stderr)["error"])


def test_a_registry_that_holds_another_build(copied):
    "What was pushed has the announced digest, and is not what was built"
    layers = read_image(copied).config["rootfs"]["diff_ids"]
    with pytest.raises(errors.IntegrityError, match="were built") as e:
        provenance.confirm_pushed(copied, layers[:-1] + ["sha256:" + "0" * 64])
    assert e.value.code == 5
    provenance.confirm_pushed(copied, layers)


def test_a_moved_tag_moves_nothing(once, copied, edge, tracking):
    "Somebody pushes other content to the tag: record and verification go by the digest"
    remote, other = Remote(read_reference(copied)), planted(copied, config=labelled)
    put_manifest(remote, read_image(copied, remote).manifest, "latest")
    put_manifest(remote, read_image(other, remote).manifest, "latest")
    assert verify(copied, tracking)["ok"]
    for version in range(1, int(edge["version"]) + 1):
        assert "@sha256:" in record.read_pair("edge", str(version), tracking).image


def test_a_signed_provenance(once, copied, edge, tracking, tmp_path, monkeypatch):
    "With a key the provenance is signed; verify asks for that key's signature, and an unsigned one is refused"
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
    key = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "pub.pem").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    monkeypatch.setenv("MLSERVE_VERIFY_KEY", str(tmp_path / "pub.pem"))
    assert verify(copied, tracking)["broken"][-1] in ("provenance", "record") and "provenance" in verify(copied, tracking)["broken"]
    remote, docs = Remote(read_reference(copied)), attached(edge, tracking)
    found, data = read_image(copied, remote), {k: provenance.read_attached(Remote(read_reference(copied)), v).data for k, v in docs.items()}
    tagged = _tagged(remote, found.digest)
    try:
        laid = provenance.lay(found, remote, data["sbom"], provenance.seal(data["provenance"], str(tmp_path / "key.pem")))
        provenance.confirm_attached(copied, laid)
        forged_ = provenance.seal(data["provenance"].replace(b"unhosted", b"hosted!!"), str(tmp_path / "key.pem")).replace(b"keyid", b"keyId")
        with pytest.raises(errors.IntegrityError):
            provenance.unseal(forged_, str(tmp_path / "pub.pem"))
    finally:
        put_manifest(remote, {"schemaVersion": 2, "mediaType": _index, "manifests": tagged}, found.digest.replace(":", "-"))


@pytest.fixture(scope="session")
def variants(edge, environment, tmp_path_factory):
    "Three more images of the same model: one library, the weights, one module of the server is other"
    import torch
    import mlserve as installed
    from mlserve.package import save_package
    folder = tmp_path_factory.mktemp("variants")
    package = Path(edge["evidence"][0]).parent / "package"

    def build(notebook=EDGE, package=package, **env):
        done = mlserve("build", notebook, "--package", package, "--json", env={**environment, **env})
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)["image"]
    model = torch.nn.Linear(4, 2).requires_grad_(False)
    save_package(model.eval(), folder / "other", name="edge", inputs={"x": torch.rand(8, 4)}, outputs=["signs"], format="onnx")
    (folder / "project").mkdir()
    shutil.copy(EDGE, folder / "project/edge.ipynb")
    (folder / "project/mlserve.toml").write_text('allow = ["idna"]\nrequirements = ["idna<3.20"]\n')
    shutil.copytree(Path(installed.__file__).parent, folder / "src/mlserve", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "nbs/pipelines", folder / "src/mlserve/pipelines")
    with open(folder / "src/mlserve/serving/http/app.py", "a") as f:
        f.write("\n# one changed line\n")
    return {"packages": build(folder / "project/edge.ipynb"), "weights": build(package=folder / "other"), "code": build(PYTHONPATH=str(folder / "src"))}


def names(result, kind):
    return [c["name"] for c in result[kind]]


@pytest.mark.parametrize("kind, layer, name", [("packages", "builder", "idna"), ("weights", "weights", "model.onnx"), ("code", "code", "mlserve/serving/http/app.py")])
def test_diff_explains_a_planted_change(edge, variants, environment, kind, layer, name):
    done = mlserve("diff", edge["image"], variants[kind], "--json", env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert not result["same"] and name in names(result, kind) and layer in names(result, "layers")
    assert not [k for k in ("packages", "code", "debian", "base", "recipe") if k != kind and result[k]], result
    if kind != "weights":
        assert names(result, "layers") == [layer] and names(result, kind) == [name] and not result["weights"]
    said = mlserve("diff", edge["image"], variants[kind], env=environment).stdout
    assert re.search(rf"^{kind} +changed +{re.escape(name)}: ", said, re.M) and " MB" in said


def test_diff_of_two_versions_tells_the_metrics(edge, variants, environment, tracking, tmp_path, monkeypatch):
    import torch
    from mlserve.package import save_package
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    package = save_package(torch.nn.Linear(4, 2).eval(), tmp_path / "p", name="edge", inputs={"x": torch.rand(8, 4)}, outputs=["signs"], format="onnx")
    pair = record.record("edge", record.log_package(package.path, metrics={"accuracy": 0.5}, uri=tracking), variants["weights"], uri=tracking)
    done = mlserve("diff", "edge", edge["version"], pair.version, "--json", env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"name": "accuracy", "change": "changed", "a": 1.0, "b": 0.5} in result["metrics"]
    assert (result["a"]["version"], result["b"]["version"]) == (edge["version"], pair.version)
    same = mlserve("diff", edge["image"], edge["image"], env=environment).stdout
    assert same.strip().endswith("nothing differs")


def test_the_same_package_gives_the_same_labels_and_layers(edge, environment):
    "A second build, with a time given: what differs is the label of the time"
    package = Path(edge["evidence"][0]).parent / "package"
    done = mlserve("build", EDGE, "--package", package, "--json", env={**environment, "SOURCE_DATE_EPOCH": "1700000000"})
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = read_image(edge["image"]), read_image(json.loads(done.stdout)["image"])
    assert one.config["rootfs"] == two.config["rootfs"]
    assert two.labels == one.labels | {"org.opencontainers.image.created": "2023-11-14T22:13:20Z"}
