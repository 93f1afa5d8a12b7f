"""What lies beside an image, and what `verify` and `diff` say of it: one real release, damaged in one place after another."""
import base64
import dataclasses
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
from mlserve.cli import run_command
from mlserve.release.supply_chain import provenance, statement
from mlserve.release import record
from mlserve.release.registry.client import Remote, _image, _index, _tagged, attach, blob, manifest, put_blob, put_manifest, read_reference, referrers
from mlserve.release.registry.image_reader import confirm_pushed, read_image
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
        value["layers"][layer] |= put_blob(remote, gzip.compress(plain, 0, mtime=0))
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


def hidden(members):
    "Code among the lists of packages, and a link that makes Python read it"
    link = tarfile.TarInfo("usr/lib/python3.11/usercustomize.py")
    link.type, link.linkname = tarfile.SYMTYPE, "/var/lib/dpkg/status.d/extra"
    return extra("var/lib/dpkg/status.d/extra", b"import os\n")(members) | {link.name: (link, None)}


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


def leading(name, target):
    "A change that adds a link"
    def change(members):
        link = tarfile.TarInfo(name)
        link.type, link.linkname = tarfile.SYMTYPE, target
        return members | {name: (link, None)}
    return change


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
    "code among the lists of packages": (CODE, hidden, None, "base", "var/lib/dpkg/status.d/extra"),
    "a link to a file of the base": (CODE, leading("usr/lib/python3.11/usercustomize.py", "/etc/os-release"), None, "base", "usercustomize.py"),
    "a file of the base at another place": (CODE, extra("usr/lib/python3.11/usercustomize.py", b""), None, "base", "usercustomize.py"),
    "a marker that hides": (CODE, extra("etc/.wh.os-release", b""), None, "layers", "etc/.wh.os-release"),
    "a list that names files of others": (WHEELS, edit(r"site-packages/idna-[\d.]+\.dist-info/RECORD$", lambda c: c + b"../../../../../etc/passwd,,\n"), None, "wheels", "etc/passwd"),
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


def test_a_copy_in_another_registry_is_whole(once, copied, tracking):
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


def test_a_planted_image_without_documents_or_version(once, copied, environment, monkeypatch, capsys):
    "The same as a user meets it: exit 5, the first link named, the others listed"
    image = planted(copied, WEIGHTS, edit(r"package/model\.onnx$", lambda content: content + b"\0"))
    done = mlserve("verify", image, "--json", env=environment)
    assert done.returncode == 5, done.stderr
    assert json.loads(done.stdout)["broken"][0] == "package"
    last = last_json(done.stderr)
    assert last["code"] == 5 and "the link package is broken" in last["error"] and "record" in last["error"]
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert run_command(["verify", image]) == 5 and "BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize("tag", ["package", "lock", "base", "notebook", "sbom", "provenance", "source"])
def test_a_changed_tag_of_the_record_is_the_records(once, copied, edge, tracking, tag):
    from mlflow import MlflowClient
    client, key = MlflowClient(tracking_uri=tracking), f"mlserve.{tag}"
    before = client.get_model_version("edge", edge["version"]).tags[key]
    client.set_model_version_tag("edge", edge["version"], key, "sha256:" + "0" * 64)
    try:
        result = verify(copied, tracking)
        link, where = (tag, f"{tag} beside the image") if tag in provenance.kinds else ("record", f"tag {key}")
        assert result["broken"][0] == link and broken(result)[link]["where"] == where and not result["ok"]
        assert set(result["broken"]) <= {link, "check"}
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
        assert verify(copied, tracking)["broken"] == ["notebook", "check"]
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


