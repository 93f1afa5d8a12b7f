"""Commands as a user types them, and where things are."""
import atexit
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
EXAMPLE = ROOT / "nbs/examples/digits.ipynb"


def values_of(env):
    "This environment, with other values; None takes one away"
    return {k: v for k, v in {**os.environ, **(env or {})}.items() if v is not None}


def run(*command, env=None, timeout=600, cwd=ROOT):
    "Run a command; its exit code, stdout and stderr"
    return subprocess.run([str(c) for c in command], env=values_of(env), cwd=cwd, timeout=timeout, capture_output=True, text=True)


READY = multiprocessing.get_context("forkserver")  # MLflow and its kin, imported once: seconds of a processor that hundreds of commands need not pay again
READY.set_forkserver_preload(["pytest", "mlflow", "mlflow.pyfunc", "papermill", "nbclient", "docker", "pandas", "mlserve.cli"])
COMMAND = Path(sys.executable).parent / "mlserve"


def act(code, arguments, env, cwd, out, err):
    "Be a process that runs some code"
    for number, name in enumerate((out, err), 1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = arguments
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()


def forked(code, *arguments, env=None, timeout=600, cwd=ROOT):
    "Run code in a fork of a process that has imported what commands need; its exit code, stdout and stderr"
    arguments = [str(COMMAND), *map(str, arguments)]
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = READY.Process(target=act, args=(code, arguments, values_of(env), cwd, out.name, err.name))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout)
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read(), err.read())


def mlserve(*arguments, env=None, **kwargs):
    "Run the command line as a user does; with code of another place it is a process from the start"
    if "PYTHONPATH" in values_of(env):
        return run(COMMAND, *arguments, env=env, **kwargs)
    return forked("from mlserve.cli import main; main()", *arguments, env=env, **kwargs)


def start_mlserve(*arguments, env):
    "A command that goes on while the test looks; ctrl-C reaches it alone, and also where the tests run in the background, which ignores it"
    command = [str(c) for c in (COMMAND, *arguments)]
    return subprocess.Popen(command, env=values_of(env), stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def interrupted(process, sign):
    "Its exit code and stderr, after a signal"
    process.send_signal(sign)
    _, stderr = process.communicate(timeout=30)
    return process.returncode, stderr


def last_json(stderr):
    "The object on the last line of stderr"
    return json.loads(stderr.strip().splitlines()[-1])
