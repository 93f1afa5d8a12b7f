"""Commands as a user types them, and where things are."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
EXAMPLE = ROOT / "nbs/examples/digits.ipynb"


def run(*command, env=None, timeout=600, cwd=ROOT):
    "Run a command; its exit code, stdout and stderr"
    values = {k: v for k, v in {**os.environ, **(env or {})}.items() if v is not None}
    return subprocess.run([str(c) for c in command], env=values, cwd=cwd, timeout=timeout, capture_output=True, text=True)


def mlserve(*arguments, **kwargs):
    "Run the command line as a user does"
    return run(Path(sys.executable).parent / "mlserve", *arguments, **kwargs)


def start_mlserve(*arguments, env):
    "A command that goes on while the test looks; ctrl-C reaches it alone, and also where the tests run in the background, which ignores it"
    command = [str(c) for c in (Path(sys.executable).parent / "mlserve", *arguments)]
    return subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def interrupted(process, sign):
    "Its exit code and stderr, after a signal"
    process.send_signal(sign)
    _, stderr = process.communicate(timeout=30)
    return process.returncode, stderr


def last_json(stderr):
    "The object on the last line of stderr"
    return json.loads(stderr.strip().splitlines()[-1])
