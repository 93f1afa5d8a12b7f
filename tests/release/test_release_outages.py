"""Whole releases whose MLflow, registry, store or engine is cut off, freezes or is slow: the exit code within the budget, and one pair when it is over."""
import json
import os
import random
import re
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import COMMAND, TESTS, last_json
from faulty_proxy import Proxy
from kills import hold_record
from servers import patience

GOOD = TESTS / "notebooks/good.ipynb"
BUDGET = 4  # seconds
OURS = 10  # seconds beside the waiting: a kernel's end, the run that is closed, a busy machine
TRAINS = 30  # seconds: the kernel of our notebooks gets ready meanwhile, and meets a fault before the step does that ends by it
FAULTS = {"cut": {"reset": True}, "frozen": {"frozen": True}, "slowed": {"delay": 0.2}}
CODES = {"mlflow": 6, "registry": 6, "store": 6, "engine": 7}
STEPS = {"reach": 3, "train": 4, "build": 5, "record": 2, "check": 9}  # seconds within which a fault comes
POINTS = 40


class Servers:
    "What a release asks, each behind a proxy, and the environment in which a command asks there"

    def __init__(self, stack, tracking, s3, state):
        host, _, port = os.environ["MLSERVE_REGISTRY"].rpartition(":")
        upstream = {"mlflow": (int(tracking.rpartition(":")[2]),), "registry": (int(port), host), "engine": (os.environ["DOCKER_HOST"].removeprefix("unix://"),)}
        self.proxies = {name: stack.enter_context(Proxy(*address)) for name, address in upstream.items()} | {"store": s3.proxy}
        at = {name: f"127.0.0.1:{proxy.port}" for name, proxy in self.proxies.items()}
        self.environment = {**s3.env(), "MLFLOW_TRACKING_URI": f"http://{at['mlflow']}", "MLSERVE_REGISTRY": at["registry"],
                            "DOCKER_HOST": f"tcp://{at['engine']}", "MLSERVE_STATE": str(state), "MLSERVE_REMOTE_SECONDS": str(BUDGET)}

    def meets(self):
        "When somebody first met a fault"
        return min((proxy.met for proxy in self.proxies.values() if proxy.met), default=None)

    def clear(self):
        for proxy in self.proxies.values():
            proxy.clear()


@pytest.fixture
def servers(tracking, s3, state):
    with ExitStack() as stack:
        yield Servers(stack, tracking, s3, state)
    s3.proxy.clear()


def run_into(words, servers, folder, plant=None):
    "Run a command that meets a fault (whose, which, step, delay); its code, stdout, stderr, and how long it lived after it had met it"
    command, (out, err) = [COMMAND, *words, "--json"], (Path(folder) / name for name in ("stdout", "stderr"))
    environment = servers.environment if plant else servers.environment | {"MLSERVE_REMOTE_SECONDS": "60"}
    with open(out, "w") as to_out, open(err, "w") as to_err:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=to_out, stderr=to_err)
    due, end = None, time.monotonic() + 600
    while process.poll() is None:
        assert time.monotonic() < end, f"{words} has no end: {err.read_text()[-2000:]}"
        if plant and due is None and re.search(rf"^{plant[2]} +…", err.read_text(), re.M):
            due = time.monotonic() + plant[3]
        if due and time.monotonic() >= due:
            vars(servers.proxies[plant[0]]).update(FAULTS[plant[1]])
            due = end
        time.sleep(0.02)
    after = time.monotonic() - (servers.meets() or time.monotonic())
    met = due == end and (servers.meets() is not None or plant[1] == "slowed")
    servers.clear()
    return process.returncode, out.read_text(), err.read_text(), met, after


def survive(servers, tracking, folder, plants, *options):
    "One release that meets these faults one after the other, and then none; how many it met"
    words, known, met = ["release", shutil.copy(GOOD, folder), *options], hold_record(tracking, "good"), 0
    for plant in [*plants, None]:
        code, out, err, struck, after = run_into(words, servers, folder, plant)
        recorded = hold_record(tracking, "good")
        if plant:
            met += struck
            print(f"| {plant[0]} | {plant[1]} | {plant[2]} + {plant[3]:.1f} s | {words[0]} | {code} | {f'{after:.1f}' if struck and plant[1] != 'slowed' else ''} |", flush=True)
            assert code == 0 or struck and code == CODES[plant[0]] and plant[1] != "slowed", (code, err[-3000:])
            limit = 2 * BUDGET + OURS + TRAINS * (plant[2] == "train")  # an engine is asked to remove a container, too
            assert "Traceback" not in err and after < patience(limit), (after, err[-3000:])
        if code == 0:
            break
        said = last_json(err)
        assert said["code"] == code and len(recorded) - len(known) <= 1, (said, recorded, known)
        words = said["resume"].split()[1:] if said.get("resume") else words
    assert code == 0, err[-3000:]
    result = json.loads(out)
    new = {version: image for version, image in recorded.items() if version not in known}
    assert new == {result["version"]: result["image"]}, (new, result)
    return met


@pytest.mark.soak
def test_R3_releases_go_through_outages_at_any_step(servers, tracking, engine, tmp_path):
    dice, met, rounds = random.Random(int(os.environ.get("OUTAGES_SEED", 1))), 0, 0
    while met < POINTS:
        (folder := tmp_path / f"{rounds}").mkdir()
        steps = dice.choices([*STEPS], k=3)
        plants = [(dice.choice([*CODES]), dice.choice([*FAULTS]), step, dice.uniform(0, STEPS[step])) for step in steps]
        met += survive(servers, tracking, folder, plants, "--delivery", "store", "--store", "s3://models/outages")
        rounds += 1
        print(f"release {rounds} ends well, {met} outages in all", flush=True)
        assert not engine.containers.list(all=True, filters={"label": "io.mlserve.check=good"}, ignore_removed=True)


def test_C10_an_engine_that_goes_away_in_a_check_is_no_fault_of_the_model(servers, tracking, tmp_path):
    assert survive(servers, tracking, tmp_path, [("engine", "cut", "check", 2)]) == 1
