"""What a saved image holds: its configuration, and the files of every layer, read from `docker save` without an unpacked copy."""
import json
import os
import re
import tarfile
from dataclasses import dataclass, field

SHELLS = {"sh", "bash", "dash", "ash", "busybox", "zsh", "ksh", "perl", "toybox"}
MANAGERS = {"apt", "apt-get", "apt-cache", "aptitude", "dpkg", "dpkg-deb", "rpm", "yum", "apk", "pip", "pip3", "conda", "uv", "easy_install"}
COMPILERS = {"gcc", "cc", "g++", "c++", "clang", "ld", "as", "make", "cmake", "ninja", "gdb", "strace"}
FETCHERS = {"curl", "wget", "nc", "ssh", "git"}
SECRETS = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=]{40}|AKIA[0-9A-Z]{16}[^0-9A-Za-z]|ghp_[0-9A-Za-z]{36}|xox[baprs]-[0-9A-Za-z-]{20}")


@dataclass
class Saved:
    "An image as `docker save` gives it"
    path: str
    config: dict = field(default_factory=dict)
    layers: list = field(default_factory=list)  # names of the layers' archives, lowest first

    def members(self):
        "(layer number, member, a function that reads it) for every file of every layer, also of one that a later layer covers"
        with tarfile.open(self.path) as outer:
            for number, name in enumerate(self.layers):
                with tarfile.open(fileobj=outer.extractfile(name)) as layer:
                    for m in layer:
                        yield number, m, (lambda m=m, layer=layer: layer.extractfile(m).read() if m.isfile() else b"")

    def files(self):
        "Path → member, as a container sees them"
        seen = {}
        for _, m, _ in self.members():
            path = "/" + m.name.strip("/").removeprefix("./")
            if os.path.basename(path).startswith(".wh."):
                gone = os.path.join(os.path.dirname(path), os.path.basename(path)[4:])
                seen = {p: v for p, v in seen.items() if p != gone and not p.startswith(gone + "/")}
            else:
                seen[path] = m
        return seen


def save(engine, image, path):
    "An image of the engine as a file, opened"
    with open(path, "wb") as f:
        for part in engine.images.get(image).save(chunk_size=2**20):
            f.write(part)
    with tarfile.open(path) as outer:
        [manifest] = json.load(outer.extractfile("manifest.json"))
        return Saved(str(path), json.load(outer.extractfile(manifest["Config"])), manifest["Layers"])


def file_findings(files, writable=("/tmp",)):
    "What is wrong with the files of an image, one sentence each"
    found = []
    for path, m in files.items():
        mode = m.mode & 0o7777
        if m.ischr() or m.isblk() or m.isfifo():
            found.append(f"device: {path}")
        if m.issym():
            continue
        if m.isfile() and mode & 0o6000:
            found.append(f"setuid or setgid: {path}")
        if mode & 0o022 and not (path in writable and mode == 0o1777):
            found.append(f"writable for others: {path} {mode:o}")
        if m.uid or m.gid:
            found.append(f"not of root: {path} {m.uid}:{m.gid}")
    tmp = files.get("/tmp")
    if not tmp or tmp.mode & 0o7777 != 0o1777:
        found.append("/tmp has not the mode 1777")
    for path in files:
        name, folder = os.path.basename(path), os.path.dirname(path)
        if re.search(r"/s?bin$", folder):
            for kind, names in dict(shell=SHELLS, manager=MANAGERS, compiler=COMPILERS, fetcher=FETCHERS).items():
                if re.sub(r"(-?[\d.]+)$", "", name) in names or name in names:
                    found.append(f"{kind}: {path}")
        if re.search(r"/(site|dist)-packages/(pip|ensurepip|wheel)(/__init__\.py|-[^/]*)$|/ensurepip/__init__\.py$", path):
            found.append(f"installer: {path}")
        if re.match(r"/var/(lib/apt|cache/apt|lib/dpkg/info)/.", path) or path.endswith(".whl"):
            found.append(f"left by an installer: {path}")
        if re.search(r"/\.git(/|$)|/\.env$|/id_(rsa|ed25519)$|/\.netrc$|/\.docker/|/\.aws/|\.ipynb$|/\.ssh(/|$)|/pip\.conf$", path):
            found.append(f"belongs to a workstation: {path}")
    return sorted(found)


def text_findings(saved):
    "What is wrong inside of some files, one sentence each"
    found = []
    for _, m, read in saved.members():
        path = "/" + m.name.strip("/")
        if path == "/etc/passwd":
            for line in read().decode().splitlines():
                fields = line.split(":")
                if not fields[6].endswith(("/nologin", "/false", "/sync")) or fields[1] not in ("x", "*", "!"):
                    found.append(f"can log in: {fields[0]}")
        elif path == "/etc/shadow":
            found += [f"has a password: {line.split(':')[0]}" for line in read().decode().splitlines() if line.split(":")[1].startswith("$")]
        elif path.endswith(".pyc"):
            if read()[4:8] != b"\x01\0\0\0":
                found.append(f"byte code with a time: {path}")
        elif m.isfile() and m.size < 2**20 and SECRETS.search(read()):
            found.append(f"looks like a secret: {path}")
        if m.mtime != 0:
            found.append(f"has a time: {path}")
    return sorted(set(found))


def config_findings(config):
    "What is wrong with an image's configuration, one sentence each"
    c, found = config["config"], []
    user = c.get("User") or "0"
    if not re.fullmatch(r"\d+(:\d+)?", user) or int(user.split(":")[0]) < 10000:
        found.append(f"user: {user!r} is not a number from 10000")
    entry, probe = c.get("Entrypoint") or [], (c.get("Healthcheck") or {}).get("Test") or ["NONE"]
    if not entry or re.search(r"(^|/)(ba|da)?sh$", entry[0]):
        found.append(f"entrypoint: {entry}")
    if probe[0] != "CMD" or "curl" in " ".join(probe):
        found.append(f"health check: {probe[:2]}")
    if c.get("StopSignal") != "SIGTERM":
        found.append(f"stop signal: {c.get('StopSignal')}")
    found += [f"port: {p}" for p in c.get("ExposedPorts") or {} if int(p.split("/")[0]) < 1024]
    env = dict(e.split("=", 1) for e in c.get("Env") or [])
    if env.get("PYTHONDONTWRITEBYTECODE") != "1" or env.get("HOME") != "/tmp":
        found.append("environment: PYTHONDONTWRITEBYTECODE=1 and HOME=/tmp")
    found += [f"environment: {n}" for n in env if re.search(r"(?i)secret|token$|passw|credential|proxy|index_url", n)]
    labels = c.get("Labels") or {}
    found += [f"label: {n} is missing" for n in ("org.opencontainers.image.title", "org.opencontainers.image.base.digest", "io.mlserve.package",
                                                 "io.mlserve.lock", "io.mlserve.base") if not labels.get(n)]
    if "@sha256:" not in labels.get("io.mlserve.base", ""):
        found.append("base: not by digest")
    if c.get("Volumes"):
        found.append("volumes: a volume that nobody mounted is a folder that is writable")
    return found


def containing(saved, *needles):
    "Where any of some texts stands: in a layer, in the history, in the configuration"
    needles, found = [n.encode() for n in needles], []
    for number, m, read in saved.members():
        if any(n in m.name.encode() or n in (m.linkname or "").encode() for n in needles):
            found.append(f"layer {number}: the name {m.name}")
        if m.isfile():
            content = read()
            found += [f"layer {number}: {m.name}" for n in needles if n in content]
    whole = json.dumps(saved.config).encode()
    return found + ["the configuration" for n in needles if n in whole]
