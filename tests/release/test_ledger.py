"""One winner, never backwards: racers, kills and strangers against a real MLflow server with several workers."""
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from commands import TESTS
from emulators import mlflow_server
from faulty_proxy import Proxy
from servers import free_port

from mlserve.errors import by_code
from mlserve.package import load_package
from mlserve.package.lock import digest_of
from mlserve.release import pipeline, record
from mlserve.release.record import ledger, logged_package, mlflow_store
from mlserve.release.record.journal import journals
from mlserve.release.record.upload import upload_package
from mlserve.release.run import Run, open_run, read_json, write_json
from mlserve.release.spec import ReleaseSpec
from mlserve.release.supply_chain.statement import attest, check_findings

FORK = multiprocessing.get_context("fork")  # MLflow is imported once
GOOD = TESTS / "notebooks/good.ipynb"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    with mlflow_server(folder, f"sqlite:///{folder}/mlflow.db", 3) as url:
        yield url


@pytest.fixture
def uri(server, monkeypatch):
    "Of versions whose images are names alone: nothing is asked of a registry"
    monkeypatch.setattr("mlserve.release.supply_chain.verify.confirm", lambda pair, **more: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return server


def a_model(uri, versions, name=None):
    "The name of a model with so many versions, checked and all"
    store, name = mlflow_store.client(uri), name or f"m{time.monotonic_ns()}"
    store.create_registered_model(name)
    for n in range(versions):
        tags = {"mlserve.image": f"registry.test/m@sha256:{n:064x}", "mlserve.package": f"sha256:{n:064x}", "mlserve.status": "checked", "mlserve.check.cpu": '{"passed": true}'}
        store.create_model_version(name, source="s3://nowhere/m", tags=tags)
    return name


def outcome(deed):
    "What a command would end with: its code, and what it said"
    try:
        return 0, str(deed())
    except Exception as e:
        return getattr(e, "code", 70), f"{type(e).__name__}: {e}"


def at_once(deeds):
    "Each deed in a process of its own, all started at one instant; what each ended with"
    gate, answers = FORK.Barrier(len(deeds)), FORK.Queue()

    def racer(n, deed):
        gate.wait()
        answers.put((n, outcome(deed)))
    processes = [FORK.Process(target=racer, args=(n, deed)) for n, deed in enumerate(deeds)]
    for p in processes:
        p.start()
    ended = dict(answers.get(timeout=120) for _ in processes)
    for p in processes:
        p.join()
    return [ended[n] for n in range(len(deeds))]


def race(uri, rounds):
    "8 racers with 8 versions, again and again, each from where production stands"
    name, winners = a_model(uri, 1 + 8 * rounds), []
    for r in range(rounds):
        before = ledger.standing(name, "production", uri)
        versions = [str(8 * r + v) for v in range(2, 10)]
        ended = at_once([lambda v=v: ledger.move(name, "production", before.version, v, "promoted", uri=uri) for v in versions])
        won = [v for v, (code, _) in zip(versions, ended) if code == 0]
        assert len(won) == 1 and all(code == 4 and f"version {won[0]}, promoted by" in said for code, said in ended if code), ended
        now = ledger.standing(name, "production", uri)
        assert now.shown == now.version == won[0] and not ledger.stray(name, "production", now)
        winners.append(won[0])
        if not len(winners) % 20:
            print(f"{len(winners)} rounds of 8: one winner each", flush=True)
    assert [m.version for m in now.moves] == winners == sorted(winners, key=int)
    assert all(m.followed for m in now.moves)


@pytest.fixture
def sqlite(tmp_path):
    "A server of its own with several workers"
    with mlflow_server(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", 4) as url:
        yield url


@pytest.fixture
def postgres(tmp_path):
    "A server of its own with several workers, on Debian's PostgreSQL"
    [home] = Path("/usr/lib/postgresql").glob("*/bin")
    python, data, port = tmp_path / "python", Path(tempfile.mkdtemp(dir="/var/tmp")), free_port()  # pytest shuts its own folders against other users
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", python, "psycopg2-binary==2.9.13"], check=True)
    shutil.chown(data, "postgres")

    def as_postgres(*command):
        subprocess.run(command, check=True, user="postgres", group="postgres", cwd=data, stdout=subprocess.DEVNULL)
    as_postgres(home / "initdb", "-D", data / "db", "-A", "trust")
    as_postgres(home / "pg_ctl", "-D", data / "db", "-w", "-l", data / "log", "-o", f"-p {port} -k {data} -c listen_addresses=127.0.0.1", "start")
    try:
        with mlflow_server(tmp_path, f"postgresql+psycopg2://postgres@127.0.0.1:{port}/postgres", 4, PYTHONPATH=str(python)) as url:
            yield url
    finally:
        as_postgres(home / "pg_ctl", "-D", data / "db", "-m", "immediate", "stop")
        shutil.rmtree(data)


@pytest.mark.parametrize("rounds", [4, pytest.param(10, marks=pytest.mark.matrix)])
def test_R12_of_eight_racers_one_wins_and_the_others_are_told_who(uri, rounds):
    race(uri, rounds)


@pytest.mark.soak
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_R12_of_eight_racers_one_wins_two_hundred_times(database, request):
    race(request.getfixturevalue(database), 200)


def test_R12_control_a_command_that_does_not_read_who_was_first_is_seen(uri, monkeypatch):
    from mlflow.exceptions import MlflowException

    def trusting(store, run_id, key, value):
        with contextlib.suppress(MlflowException):
            store.log_param(run_id, key, value)
        return value
    ledger.move(a_model(uri, 1), "production", "", "1", uri=uri)  # the ledgers are there
    monkeypatch.setattr(ledger, "write_once", trusting)
    with pytest.raises(AssertionError, match=r"[2-8] == 1"):  # of the winners
        race(uri, 2)


def promoted(name, version, *options):
    "What the command ends with"
    from mlserve.cli import run_command
    sys.stdout = open(os.devnull, "w")
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = run_command(["promote", name, "--version", str(version), *options])
    if code:
        raise by_code(code)(stderr.getvalue())
    return stderr.getvalue()


def test_R5_commands_that_promote_at_once_never_go_backwards(uri):
    "Some come after the winner, and know of it: each that ends with 0 is a move of its own, and a later version"
    name = a_model(uri, 9)
    promoted(name, 1)
    ended = at_once([lambda v=v: promoted(name, v) for v in range(2, 10)])
    assert {code for code, _ in ended} <= {0, 4} and all("promoted by" in said for code, said in ended if code), ended
    won = [str(v) for v, (code, _) in zip(range(2, 10), ended) if code == 0]
    now = ledger.standing(name, "production", uri)
    assert [m.version for m in now.moves] == ["1", *won] and now.shown == won[-1]
    same = at_once([lambda: promoted(name, 9, "--allow-older") for _ in range(4)])
    assert [code for code, _ in same] == [0] * 4 and len(ledger.standing(name, "production", uri).moves) <= len(won) + 2


def test_R12_an_older_version_is_refused_unless_it_is_asked_for(uri):
    name = a_model(uri, 4)
    promoted(name, 3)
    code, said = outcome(lambda: promoted(name, 2))
    assert code == 4 and "is older, and an alias moves forward only" in said and f"mlserve rollback {name} --to 2" in said
    assert "is production already" in promoted(name, 3)
    promoted(name, 2, "--allow-older")
    promoted(name, 4)
    assert record.rollback(name, uri=uri).version == "2"
    assert [m.version for m in ledger.standing(name, "production", uri).moves] == ["3", "2", "4", "2"]


def test_R12_control_an_older_version_that_passes_is_seen(uri, monkeypatch):
    monkeypatch.setattr(ledger, "_allow_move", lambda *args: None)
    with pytest.raises(AssertionError):
        test_R12_an_older_version_is_refused_unless_it_is_asked_for(uri)


def killed_at(n, answered, deed):
    "Do something in a process that is killed before its n-th write to MLflow, or as soon as that was answered; whether it was"
    def run():
        import requests
        send, writes = requests.Session.send, []

        def counted(session, request, **kwargs):
            writes.extend([1] * (request.method != "GET"))
            last = request.method != "GET" and len(writes) == n
            if last and not answered:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = send(session, request, **kwargs)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer
        requests.Session.send = counted
        deed()
    process = FORK.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("first, answered", [
    pytest.param(True, True, id="when it was answered-the first of a model"),
    pytest.param(False, False, id="before it is sent-a later one"),
    pytest.param(True, False, id="before it is sent-the first of a model", marks=pytest.mark.matrix),
    pytest.param(False, True, id="when it was answered-a later one", marks=pytest.mark.matrix)])
def test_R12_a_promotion_that_is_killed_at_any_write_is_completed_by_the_next(uri, first, answered):
    between = 0
    old = "" if first else "1"
    for n in range(1, 20):
        name = a_model(uri, 3)
        if not first:
            promoted(name, 1)
        if not killed_at(n, answered, lambda: ledger.move(name, "production", old, "2", "promoted", uri=uri)):
            break
        now = ledger.standing(name, "production", uri)
        assert now.version in (old, "2") and now.shown in (old, now.version) and not ledger.stray(name, "production", now), (n, now)
        between += now.version != now.shown
        promoted(name, 3)
        after = ledger.standing(name, "production", uri)
        assert after.shown == after.version == "3" and after.moves[-1].followed, (n, after)
        assert [m.version for m in after.moves] == [*(["1"] * (not first)), *(["2"] * (now.version == "2")), "3"], (n, after)
    assert n > 3 and between  # killed between the ledger and the alias


def test_R12_control_a_move_that_nobody_completes_is_seen(uri, monkeypatch):
    "Without the mark of a followed move, one that was cut looks like a stranger's"
    moves = ledger._moves
    monkeypatch.setattr(ledger, "_moves", lambda *args: tuple(dataclasses.replace(m, followed=True) for m in moves(*args)))
    with pytest.raises(AssertionError):
        test_R12_a_promotion_that_is_killed_at_any_write_is_completed_by_the_next(uri, False, False)


def test_R12_a_move_by_hand_is_seen_and_two_commands_end_it(uri):
    store, name = mlflow_store.client(uri), a_model(uri, 5)
    promoted(name, 3)
    for way, version in (("put it back", 3), ("keep it", 2)):
        store.set_registered_model_alias(name, "production", "2")
        for version_asked in (4, 5):
            code, said = outcome(lambda: promoted(name, version_asked))
            assert code == 4 and "moved by hand to version 2; the ledger has version 3, promoted by" in said and store.get_model_version_by_alias(name, "production").version == "2"
        line = said.splitlines()[0].rstrip(".").partition(f"{way}: mlserve promote {name} --version ")[2].partition(",")[0]
        promoted(name, *line.split())
        now = ledger.standing(name, "production", uri)
        assert now.shown == now.version == str(version) and not ledger.stray(name, "production", now)
    store.set_registered_model_alias(name, "candidate", "5")
    told = []
    record.promote(name, 4, alias="candidate", uri=uri, warn=told.append)
    assert "candidate of" in told[0] and "by hand to version 5; the ledger knows no move of it" in told[0]
    assert ledger.standing(name, "candidate", uri).shown == "4"


def test_R8_a_check_sets_no_alias_and_one_that_fails_takes_candidate(uri, monkeypatch):
    store, name = mlflow_store.client(uri), a_model(uri, 4)
    pairs = {n: record.read_pair(name, n, uri) for n in (1, 2, 3)}
    record.promote(name, 3, alias="candidate", uri=uri)
    record.mark(pairs[1], "cpu", {"passed": True}, uri)
    assert store.get_model_version_by_alias(name, "candidate").version == "3"
    for n in (2, 3):
        promoted(name, n)
    bad = record.mark(pairs[3], "cpu", {"passed": False, "reason": "an answer differs"}, uri)
    assert f"mlserve rollback {name} moves production back" in record.failed_in_production(bad, uri)
    assert ledger.standing(name, "candidate", uri).shown == "" and ledger.standing(name, "production", uri).shown == "3"
    assert record.rollback(name, uri=uri).version == "2"
    overtaken(uri, name, 4, monkeypatch)


def overtaken(uri, name, version, monkeypatch):
    "A check fails after a promotion has read the finding, and before the alias is at the version"
    move = ledger.move

    def slow(name, alias, *args):
        record.mark(record.read_pair(name, version, uri), "cpu", {"passed": False}, uri)
        return move(name, alias, *args)
    monkeypatch.setattr(record, "move", slow)
    code, said = outcome(lambda: record.promote(name, version, uri=uri))
    assert code == 3 and "failed a check while it was promoted" in said and f"mlserve rollback {name}" in said


def test_R8_control_a_finding_that_is_not_read_again_is_seen(uri, monkeypatch):
    monkeypatch.setattr(record, "_passed", lambda pair, kind: True)
    with pytest.raises(AssertionError):
        overtaken(uri, a_model(uri, 1), 1, monkeypatch)


@pytest.fixture
def logged(uri, double):
    "A package in the store, and the name of a new model"
    return logged_package.log_package(double, uri=uri), f"once{time.monotonic_ns()}"


def recorded_when_the_answer_is_lost(uri, logged, monkeypatch):
    "The versions that are there after the answer to the first creation was cut on the way"
    from mlflow import MlflowClient
    lost, create = [], MlflowClient.create_model_version
    with Proxy(int(uri.rpartition(":")[2])) as proxy:
        @functools.wraps(create)
        def cut(*args, **more):
            if not lost:
                lost.append(1)
                proxy.cut = proxy.down + 1
            return create(*args, **more)
        monkeypatch.setattr(MlflowClient, "create_model_version", cut)
        through = f"http://127.0.0.1:{proxy.port}"
        pair = record.record(logged[1], logged[0], "registry.test/once@sha256:" + "a" * 64, uri=through)
    assert lost and pair.status == "recorded"
    return [v.version for v in mlflow_store.client(uri).search_model_versions(f"name='{logged[1]}'")]


def test_R3_a_lost_answer_makes_no_second_version(uri, logged, monkeypatch):
    assert recorded_when_the_answer_is_lost(uri, logged, monkeypatch) == ["1"]
    assert record.record(logged[1], logged[0], "registry.test/once@sha256:" + "a" * 64, uri=uri).version == "1"


def test_R3_control_a_client_that_sends_it_again_makes_two(uri, logged, monkeypatch):
    monkeypatch.setattr(mlflow_store, "_once", "")
    assert len(recorded_when_the_answer_is_lost(uri, logged, monkeypatch)) == 2


def traced(call, n, deed):
    "Do something in a process that is killed at its n-th system call of a kind; whether it was"
    mine, gate = FORK.Pipe()

    def run():
        gate.recv_bytes()
        deed()
    process = FORK.Process(target=run)
    process.start()
    command = ["strace", "-f", "-p", str(process.pid), "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={n}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert "attached" in tracer.stderr.readline()
        mine.send_bytes(b"go")
        tracer.stderr.read()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def finish(spec, package, image):
    "What a release does beside training, building and asking a container; what is done already is asked, as by `mlserve resume`"
    begun = [journal for journal in journals(spec.state) if journal.last("run")]
    run = Run(spec, begun[-1].folder, begun[-1].last("run")["id"]) if begun else open_run(spec)
    run.journal.claim(command="release")
    with mlflow_store.environment(MLFLOW_RUN_ID=run.id):
        logged = record.read_logged(run.id) or record.log_package(package.path)
    upload_package(package, f"file://{spec.state}/store")
    write_json(run.folder / "build.json", {"image": image})
    if not pipeline.is_recorded(run):
        run.keep()
        made = record.record(spec.name, logged, image)
        write_json(run.folder / "record.json", {"name": made.name, "version": made.version})
    pair = record.read_pair(spec.name, run.result("record")["version"])
    if not pipeline.is_checked(run):
        write_json(run.folder / "check.json", {"passed": True})
        attest(record.mark(pair, "cpu", {"passed": True}), "cpu", run.keep())
    record.promote(pair.name, pair.version, alias="candidate")
    mlflow_store.client().set_terminated(run.id, "FINISHED")
    write_json(spec.state / "release.json", {"version": pair.version, "image": image})
    run.journal.close("FINISHED")


def hold(uri, spec, package, image):
    "What must be true at every moment of it: nothing half-written, no version without its image, no alias to an unproven pair"
    store = mlflow_store.client(uri)
    versions = store.search_model_versions(f"name='{spec.name}'")
    assert [(v.tags["mlserve.image"], v.tags["mlserve.package"]) for v in versions] in ([], [(image, package.digest)])
    for model in store.search_registered_models(f"name='{spec.name}'"):
        for alias in model.aliases:
            pair = record.read_pair(spec.name, alias, uri)
            findings = check_findings(pair, uri)
            assert pair.status == "checked" and findings and all(asked == found for _, asked, found in findings), (pair, findings)
    for path in spec.state.rglob("*.json"):
        assert path.name.startswith(".") or json.loads(path.read_text())
    sent = spec.state / "store/package.lock"
    if sent.exists() and digest_of(sent.read_bytes()) == package.digest:
        assert load_package(sent.parent, digest=package.digest)
    return len(versions)


CALLS = {"sendto": 90, "write": 25, "fsync": 7, "rename": 6}  # → as many as one release makes, about


def killed_releases(uri, double, folder, kills, dice):
    "Releases that are killed at random calls until there were so many kills; each ends with one version, when nobody kills it"
    package, done, releases = load_package(double), 0, 0
    while done < kills:
        name, state = f"k{time.monotonic_ns()}", folder / f"{releases}"
        (state / "store").mkdir(parents=True)
        spec = ReleaseSpec(name=name, notebook=shutil.copy(GOOD, state), state=state)
        image, killed = f"registry.test/{name}@sha256:{releases:064x}", True
        while killed and done < kills:
            call = dice.choice(list(CALLS))
            killed = traced(call, int(CALLS[call] ** dice.random()), lambda: finish(spec, package, image))
            done += killed
            hold(uri, spec, package, image)
        finish(spec, package, image)
        assert hold(uri, spec, package, image) == 1 and record.aliases(record.read_pair(name)) == ["candidate"]
        [journal] = [journal for journal in journals(state) if journal.last("run")]
        assert journal.last("ended")["status"] == "FINISHED" and read_json(state / "release.json")["image"] == image
        releases += 1
    return releases


@pytest.mark.parametrize("kills", [pytest.param(24, id="24"), pytest.param(2000, id="2000", marks=pytest.mark.soak)])
def test_R4_what_is_killed_at_a_system_call_leaves_a_whole_record(uri, double, tmp_path, kills):
    print(f"{kills} kills in {killed_releases(uri, double, tmp_path, kills, random.Random(4))} releases")


def test_R4_control_a_file_that_is_written_in_place_is_seen(uri, double, tmp_path, monkeypatch):
    def in_place(path, value):
        with open(path, "w", buffering=1) as file:
            for part in json.dumps(value, indent=2, default=str).splitlines(True):
                file.write(part)
    monkeypatch.setitem(globals(), "write_json", in_place)
    monkeypatch.setitem(globals(), "CALLS", {"write": 25})
    with pytest.raises(json.JSONDecodeError):
        killed_releases(uri, double, tmp_path, 24, random.Random(4))