def test_documents_that_are_gone_break_their_links_and_those_of_strangers_break_nothing(once, copied, edge, own_registry, tracking):
    "R14: the record names its documents by digest; who may push to the repository may attach what he likes"
    digest = copied.partition("@")[2]
    remote = Remote(read_reference(copied))
    tagged = _tagged(remote, digest)
    for name, document in attached(edge, tracking).items():
        data, kind = manifest(remote, document)
        remote.ask("DELETE", f"manifests/{document}", ok=(202,))
        try:
            result = verify(copied, tracking)
            assert result["broken"][0] == name and broken(result)[name]["found"] == "nothing"
        finally:
            remote.ask("PUT", f"manifests/{document}", ok=(201,), content=data, headers={"Content-Type": kind})
    try:
        for listed in ([], tagged[:1]):
            put_manifest(remote, {"schemaVersion": 2, "mediaType": _index, "manifests": listed}, digest.replace(":", "-"))
            assert verify(copied, tracking)["ok"]
        strange = {"schemaVersion": 2, "mediaType": tagged[0].get("mediaType", _image), "subject": read_image(copied).subject, "layers": [], "config": {"mediaType": "application/vnd.oci.empty.v1+json", **put_blob(remote, b"{}")}}
        for kind in provenance.kinds.values():
            there, _ = put_manifest(remote, {**strange, "artifactType": kind})
            tagged_ = [*tagged, {"mediaType": _image, "artifactType": kind, "digest": there, "size": 1}]
            put_manifest(remote, {"schemaVersion": 2, "mediaType": _index, "manifests": tagged_}, digest.replace(":", "-"))
            assert verify(copied, tracking)["ok"]
            assert provenance.documents(remote, digest, {v: k for k, v in provenance.kinds.items()}[kind])
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
        confirm_pushed(image)
        layer = read_image(edge["image"]).manifest["layers"][-1]["digest"].encode()
        proxy.flip = (b'"digest":"' + layer, b'"digest":"' + layer[:-1] + (b"0" if layer[-1:] != b"0" else b"1"))
        with pytest.raises(errors.IntegrityError, match="the registry sent"):
            confirm_pushed(image)
        done = mlserve("build", EDGE, "--package", package, env={**environment, "MLSERVE_REGISTRY": there})
        assert done.returncode == 5, done.stderr[-2000:]
        assert done.stdout == "" and re.search("sent|serves", last_json(done.stderr)["error"])


def test_a_registry_that_holds_another_build(copied):
    "What was pushed has the announced digest, and is not what was built"
    layers = read_image(copied).config["rootfs"]["diff_ids"]
    with pytest.raises(errors.IntegrityError, match="were built") as e:
        confirm_pushed(copied, layers[:-1] + ["sha256:" + "0" * 64])
    assert e.value.code == 5
    confirm_pushed(copied, layers)


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
    assert {"provenance", "check"} <= set(verify(copied, tracking)["broken"])
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


def command(monkeypatch, capsys, environment, *words, **more):
    "A command of a user in this process: its code, and what it says last"
    for key, value in {**environment, **more}.items():
        monkeypatch.setenv(key, value)
    code = run_command([str(word) for word in words])
    said = capsys.readouterr().err
    return code, last_json(said)["error"] if code else ""


