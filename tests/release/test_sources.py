"""Packages that no notebook trains: a folder, the Hugging Face Hub, DVC. What was named is what is fetched, whole and verified, or nothing is."""
import hashlib
import http.server
import json
import subprocess
import threading
import zlib

import mutations
import pytest

from commands import mlserve
from emulators import use
from mlserve.errors import IntegrityError, NotFound, RemoteUnavailable, UsageError
from mlserve.package import load_package
from mlserve.release.build import hashes
from mlserve.release.image.context import stage
from mlserve.release.lock.dependencies import read_lock
from mlserve.release.run import open_run
from mlserve.release.source.fetched import pinned_spec, read_fetched_spec
from mlserve.release.source.places import fetch_source, pin
from mlserve.release.supply_chain.build_inputs import read_inputs

FIRST, SECOND = "a1" * 20, "b2" * 20


class Hub:
    "A hub with one repository, `org/double`"

    def __init__(self, folder):
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": b"# double"}
        self.refs, self.trees, self.token, self.cut = {"main": FIRST, "v1": FIRST}, {FIRST: self.files, SECOND: {}}, "", None
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Answers,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Answers(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        status, body, headers = self.find()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: self.hub.cut] if "/resolve/" in self.path else body)
            self.close_connection = self.close_connection or bool(self.hub.cut)

    do_HEAD = do_GET

    def find(self):
        hub, place = self.hub, "/api/models/org/double/revision/"
        if hub.token and self.headers["authorization"] != f"Bearer {hub.token}":
            return 401, b"", {}
        if self.path.startswith(place):
            commit = hub.refs.get(self.path.removeprefix(place), self.path.removeprefix(place))
            answer = json.dumps({"id": "org/double", "sha": commit, "siblings": []}).encode()
            return (200, answer, {}) if commit in hub.trees else (404, b"", {"X-Error-Code": "RevisionNotFound"})
        _, _, rest = self.path.partition("/org/double/resolve/")
        revision, _, path = rest.partition("/")
        commit = hub.refs.get(revision, revision)
        if path not in hub.trees.get(commit, {}):
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        data = hub.trees[commit][path]
        return 200, data, {"X-Repo-Commit": commit, "ETag": f'"{zlib.crc32(data):08x}"'}


@pytest.fixture
def hub(double, tmp_path, monkeypatch):
    hub = Hub(double)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.close()


class Team:
    "A git repository with a folder that DVC tracks, `models/double`, and its remote: `put` writes an object of it"

    def __init__(self, folder, url, put):
        self.folder, self.url, self.put = folder, url, put

    def keep(self, data, end=""):
        md5 = hashlib.md5(data).hexdigest() + end
        self.put(f"files/md5/{md5[:2]}/{md5[2:]}", data)
        return md5

    def git(self, *words):
        subprocess.run(["git", "-C", self.folder, "-c", "user.name=me", "-c", "user.email=me@example.com", *words], check=True, capture_output=True)

    def track(self, files, tag):
        "What `dvc add`, `dvc push`, `git commit` and `git tag` do"
        entries = [{"md5": self.keep(data), "relpath": name} for name, data in sorted(files.items())]
        (self.folder / "models").mkdir(parents=True, exist_ok=True)
        (self.folder / "models/double.dvc").write_text(f"outs:\n- md5: {self.keep(json.dumps(entries).encode(), '.dir')}\n  hash: md5\n  path: double\n")
        (self.folder / ".dvc").mkdir(exist_ok=True)
        (self.folder / ".dvc/config").write_text(f"[core]\n    remote = here\n['remote \"here\"']\n    url = {self.url}\n")
        for words in (["init"], ["add", "-f", "."], ["commit", "-m", tag, "--allow-empty"], ["tag", "-f", tag]):
            self.git(*words)


def file_in(folder):
    def put(name, data):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return put


@pytest.fixture
def team(double, tmp_path):
    team = Team(tmp_path / "team", tmp_path / "kept", file_in(tmp_path / "kept"))
    team.track({path.name: path.read_bytes() for path in double.iterdir()}, "v1")
    return team


