"""The real server with a model made for tests: the second number of a row says what the model does with it.

Only `mlserve.serving.model` is replaced, before the workers are forked; connection, endpoints, scheduler, supervisor and signals are the real ones."""
import ctypes
import gc
import os
import signal
import sys
import time
import types

RAISE, FEWER, SLEEP, HOLD, KILL, STOP, NAN = range(-1007, -1000)
WAIT = 1000  # 1000.5 waits half a second
OOM, STICKY = -1009, -1008  # memory of the device, and an error of CUDA


def note(path):
    "What writes lines to a file, from many processes"
    to = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    return lambda lines: os.write(to, lines)


def accepted(write):
    "Have the id of each request noted when its work begins"
    from mlserve.serving.http.inference import Inference
    start = Inference.start

    def noted(self, route, headers, body, done, id=b"", *more):
        write(id + b"\n")
        return start(self, route, headers, body, done, id, *more)
    Inference.start = noted


class OutOfMemoryError(RuntimeError):
    "As torch names it"


class Model:
    where, placement, program = "cpu", None, None  # nothing of torch, which could be recorded
    seen = staticmethod(note(os.environ["FAKE_SEEN"])) if "FAKE_SEEN" in os.environ else None

    def predict(self, arrays):
        x = arrays["x"]
        if self.seen:
            self.seen(b"".join(b"%d\n" % v for v in x[:, 0]))
        time.sleep(float(os.environ.get("FAKE_SECONDS", 0.002)))  # 0: quick enough for the event loop
        for command in x[:, 1]:
            if command >= WAIT:
                time.sleep(float(command) - WAIT)
            elif command == RAISE:
                raise RuntimeError("canary-in-the-model")
            elif command == OOM:
                raise OutOfMemoryError("CUDA out of memory.")
            elif command == STICKY:
                raise RuntimeError("CUDA error: device-side assert triggered")
            elif command == FEWER:
                return {"y": x[1:] * np.float32(2)}
            elif command == SLEEP:
                time.sleep(3600)
            elif command == HOLD:
                ctypes.PyDLL(None).sleep(3600)  # native code that keeps the interpreter's lock
            elif command == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            elif command == STOP:
                os.kill(os.getpid(), signal.SIGSTOP)
        y = x * np.float32(2)
        y[x[:, 1] == NAN] = np.nan
        return {"y": y}

    forward = predict

    def devices(self):
        return [self.where]

    def sync(self):
        pass


def load_model(package, device, threads=None, cache="", max_batch=32):
    global np
    import numpy as np  # in the worker, as the real one: its library reads the number of threads when it is loaded
    if os.environ.get("FAKE_COLLECTOR") == "off":
        gc.enable = lambda: None  # what is called once the model is ready
    time.sleep(float(os.environ.get("FAKE_LOAD_SECONDS", 0)))
    model = Model()
    if device.kind == "cuda":
        model.where = f"cuda:{device.index}"
        model.placement = {"parameters": {model.where: 1}, "outputs": {"y": model.where}}
    if path := os.environ.get("FAKE_HANDLER"):
        from pathlib import Path

        from mlserve.package import handler
        model.handler = handler._handler(handler._import(Path(path), Path(path).read_bytes()))
    return model


if __name__ == "__main__":
    import mlserve.serving
    stand_in = sys.modules["mlserve.serving.model"] = types.ModuleType("mlserve.serving.model")
    stand_in.load_model, stand_in.__path__ = load_model, [f"{mlserve.serving.__path__[0]}/model"]  # its other rooms are the real ones
    if "FAKE_ACCEPTED" in os.environ:
        accepted(note(os.environ["FAKE_ACCEPTED"]))
    if plant := os.environ.get("FAKE_PLANT"):
        import mutations
        mutations.sow(plant)
    from mlserve.serving.server import main
    main()
