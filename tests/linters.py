"""Tools that read what we generate; those whose dependencies conflict with ours lie below `state/tools`, which `make test-tools` fills."""
import json
import sys

import pytest
from commands import ROOT, run


@pytest.fixture(scope="session")
def checkov():
    "Asks the linter about a folder: the ids of what failed, and how many passed, were skipped and could not be read"
    home = ROOT / "state/tools/checkov"
    if not (home / "bin/checkov").exists():
        for command in ([sys.executable, "-m", "venv", home], [home / "bin/pip", "install", "-q", "--disable-pip-version-check", "checkov==3.3.30"]):
            done = run(*command, timeout=900)
            assert done.returncode == 0, done.stderr

    def ask(folder, *frameworks):
        done = run(home / "bin/checkov", "--framework", *frameworks, "--skip-download", "--quiet", "--compact", "-o", "json", "-d", folder,
                   env={"LOG_LEVEL": "ERROR", "BC_API_KEY": None})
        reports = json.loads(done.stdout)
        reports = reports if isinstance(reports, list) else [reports]
        summary = {key: sum(r["summary"][key] for r in reports) for key in ("passed", "skipped", "parsing_errors")}
        return summary, [(c["check_id"], c["file_path"]) for r in reports for c in r["results"]["failed_checks"]]
    return ask


@pytest.fixture(scope="session")
def kubernetes_validate():
    "Asks about files of Kubernetes objects, strictly: what is wrong with each, by its name"
    home, pins = ROOT / "state/tools/kubernetes-validate", ROOT / "tests/clients/kubernetes-validate.txt"
    if not (home / "kubernetes_validate").exists():
        done = run(sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target", home, "-r", pins, timeout=900)
        assert done.returncode == 0, done.stderr

    def ask(*files):
        done = run(sys.executable, "-m", "kubernetes_validate", "--strict", *files, env={"PYTHONPATH": str(home)})
        text = done.stdout + done.stderr
        wrong = {f.name: [line for line in text.splitlines() if f" {f} " in line and "passed for resource" not in line] for f in files}
        assert all(f" {f} " in text for f in files), text
        return {name: lines for name, lines in wrong.items() if lines}
    return ask


@pytest.fixture(scope="session")
def promtool():
    "Prometheus's own tool for rules, out of Debian's package"
    home = ROOT / "state/tools/prometheus"
    if not (home / "usr/bin/promtool").exists():
        home.mkdir(parents=True, exist_ok=True)
        done = run("apt-get", "download", "-q", "prometheus", cwd=home, timeout=900)
        if done.returncode:  # the lists of packages are not here yet
            run("apt-get", "update", "-q", timeout=900)
            done = run("apt-get", "download", "-q", "prometheus", cwd=home, timeout=900)
        assert done.returncode == 0, done.stderr
        done = run("dpkg", "-x", *home.glob("prometheus_*.deb"), home)
        assert done.returncode == 0, done.stderr
    return home / "usr/bin/promtool"
