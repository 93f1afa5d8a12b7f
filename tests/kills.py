"""Who dies when: a command that is killed at a random moment, and what must hold of the record whatever was killed."""
import hashlib
import json
import os
import random
import re
import subprocess
import time
from pathlib import Path

import httpx
import psutil
from commands import COMMAND

ACCEPT = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"
CALLS = {"write": 3000, "send": 400, "connect": 200, "fsync": 60, "rename": 60, "mkdir": 60, "unlink": 60}  # → how many a process makes, at most


def build_preload(folder):
    "The library by which a process dies at a call"
    library = Path(folder) / "kill_at_call.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-o", library, Path(__file__).parent / "kill_at_call.c", "-ldl"], check=True)
    return library


def labels_of(image):
    "The labels of an image, pulled from its registry by digest; every hash is computed again"
    repository, digest = image.split("@")
    host, name = repository.split("/", 1)
    with httpx.Client(base_url=f"http://{host}/v2/{name}", trust_env=False, headers={"Accept": ACCEPT}, timeout=30) as registry:
        def fetched(kind, digest):
            data = registry.get(f"/{kind}/{digest}").raise_for_status().content
            assert f"sha256:{hashlib.sha256(data).hexdigest()}" == digest
            return json.loads(data)
        manifest = fetched("manifests", digest)
        for layer in manifest["layers"]:
            registry.head(f"/blobs/{layer['digest']}").raise_for_status()
        return fetched("blobs", manifest["config"]["digest"])["config"]["Labels"]


def hold_record(uri, name):
    "Each recorded digest pulls, its labels name that package, aliases point to checked pairs only; the versions with their images"
    from mlflow import MlflowClient
    client = MlflowClient(tracking_uri=uri)
    versions = {v.version: v.tags for v in client.search_model_versions(f"name = '{name}'")}
    for version, tags in versions.items():
        assert labels_of(tags["mlserve.image"])["io.mlserve.package"] == tags["mlserve.package"], version
    models = client.search_registered_models(f"name = '{name}'")
    for alias, version in models[0].aliases.items() if models else ():
        tags = versions[version]
        assert tags["mlserve.status"] == "checked" and json.loads(tags["mlserve.check.cpu"])["passed"] and tags["mlserve.statement.cpu"], (alias, version, tags)
    return {version: tags["mlserve.image"] for version, tags in versions.items()}


class Fates:
    "Draws deaths: at a call for three in ten, at a moment within a step for the others"

    def __init__(self, seed, folder, steps):
        self.dice, self.preload, self.most, self.steps = random.Random(seed), build_preload(folder), dict(CALLS), {"start": 4.0}
        self.learn(steps)

    def learn(self, steps):
        "How long steps take; a first build, which has no layers to begin with, is no measure"
        for step in steps:
            self.steps[step["name"]] = min(step["seconds"], self.steps.get(step["name"], 20))

    def outlived(self, fate):
        "So many calls it does not make"
        if fate.call:
            self.most[fate.call] = max(2, min(self.most[fate.call], fate.n))

    def draw(self):
        return Fate(self.dice, self.steps, self.most, self.preload)


class Fate:
    "One death: of whom, and when"

    def __init__(self, dice, steps, most, preload):
        self.call = dice.choice(list(most)) if dice.random() < 0.3 else ""
        self.n = int(most[self.call] ** dice.random()) if self.call else 0
        self.step = "" if self.call else dice.choice(list(steps))
        self.delay = 0 if self.call else dice.uniform(0, 1.2 * steps[self.step])
        self.whom = "caller" if self.call else dice.choices(["command", "command and children", "child"], [6, 2, 2])[0]
        self.pick, self.preload, self.struck = dice.random(), preload, False

    def __str__(self):
        return f"{self.whom:<20}  {f'{self.call} {self.n}' if self.call else f'{self.step} + {self.delay:.2f} s'}"

    def strike(self, pid):
        "Kill, unless there is nobody any more"
        try:
            own = psutil.Process(pid)
            below = own.children(recursive=True)
            victims = {"command": [own], "child": below[int(self.pick * len(below)):][:1]}.get(self.whom) or [own, *below]
            for victim in victims:
                victim.kill()
                self.struck = True
        except psutil.NoSuchProcess:
            return


def run_to_death(words, env, folder, fate=None):
    "Run a command until it ends, or is killed; its code, stdout and stderr"
    command, out, err, mark = [COMMAND, *words], *(Path(folder) / name for name in ("stdout", "stderr", "mark"))
    mark.unlink(missing_ok=True)
    if fate and fate.call:
        env = env | {"LD_PRELOAD": str(fate.preload), "KILL_CALL": fate.call, "KILL_N": str(fate.n), "KILL_MARK": str(mark)}
    with open(out, "w") as to_out, open(err, "w") as to_err:  # what it leaves behind may hold them open
        process = subprocess.Popen(command, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=to_out, stderr=to_err)
    due, end = None, time.monotonic() + 900
    while process.poll() is None:
        now = time.monotonic()
        assert now < end, f"{words} has no end: {err.read_text()[-2000:]}"
        if fate and fate.step and due is None and (fate.step == "start" or re.search(rf"^{fate.step} +…", err.read_text(), re.M)):
            due = now + fate.delay
        if due and now >= due and not fate.struck:
            fate.strike(process.pid)
        time.sleep(0.02)
    if fate and fate.call:
        fate.struck = mark.exists()
    return process.returncode, out.read_text(), err.read_text()
