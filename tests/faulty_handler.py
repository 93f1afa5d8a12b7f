"A model's own steps that do what they are asked to, before the model or behind it: `FAKE_HANDLER` of the fake server"
import asyncio
import contextlib
import ctypes
import io
import os
import signal
import socket
import sys
import threading
import time

import numpy as np

RAISED = [SystemExit(0), KeyboardInterrupt(), GeneratorExit(), BaseException("any"), StopIteration(), asyncio.CancelledError(), MemoryError(), RecursionError()]
UNTIL = threading.Event()


def fork():
    "A child that lives on, as a helper of a library would"
    if not os.fork():
        time.sleep(60)
        os._exit(0)


def stop_child():
    "A child that is told to end, as `multiprocessing.Pool.terminate` does"
    if not (pid := os.fork()):
        time.sleep(60)
        os._exit(0)
    time.sleep(0.3)
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)


def hide_stderr():
    with contextlib.redirect_stderr(io.StringIO()):
        time.sleep(1)



def raised_late():
    "An exception for this thread that comes when its job is over, as a time limit's that was not taken back"
    me = ctypes.c_ulong(threading.get_ident())
    threading.Timer(0.2, ctypes.pythonapi.PyThreadState_SetAsyncExc, (me, ctypes.py_object(TimeoutError))).start()


def forget():
    for name in [n for n in sys.modules if n.startswith("mlserve")]:
        del sys.modules[name]


class Slow(Exception):
    def __str__(self):
        time.sleep(2)
        return "slow"


class Tee:
    "What stands in for stdout, and has not all of it"
    write = len


def numbers():
    "Multiply matrices, and say how many threads that started"
    before = len(os.listdir("/proc/self/task"))
    np.ones((500, 500)) @ np.ones((500, 500))
    raise ValueError(f"{len(os.listdir('/proc/self/task')) - before} more threads")


DEEDS = {"late": raised_late, "modules": forget, "timeout": lambda: socket.setdefaulttimeout(10), "slow": lambda: (_ for _ in ()).throw(Slow()),
         "tee": lambda: setattr(sys, "stdout", Tee()), "no stdout": lambda: setattr(sys, "stdout", None),
         "exit 0": lambda: os._exit(0), "exit 5": lambda: os._exit(5), "abort": os.abort, "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
         "terminate": lambda: signal.raise_signal(signal.SIGTERM), "hang": UNTIL.wait, "fork": fork, "fork and return": lambda: [os.fork() for _ in range(2)],
         "stop child": stop_child, "directory": lambda: os.chdir("/proc/self"), "stderr": hide_stderr, "close stderr": lambda: os.close(2),
         "signals": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals)), "long": lambda: (_ for _ in ()).throw(ValueError("\U0001f600" * 5000)),
         "numbers": numbers,
         "threads": lambda: threading.Thread(target=time.sleep, args=(60,)).start(), "umask": lambda: os.umask(0o777), "quit in a thread": lambda: threading.Thread(target=sys.exit).start()}


def do(deed):
    if deed.isdigit():
        raise RAISED[int(deed)]
    DEEDS.get(deed, lambda: None)()


def preprocess(request: list[str]) -> dict:
    do(request[0])
    return {"x": np.array([[1, 0]], np.float32)}


def postprocess(outputs: dict, request: list[str]) -> list[float]:
    do(request[1] if len(request) > 1 else "")
    return outputs["y"][0].tolist()