class Changed:
    "One thing of a released version, changed; `done` puts it back"

    def __init__(self, edge, copied, tracking, folder):
        from mlflow import MlflowClient
        self.edge, self.copied, self.tracking, self.folder = edge, copied, tracking, folder
        self.client, self.undo = MlflowClient(tracking_uri=tracking), []

    def tag(self, key, value):
        self.undo.append((self.client.set_model_version_tag, "edge", self.edge["version"], key, self.client.get_model_version("edge", self.edge["version"]).tags[key]))
        self.client.set_model_version_tag("edge", self.edge["version"], key, value)

    def artifact(self, path, change):
        kept = Path(self.client.download_artifacts(self.edge["run"], path, str(self.folder)))
        data, place = kept.read_bytes(), path.rpartition("/")[0] or None
        kept.write_bytes(change(data))
        self.client.log_artifact(self.edge["run"], str(kept), place)
        again = self.folder / "before"
        again.mkdir(exist_ok=True)
        (again / kept.name).write_bytes(data)
        self.undo.append((self.client.log_artifact, self.edge["run"], str(again / kept.name), place))

    def image(self):
        "A doctored image with one layer more"
        reference = read_reference(self.copied)
        remote, found = Remote(reference), read_image(self.copied)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as t:
            t.addfile(tarfile.TarInfo("opt/mlserve/sitecustomize.py"), io.BytesIO())
        value, config = json.loads(json.dumps(found.manifest)), json.loads(json.dumps(found.config))
        value["layers"].append({"mediaType": value["layers"][0]["mediaType"], **put_blob(remote, gzip.compress(archive.getvalue(), 1, mtime=0))})
        config["rootfs"]["diff_ids"].append(digest_of(archive.getvalue()))
        value["config"] |= put_blob(remote, json.dumps(config).encode())
        self.tag("mlserve.image", f"{reference.host}/{reference.repository}@{put_manifest(remote, value)[0]}")

    def manifest(self):
        remote, digest = Remote(read_reference(self.copied)), self.copied.partition("@")[2]
        self.tag("mlserve.image", self.copied)
        data, kind = manifest(remote, digest)
        remote.ask("DELETE", f"manifests/{digest}", ok=(202,))
        self.undo.append((lambda: remote.ask("PUT", f"manifests/{digest}", ok=(201,), content=data, headers={"Content-Type": kind}),))

    def package(self):
        self.tag("mlserve.package", "sha256:" + "0" * 64)

    def notebook(self):
        self.artifact("evidence/edge.ipynb", lambda data: data + b" ")

    def row(self):
        self.artifact("holdout.safetensors", lambda data: data[:-4])

    def finding(self):
        "What a deployment is planned from, a little faster"
        text = self.client.get_model_version("edge", self.edge["version"]).tags["mlserve.check.cpu"]
        self.tag("mlserve.check.cpu", json.dumps(json.loads(text) | {"times": {"ready": 0.01}}))

    def check(self):
        self.artifact("evidence/check_inference.ipynb", lambda data: data.replace(b"passed", b"passt "))

    def statement(self):
        "The statement of another version, which a real check of it made"
        pair = record.read_pair("edge", self.edge["version"], self.tracking)
        other = dataclasses.replace(statement.read_statement(self.stated(pair)), version="999")
        data = statement.write_statement(other)
        (self.folder / f"{digest_of(data)[7:]}.json").write_bytes(data)
        self.client.log_artifact(self.edge["run"], str(self.folder / f"{digest_of(data)[7:]}.json"), "statements")
        self.tag("mlserve.statement.cpu", digest_of(data))

    def stated(self, pair):
        name = pair.tags["mlserve.statement.cpu"].removeprefix("sha256:")
        return Path(self.client.download_artifacts(self.edge["run"], f"statements/{name}.json", str(self.folder))).read_bytes()

    def done(self):
        for act, *words in reversed(self.undo):
            act(*words)


CHANGES = {"image": ("dockerfile", "sbom", "provenance"), "manifest": ("layers",), "package": ("record",), "notebook": ("notebook",), "row": ("holdout",),
           "finding": ("check",), "check": ("check",), "statement": ("check",)}
NEXT = (("promote", "edge"), ("check", "edge"), ("render", "compose", "edge"), ("deploy", "compose", "edge"))
PROXY = "registry.test/haproxy@sha256:" + "b" * 64


@pytest.mark.parametrize("what", CHANGES)
def test_R11_what_was_changed_is_refused_by_the_next_command_with_the_links_name(once, copied, edge, tracking, environment, monkeypatch, capsys, tmp_path, what):
    "One thing at a time, by somebody who may write to the record and to the registry: neither checked nor promoted, rendered nor deployed"
    changed = Changed(edge, copied, tracking, tmp_path)
    try:
        getattr(changed, what)()
        for words in NEXT:
            code, said = command(monkeypatch, capsys, environment, *words, "--version", edge["version"], MLSERVE_PROXY_IMAGE=PROXY)
            assert code == 5 and all(name in said for name in CHANGES[what]), (words, said)
    finally:
        changed.done()


