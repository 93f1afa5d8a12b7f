"""mlserve doctor --fix on real files, real users and a real builder: found, refused without consent, mended, and not found again."""
import json
import os
import pty
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from commands import COMMAND, run

from mlserve.mends.finding import asked, mend
from mlserve.mends.leftovers import check_builders
from mlserve.mends.ownership import check_login, check_state
from mlserve.release.record.journal import Journal, owner_of

NOBODY = 65534


@pytest.fixture
def machine(tmp_path):
    "A state folder and a home of this test's own; the services are away"
    tmp_path.chmod(0o755)
    home = tmp_path / "home"
    (home / ".docker").mkdir(parents=True)
    return {"MLSERVE_STATE": str(tmp_path / "state"), "MLFLOW_TRACKING_URI": None, "HOME": str(home), "DOCKER_CONFIG": None,
            "DOCKER_HOST": "tcp://127.0.0.1:1", "MLSERVE_REGISTRY": "127.0.0.1:1", "MLSERVE_REMOTE_SECONDS": "2", "PIP_NO_INDEX": "1"}


def examined(machine, *options):
    "What the doctor finds: what → finding"
    env = {k: v for k, v in {**os.environ, **machine}.items() if v is not None}
    done = subprocess.run([COMMAND, "doctor", "--json", *options], env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.stdout, done.stderr
    return {found["what"]: found for found in json.loads(done.stdout)}, done.stderr


def test_passwords_that_others_may_read_and_what_a_killed_command_left(machine, tmp_path):
    login, state = tmp_path / "home/.docker/config.json", tmp_path / "state"
    login.write_text(json.dumps({"auths": {"registry.test": {"auth": "YW5uOnB3"}}}))
    login.chmod(0o644)
    (state / "runs/1").mkdir(parents=True)
    half, mine = state / "runs/1/.check.json.999999999", state / f"runs/1/.spec.json.{os.getpid()}"
    for file in (half, mine):
        file.write_text("{")
        os.utime(file, (0, 0))
    found, _ = examined(machine)
    assert "passwords of registry.test" in found["login"]["told"] and found["login"]["fix"].startswith("chmod go= ")
    assert "runs/1/.check.json.999999999" in found["leftovers"]["told"] and str(os.getpid()) not in found["leftovers"]["told"]
    again, said = examined(machine, "--fix")
    assert half.exists() and login.stat().st_mode & 0o777 == 0o644 and "--yes does it without asking" in said  # there was nobody to ask
    fixed, said = examined(machine, "--fix", "--yes")
    assert fixed["login"]["mended"] and fixed["leftovers"]["mended"] and fixed["login"]["state"] == fixed["leftovers"]["state"] == "ok"
    assert not half.exists() and mine.exists() and login.stat().st_mode & 0o777 == 0o600 and login.read_text()
    assert "mended   login" in said
    found, _ = examined(machine)
    assert not any(f["fix"] or f["mended"] for f in found.values())


def test_somebody_at_a_terminal_is_asked_and_may_say_no(machine, tmp_path):
    login = tmp_path / "home/.docker/config.json"
    login.write_text(json.dumps({"auths": {"registry.test": {"auth": "YW5uOnB3"}}}))
    login.chmod(0o644)
    for answer, mode in ((b"n\n", 0o644), (b"y\n", 0o600)):
        ours, theirs = pty.openpty()
        env = {k: v for k, v in {**os.environ, **machine}.items() if v is not None}
        with subprocess.Popen([COMMAND, "doctor", "--fix"], env=env, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            os.write(ours, answer)
            _, said = process.communicate(timeout=300)
        os.close(ours)
        os.close(theirs)
        assert b"Do it? [y/N]" in said and login.stat().st_mode & 0o777 == mode, said.decode()


def as_nobody(questions, consent):
    "What another user finds, and may mend, in a process of theirs: what → finding"
    ours, theirs = os.pipe()
    if child := os.fork():
        os.close(theirs)
        with open(ours) as said:
            told = said.read()
        os.waitpid(child, 0)
        return json.loads(told)
    try:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        found = {what: asked(what, question) for what, question in questions.items()}
        if consent:
            found = {what: mend(finding, lambda: asked(what, questions[what]), lambda finding: True) for what, finding in found.items()}
        os.write(theirs, json.dumps({what: finding.plain() for what, finding in found.items()}).encode())
    finally:
        os._exit(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, whom permissions bind")
def test_a_file_of_ours_that_we_may_not_use_is_opened_and_one_of_another_is_named(monkeypatch):
    place = Path(tempfile.mkdtemp())  # where every user comes to
    try:
        place.chmod(0o755)
        state, login = place / "state", place / "docker/config.json"
        (state / "runs").mkdir(parents=True)
        login.parent.mkdir()
        login.write_text("{}")
        for path in (state, login.parent, login):
            os.chown(path, NOBODY, NOBODY)
        login.chmod(0o600)
        (state / "runs").chmod(0o755)  # root's, as after a release in a container
        monkeypatch.setenv("DOCKER_CONFIG", str(login.parent))
        questions = {"state": lambda: check_state(state), "login": check_login}
        found = as_nobody(questions, consent=True)
        assert "runs cannot be written" in found["state"]["told"] and not found["state"]["fix"] and "sudo chown -R" in found["state"]["mend"]
        os.chown(state / "runs", NOBODY, NOBODY)
        (state / "runs").chmod(0o500)
        login.chmod(0o200)
        found = as_nobody(questions, consent=False)
        assert found["state"]["fix"].startswith("chmod u+wx ") and found["login"]["fix"].startswith("chmod u+r ")
        fixed = as_nobody(questions, consent=True)
        assert fixed["state"]["mended"] and fixed["login"]["mended"], fixed
        found = as_nobody(questions, consent=False)
        assert found["state"]["state"] == found["login"]["state"] == "ok"
    finally:
        shutil.rmtree(place)


def test_a_run_that_was_killed_is_closed(machine, tmp_path):
    "Without an engine it stays: its containers could not be asked for"
    with subprocess.Popen(["sleep", "60"]) as process:
        owner = owner_of(process.pid)
        process.kill()
    run_folder = tmp_path / "state/runs/20261129T000000Z"
    run_folder.mkdir(parents=True)
    Journal(run_folder).note("opened", owner=owner, command="check")
    found, _ = examined(machine)
    assert found["leftovers"]["state"] == "warning" and "20261129T000000Z" in found["leftovers"]["told"]
    fixed, _ = examined(machine, "--fix", "--yes")
    assert fixed["leftovers"]["state"] == "warning" and "This did not help" in fixed["leftovers"]["told"] and Journal(run_folder).owner() == owner


def test_a_container_of_a_killed_build_is_removed_from_the_store_of_buildah(tmp_path):
    assert shutil.which("buildah"), "make test installs it"
    state = tmp_path / "state"
    store = ["buildah", "--root", state / "buildah/root", "--runroot", state / "buildah/run"]
    (state / "buildah").mkdir(parents=True)
    made = run(*store, "from", "scratch")
    assert made.returncode == 0, made.stderr
    found = asked("builders", lambda: check_builders(state), needed=False)
    assert "left 1 container(s)" in found.told
    now = mend(found, lambda: asked("builders", lambda: check_builders(state)), lambda finding: True)
    assert now.state == "ok" and not run(*store, "containers", "--quiet").stdout.strip()


def test_control_without_the_question_asked_again_a_fix_that_does_nothing_is_believed():
    "The order of events is what makes a fix one"
    from mlserve.mends.finding import Finding, Fix
    broken = Finding("disk", "missing", "12 MB are free.", fix=Fix("sync", lambda: None))
    assert mend(broken, lambda: broken, lambda finding: True).state == "missing"
    assert mend(broken, lambda: Finding("disk", "ok", ""), lambda finding: True).mended == "sync"


def test_an_engine_that_does_not_answer_is_asked_once(monkeypatch, tmp_path):
    from mlserve import doctor
    from mlserve.errors import LocalResource
    from mlserve.mends import leftovers
    from mlserve.release.spec import ReleaseSpec
    calls = []

    def silent(seconds=None):
        calls.append(seconds)
        raise LocalResource("No Docker Engine answers.", mend="Start it.")
    for room in (doctor, leftovers):
        monkeypatch.setattr(room, "engine", silent)
    spec = ReleaseSpec(name="digits", notebook="digits.ipynb", state=tmp_path, base="python:3.11", repository="localhost:1/digits")
    questions = {what: (what, question, needed) for what, question, needed in doctor._questions(spec, "http://127.0.0.1:1")}
    found = [asked(*questions[what]) for what in ("engine", "builder", "base", "containers")]
    assert len(calls) == 1 and [f.told for f in found[:3]] == ["No Docker Engine answers."] * 3 and found[3].state == "ok"
    asked(*questions["engine"])
    assert len(calls) == 2, "after it was mended it is asked anew"
