"""Open packages in child processes, for tests that kill, race or watch them: one child for each line of stdin, `START` to go."""
import json
import os
import signal
import sys

from mlserve.errors import MlserveError
from mlserve.serving.delivery import resolver as source
from mlserve.settings import read_settings


def child(stop):
    "Open the package of the environment; the exit code is the server's"
    if stop:
        os.kill(os.getpid(), signal.SIGSTOP)  # until a tracer is attached
    def say(event, **fields):
        os.write(2, (json.dumps({"event": event, **fields}) + "\n").encode())
    try:
        source.open_package(read_settings(), say)
    except MlserveError as e:
        os.write(2, f"{e}\n".encode())
        os._exit(e.code)
    os._exit(0)


def main():
    "Imports are paid once: each request is a fork"
    for module in ("gcsfs.core", "s3fs", "aiobotocore.httpsession", "mlserve.serving.model"):
        __import__(module)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        pids = []
        for _ in range(asked.get("times", 1)):
            pid = os.fork()
            if not pid:
                os.environ.update(asked["env"])
                fd = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(fd, 2)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                child(asked.get("stop", False))
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]), flush=True)


if __name__ == "__main__":
    main()