def test_R11_control_a_record_that_is_believed_promotes_what_was_doctored(copied, edge, tracking, environment, monkeypatch, capsys, tmp_path):
    "The planted bug: nobody asks the registry"
    monkeypatch.setattr("mlserve.release.supply_chain.verify.confirm", lambda pair: None)
    changed = Changed(edge, copied, tracking, tmp_path)
    try:
        changed.image()
        assert command(monkeypatch, capsys, environment, "promote", "edge", "--version", edge["version"])[0] == 0
    finally:
        changed.done()


@pytest.mark.parametrize("words", NEXT[2:], ids=lambda words: words[0])
def test_R11_a_registry_that_cannot_be_asked_is_6(copied, edge, tracking, environment, monkeypatch, capsys, tmp_path, words):
    "Nothing listens where the image should be: nothing is printed, and no engine is looked for"
    changed = Changed(edge, copied, tracking, tmp_path)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    try:
        changed.tag("mlserve.image", f"127.0.0.1:9/edge@{copied.partition('@')[2]}")
        code, said = command(monkeypatch, capsys, environment, *words, "--version", edge["version"], MLSERVE_PROXY_IMAGE=PROXY)
        assert code == 6 and "127.0.0.1:9" in said and "Docker" not in said, said
    finally:
        changed.done()


def test_R11_control_a_record_that_is_believed_renders_what_was_doctored(copied, edge, tracking, environment, monkeypatch, capsys, tmp_path):
    "The planted bug: a deployment is planned from the record alone"
    from functools import partial

    from mlserve.release.deploy import rendering
    monkeypatch.setattr(rendering, "planned", partial(rendering.planned, confirm=lambda pair: None))
    changed = Changed(edge, copied, tracking, tmp_path)
    try:
        changed.image()
        assert command(monkeypatch, capsys, environment, "render", "kubernetes", "edge", "--version", edge["version"])[0] == 0
    finally:
        changed.done()


def test_R11_control_what_was_not_changed_is_rendered(once, edge, environment, monkeypatch, capsys):
    code, said = command(monkeypatch, capsys, environment, "render", "kubernetes", "edge", "--version", edge["version"])
    assert code == 0, said


def test_R11_control_what_was_not_changed_is_promoted(once, edge, environment, monkeypatch, capsys):
    code, said = command(monkeypatch, capsys, environment, "promote", "edge", "--version", edge["version"])
    assert code == 0, said


def test_R14_a_doctored_image_with_documents_and_tags_of_its_own_is_not_promoted(once, copied, edge, tracking, environment, monkeypatch, capsys):
    "Forged are the provenance, the bill, the tags and the finding of a check; the base is asked"
    tags = record.read_pair("edge", edge["version"], tracking).tags
    pair = adopted(planted(copied, CODE, hidden), edge, tracking, copied, **{k: tags[k] for k in ("mlserve.check.cpu", "mlserve.status")})
    for words in (("promote", "edge", "--version", pair.version), ("check", "edge", "--version", pair.version)):
        code, said = command(monkeypatch, capsys, environment, *words)
        assert code == 5 and "the link base is broken: var/lib/dpkg/status.d/extra" in said, said


def test_R14_control_lists_and_links_that_are_let_pass_hide_code(once, copied, edge, tracking, monkeypatch):
    "The planted bug: what lies among the lists of packages is anybody's, and a link is no file"
    from mlserve.release.supply_chain import links
    held = links.base_in

    def lenient(files, base, places):
        return [finding for finding in held(files, base, places) if finding[1] != "no such link" and "dpkg/status.d/" not in finding[0]]
    monkeypatch.setattr(links, "base_in", lenient)
    image = planted(copied, CODE, hidden)
    adopted(image, edge, tracking, copied)
    assert verify(image, tracking)["ok"]