def refused(kind, tmp_path, text, folder=None):
    "How a fetch ends, and that nothing is left of it"
    with pytest.raises(kind) as e:
        fetch_source(text, tmp_path / "out/package", folder or tmp_path)
    assert not any((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else True
    assert "hf_secret" not in str(e.value)
    return e.value.code


def test_the_same_package_of_three_homes_makes_the_same_context_and_labels(double, hub, team, tmp_path, monkeypatch):
    "A folder, a revision of the Hub and a tag of DVC: nothing of where it came from is in what an image is made of"
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    (tmp_path / "wheels").mkdir()
    made = []
    for number, text in enumerate((str(double), "hf://org/double@v1", "dvc:models/double@v1")):
        pinned = pin(text, team.folder)
        package = fetch_source(pinned, tmp_path / str(number) / "package", team.folder)
        inputs = read_inputs(None, package, read_lock(""), tmp_path / "wheels", "FROM scratch")
        context = stage(tmp_path / str(number) / "context", "FROM scratch", read_lock(""), tmp_path / "wheels", package.path)
        made.append((package.digest, inputs.labels("double", package.digest, read_lock(""), "base@sha256:" + "0" * 64), hashes(context)))
    assert made[0] == made[1] == made[2] and made[0][0] == load_package(double).digest
    assert "org.opencontainers.image.revision" not in made[0][1]


@pytest.mark.matrix
@pytest.mark.timeout(2400)
def test_releases_from_three_homes_have_one_image(double, hub, team, environment, tracking):
    "The same, by the command and on an engine; the record says of each where it came from"
    from mlflow import MlflowClient
    client, made = MlflowClient(tracking_uri=tracking), []
    for text in (str(double), "hf://org/double@v1", "dvc:models/double@v1"):
        done = mlserve("release", "--from", text, "--name", "double", "--json", env=environment, cwd=team.folder, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(done.stdout)
        made.append((result["image"], client.get_model_version("double", result["version"]).tags["mlserve.from"]))
    print(*made, sep="\n")
    assert len({image for image, _ in made}) == 1
    assert [origin.partition("@")[0] for _, origin in made] == [str(double), "hf://org/double", "dvc:models/double"]


def test_a_tag_of_the_hub_that_moves_changes_nothing_that_was_pinned(double, hub, tmp_path):
    pinned = pin("hf://org/double@v1")
    hub.refs["v1"] = hub.refs["main"] = SECOND
    assert pinned == f"hf://org/double@{FIRST}" == pin(pinned)
    assert fetch_source(pinned, tmp_path / "package").digest == load_package(double).digest


def test_a_tag_of_git_that_moves_changes_nothing_that_was_pinned(double, team, tmp_path):
    pinned = pin("dvc:models/double@v1", team.folder)
    team.track({"README.md": b"no package"}, "v1")
    assert fetch_source(pinned, tmp_path / "package", team.folder).digest == load_package(double).digest
    assert refused(NotFound, tmp_path, "dvc:models/double@v1", team.folder) == 2


def test_a_folder_that_changes_before_it_is_fetched_is_refused(double, tmp_path):
    import shutil
    mine = shutil.copytree(double, tmp_path / "mine")
    pinned = pin(str(mine))
    lock = (mine / "package.lock").read_text().splitlines(True)
    (mine / "input_example.json").unlink()
    (mine / "package.lock").write_text("".join(line for line in lock if not line.startswith("input_example.json ")))
    assert load_package(mine).digest != load_package(double).digest  # whole in itself, and another
    assert refused(IntegrityError, tmp_path, pinned) == 5


@pytest.mark.parametrize("change", [lambda data: data[:100], lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: data + b"x"], ids=["cut", "flipped", "longer"])
def test_a_file_that_is_not_the_locks_is_refused(change, hub, team, tmp_path):
    hub.trees[FIRST] = hub.files | {"model.pt": change(hub.files["model.pt"])}
    assert refused(IntegrityError, tmp_path, "hf://org/double") == 5
    md5 = hashlib.md5(hub.files["model.pt"]).hexdigest()
    team.put(f"files/md5/{md5[:2]}/{md5[2:]}", change(hub.files["model.pt"]))
    assert refused(IntegrityError, tmp_path, "dvc:models/double@v1", team.folder) == 5


def test_a_file_of_the_held_back_answers_that_was_changed_is_refused_by_its_md5(double, team, tmp_path):
    "No lock names this file: the MD5 is all there is"
    held = team.keep(b"held")
    (team.folder / "models/double.holdout.safetensors.dvc").write_text(f"outs:\n- md5: {held}\n  hash: md5\n  path: double.holdout.safetensors\n")
    team.track({path.name: path.read_bytes() for path in double.iterdir()}, "v2")
    team.put(f"files/md5/{held[:2]}/{held[2:]}", b"other")
    with pytest.raises(IntegrityError, match="its MD5 is"):
        fetch_source("dvc:models/double@v2", tmp_path / "out/package", team.folder)


def test_a_download_that_is_cut_leaves_nothing_and_can_be_repeated(double, hub, tmp_path):
    hub.cut = 100
    assert refused(RemoteUnavailable, tmp_path, "hf://org/double") == 6
    hub.cut = None
    assert fetch_source("hf://org/double", tmp_path / "out/package").digest == load_package(double).digest


def test_a_token_that_is_refused_is_told_as_that_and_never_printed(hub, tmp_path, monkeypatch):
    hub.token = "hf_good"
    assert refused(RemoteUnavailable, tmp_path, "hf://org/double") == 6
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert refused(RemoteUnavailable, tmp_path, "hf://org/double") == 6
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert pin("hf://org/double") == f"hf://org/double@{FIRST}"


def test_what_is_not_there_is_told_by_its_kind(hub, team, tmp_path):
    assert refused(NotFound, tmp_path, "hf://org/double@v9") == 2
    assert refused(NotFound, tmp_path, "dvc:models/double@v9", team.folder) == 2
    assert refused(UsageError, tmp_path, "sagemaker:double/3") == 2
    hub.close()
    assert refused(RemoteUnavailable, tmp_path, "hf://org/double") == 6


def test_a_remote_of_dvc_may_be_a_store(double, s3, tmp_path, monkeypatch):
    use(monkeypatch, s3)
    team = Team(tmp_path / "team", "s3://models/dvc", lambda name, data: s3.put(f"dvc/{name}", data))
    team.track({path.name: path.read_bytes() for path in double.iterdir()}, "v1")
    assert fetch_source("dvc:models/double@v1", tmp_path / "package", team.folder).digest == load_package(double).digest
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MLSERVE_REMOTE_SECONDS", "5")
    assert refused(RemoteUnavailable, tmp_path, "dvc:models/double@v1", team.folder) == 6


def test_the_first_step_of_a_release_fetches_with_the_repository_of_the_command(double, team, tmp_path, monkeypatch):
    "papermill runs the notebook in another folder; the run knows what was fetched, and its package is the one that was pinned"
    from mlserve.release import pipeline, record
    monkeypatch.chdir(team.folder)
    monkeypatch.setenv("MLSERVE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/record.db")
    run = open_run(pinned_spec(read_fetched_spec("dvc:models/double@v1", tmp_path, state=tmp_path / "state")))
    monkeypatch.setenv("MLFLOW_RUN_ID", run.id)
    run, place = pipeline.train_model(run)
    assert record.read_logged(run.id).digest == load_package(place).digest == load_package(double).digest
    tags = record.mlflow_store.client().get_run(run.id).data.tags
    assert tags["mlserve.from"] == run.spec.source == pin("dvc:models/double@v1") and run.spec.name == "double" and run.trained()


def test_a_package_that_was_changed_in_the_folder_of_the_run_is_not_built(double, monkeypatch):
    from types import SimpleNamespace

    from mlserve.release import pipeline
    run = SimpleNamespace(id="run", notebook=lambda *args, **kw: pytest.fail("it is built"), folder=double)
    monkeypatch.setattr(pipeline.record, "read_logged", lambda run_id: SimpleNamespace(digest="sha256:" + "a" * 64, model_id="m-1"))
    with pytest.raises(IntegrityError, match="was changed in between"):
        pipeline._build(run, double)


CONTROLS = [("the_hub_is_asked_by_name", test_a_tag_of_the_hub_that_moves_changes_nothing_that_was_pinned, ()),
            ("git_is_asked_for_what_is_there_now", test_a_tag_of_git_that_moves_changes_nothing_that_was_pinned, ()),
            ("a_folder_is_whatever_it_holds", test_a_folder_that_changes_before_it_is_fetched_is_refused, ()),
            ("what_was_fetched_is_believed", test_a_file_that_is_not_the_locks_is_refused, {"change": lambda data: bytes([data[0] ^ 1]) + data[1:]}),
            ("an_object_is_believed_by_its_name", test_a_file_of_the_held_back_answers_that_was_changed_is_refused_by_its_md5, ()),
            ("a_cut_download_is_left_in_place", test_a_download_that_is_cut_leaves_nothing_and_can_be_repeated, ()),
            ("what_was_changed_in_the_run_is_built", test_a_package_that_was_changed_in_the_folder_of_the_run_is_not_built, ()),
            ("the_commit_is_a_label_of_a_fetched_package", test_the_same_package_of_three_homes_makes_the_same_context_and_labels, ())]


@pytest.mark.parametrize("plant, test, given", CONTROLS, ids=[c[0] for c in CONTROLS])
def test_sources_control_with_its_bug_planted_the_test_fails(plant, test, given, double, hub, team, tmp_path, monkeypatch):
    import inspect
    mutations.sow(plant, monkeypatch.setattr)
    ready = {"double": double, "hub": hub, "team": team, "tmp_path": tmp_path, "monkeypatch": monkeypatch, **dict(given)}
    with pytest.raises((Exception, pytest.fail.Exception)):
        test(**{name: ready[name] for name in inspect.signature(test).parameters})