def test_R14_a_base_that_does_not_answer_is_6_and_one_that_is_gone_is_5(once, copied, edge, tracking, environment, monkeypatch, capsys):
    from mlserve.release.supply_chain import links
    read = links.read_image
    for error, code, state in ((errors.RemoteUnavailable("The registry did not answer."), 6, None), (errors.NotFound("There is no such manifest."), 5, False)):
        def away(reference, remote=None, error=error):
            raise error
        monkeypatch.setattr(links, "read_image", away)
        result = verify(copied, tracking)
        assert not result["ok"] and {l["name"]: l["ok"] for l in result["links"]}["base"] is state
        found, said = command(monkeypatch, capsys, environment, "promote", "edge", "--version", edge["version"])
        assert found == code and "the link base" in said, said
    monkeypatch.setattr(links, "read_image", read)


@pytest.fixture
def keys(tmp_path):
    "Two pairs of keys: paths of the private and of the public half"
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
    for name in ("ours", "theirs"):
        key = ed25519.Ed25519PrivateKey.generate()
        (tmp_path / name).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (tmp_path / f"{name}.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "text.pub").write_text("no key")
    return tmp_path


def test_R14_where_a_key_is_demanded_only_what_it_signed_is_promoted(once, copied, edge, tracking, environment, monkeypatch, capsys, keys):
    "Unsigned, signed by another, signed and changed, signed about another image; a key that is none is a mistake of its own"
    def tried(**more):
        return command(monkeypatch, capsys, environment, "promote", "edge", "--version", pair.version, MLSERVE_VERIFY_KEY=str(keys / "ours.pub"), **more)
    pair = record.read_pair("edge", edge["version"], tracking)
    code, said = tried()
    assert code == 5 and "the link provenance" in said and "not signed" in said and "check" in said
    code, said = command(monkeypatch, capsys, environment, "render", "kubernetes", "edge", "--version", pair.version)  # by the same key
    assert code == 5 and "the link provenance" in said and "not signed" in said
    remote, found = Remote(read_reference(copied)), read_image(copied)
    data = {k: provenance.read_attached(remote, v).data for k, v in attached(edge, tracking).items()}
    changed = Changed(edge, copied, tracking, keys)

    def signed(by, check=lambda data: data, signer=None):
        laid = provenance.lay(found, remote, data["sbom"], provenance.seal(data["provenance"], str(keys / by)))
        changed.tag("mlserve.image", copied)
        for name, digest in laid.items():
            changed.tag(f"mlserve.{name}", digest)
        monkeypatch.setenv("MLSERVE_SIGNING_KEY", str(keys / (signer or by)))
        pair_ = statement.attest(record.read_pair("edge", edge["version"], tracking), "cpu", statement.evidence_of(pair, tracking), tracking)
        monkeypatch.delenv("MLSERVE_SIGNING_KEY")
        return pair_
    before = pair.tags["mlserve.statement.cpu"]
    try:
        signed("ours")
        assert tried() == (0, "")
        assert command(monkeypatch, capsys, environment, "promote", "edge", "--version", pair.version, MLSERVE_VERIFY_KEY=str(keys / "text.pub"))[0] == 2
        signed("ours", signer="theirs")
        code, said = tried()
        assert code == 5 and "the link check is broken" in said and "no signature of the key" in said
        signed("theirs")
        code, said = tried()
        assert code == 5 and "the link provenance is broken" in said and "no signature of the key" in said
    finally:
        changed.done()
        changed.client.set_model_version_tag("edge", edge["version"], "mlserve.statement.cpu", before)
    assert verify(copied, tracking)["broken"] == ["provenance", "check"]  # asked for a signature that it has not
    monkeypatch.delenv("MLSERVE_VERIFY_KEY")
    assert verify(copied, tracking)["ok"]
