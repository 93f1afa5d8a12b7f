#!/usr/bin/env python3
"""What one row costs the server: processor time of a request by `/predict`, beside the runtime itself, asked in turn in one run.

    row_cost.py FOLDER [--rounds 9] [--count 300] [--before TREE] [--tables]

FOLDER keeps the packages. One client on one connection, so that no request shares a batch. *Itself* is one run of the same row in the runtime alone, with
arrays made before (`InferenceSession.run`; set, invoke and get of LiteRT's interpreter), one thread. The MLP is one model of Keras in two forms: ONNX by
`save_package`, and the `.tflite` file of TensorFlow's converter. Keras lies in `state/tools`, where `make models` puts it. *The floor* is a protocol of
uvloop that reads a body and writes two bytes: what the kernel and an event loop take of a request, which a load of the machine makes several times as much.
*The runtime in the floor* is that protocol with one run of the runtime for each request: a run that follows upon a wait finds the caches cold and costs
more than one in a loop, whoever the server is. What the server costs beside it is the whole less that, with the floor's own share given back.
The last column is the same request on sixteen connections at once, whose rows share batches. TREE is an earlier tree of this project, measured in the
same run. Medians of the rounds.
"""
import argparse
import contextlib
import json
import socket
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench")]
import models  # noqa: E402
from large import PROTOCOL, Server, cpu, post  # noqa: E402
from test_tables import BOTH, HELD, MODELS, TRAIN  # noqa: E402

from mlserve.package import golden, load_package, load_program, save_package  # noqa: E402
from mlserve.package.convert.columns import to_arrays  # noqa: E402

FLOORED = ", in the floor"
TABLES = {"logistic regression": "logistic", "random forest": "forest", "hist gradient boosting": "hist gradient boosting"}


def table(folder, name):
    "A pipeline with texts and gaps: its package, the body of one row, and the row as arrays"
    (frame, texts, _), (held, _, _) = TRAIN, HELD
    if not folder.exists():
        save_package(MODELS[name].fit(frame, texts), folder, name="table", inputs=frame, outputs=BOTH)
    package, row = load_package(folder), held.dropna().head(1)
    return package, row.to_dict("records"), to_arrays(row, package.inputs)


def networks(root):
    "The MLP of Keras as ONNX and as a file for LiteRT: package, body and row of each"
    places = {"MLP of Keras, ONNX": root / "mlp-onnx", "the same, LiteRT": root / "mlp-lite"}
    if not all(place.exists() for place in places.values()):
        sys.path.append(models.KERAS)
        model, _, [example], _, _ = models.keras_mlp()
        files = model, models.lite(model, root, None)
        for place, file in zip(places.values(), files):
            save_package(file, place, name="mlp", inputs=example, outputs=["answer"])
    row = np.random.default_rng(1).normal(size=(1, 6)).astype("f4")
    for name, place in places.items():
        yield name, load_package(place), row.tolist(), {"x": row}


def itself(package, arrays):
    "A run of one row in the runtime alone"
    program = load_program(package, threads=1)
    if package.format == "onnx":
        feeds = {n: np.array([[text.decode() for text in row] for row in a], object) if a.dtype == object else a for n, a in arrays.items()}
        names = [spec.name for spec in package.outputs]
        return lambda: program.session.run(names, feeds)
    from ai_edge_litert.interpreter import Interpreter
    interpreter, [array] = Interpreter(str(package.path / package.file), num_threads=1), arrays.values()
    interpreter.allocate_tensors()
    takes, gives = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run():
        interpreter.set_tensor(takes, array)
        interpreter.invoke()
        return interpreter.get_tensor(gives)
    return run


def run_of(folder):
    "A run of the first golden row in the runtime alone, for a process that has nothing else"
    package = load_package(folder)
    return itself(package, {name: a[:1] for name, a in golden(package)[0].items()})


def floor(package=None):
    "The bare protocol, with or without a run of the runtime for each request"
    code = PROTOCOL
    if package is not None:
        start = f"import sys; sys.path[:0] = [{str(ROOT / 'bench')!r}]; import row_cost; run = row_cost.run_of({str(package.path)!r})\n"
        code = start + PROTOCOL.replace("self.t.write(", "run(); self.t.write(")
    return Server([sys.executable, "-c", code, "{port}"], {})


def serving(package, tree):
    env = {"MLSERVE_PACKAGE": str(package.path), "MLSERVE_HOST": "127.0.0.1", "MLSERVE_PORT": "{port}", "MLSERVE_PROVE_SECONDS": "3600",
           "MLSERVE_KEEP_ALIVE_SECONDS": "3600", "MLSERVE_DEVICE": "cpu", "MLSERVE_THREADS": "1"}
    return Server([sys.executable, "-m", "mlserve.serving.server"], env, b"/v2/health/ready", tree)


def together(server, request, clients=16):
    "Processor time of a request, in µs, where so many connections ask at once: 300 of each"
    sockets, left, spent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(clients)], 300, 0
    for turn in range(left + 20):
        if turn == 20:
            spent = cpu(server.process.pid)
        for s in sockets:
            s.sendall(request)
        for s in sockets:
            assert s.recv(65536).startswith(b"HTTP/1.1 200")
    for s in sockets:
        s.close()
    return (cpu(server.process.pid) - spent) / left / clients / 1e3


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("root", type=Path)
    ap.add_argument("--rounds", type=int, default=9)
    ap.add_argument("--count", type=int, default=300)
    ap.add_argument("--before")
    ap.add_argument("--tables", action="store_true", help="leave out what needs Keras")
    a = ap.parse_args()
    root = a.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    kinds = [(name, *table(root / name.replace(" ", "-"), key)) for name, key in TABLES.items()] + ([] if a.tables else [*networks(root)])
    trees = {"": str(ROOT)} | ({", before": a.before} if a.before else {})
    with contextlib.ExitStack() as stack:
        ways, alone = {}, {}
        for name, package, body, arrays in kinds:
            request = b"".join(post(b"/predict", [json.dumps({"inputs": body}).encode()], content_type=b"application/json"))
            for tree, folder in trees.items():
                ways[name + tree] = stack.enter_context(serving(package, folder)), request
                alone[name + tree] = itself(package, arrays)
            ways[name + FLOORED], alone[name + FLOORED] = (stack.enter_context(floor(package)), request), lambda: None
        ways["the floor"], alone["the floor"] = (stack.enter_context(floor()), request), lambda: None
        for name, (server, request) in ways.items():
            assert server.ask(request).startswith(b"HTTP/1.1 200"), name
        asked, own = {name: [] for name in ways}, {name: [] for name in ways}
        for turn in range(a.rounds + 1):
            for name, (server, request) in ways.items():
                start = cpu(server.process.pid)
                for _ in range(a.count):
                    server.ask(request)
                spent = cpu(server.process.pid) - start
                start = time.thread_time_ns()
                for _ in range(a.count):
                    alone[name]()
                if turn:
                    asked[name].append(spent / a.count / 1e3)
                    own[name].append((time.thread_time_ns() - start) / a.count / 1e3)
                time.sleep(0.02)
        many = {name: [] for name in ways}
        for _ in range(3):
            for name, (server, request) in ways.items():
                many[name].append(together(server, request))
    head = "model", "by `/predict`, µs", "the runtime itself, µs", "beside it, µs", "least and most of a round", "the runtime in the floor, µs", "beside that, µs", "16 at once, µs"
    print("| " + " | ".join(head) + " |\n| --- | --: | --: | --: | --: | --: | --: | --: |")
    for name in [way for way in ways if not way.endswith(FLOORED)]:
        beside = [whole - run for whole, run in zip(asked[name], own[name])]
        cold = asked.get(name.removesuffix(", before") + FLOORED, asked["the floor"])
        less = [whole - run + least for whole, run, least in zip(asked[name], cold, asked["the floor"])]
        numbers = statistics.median(asked[name]), statistics.median(own[name]), statistics.median(beside)
        print(f"| {name} | " + " | ".join(f"{n:.0f}" if n > 20 else f"{n:.1f}" for n in numbers) + f" | {min(beside):.0f}–{max(beside):.0f} | {statistics.median(cold):.0f} | {statistics.median(less):.0f} | {statistics.median(many[name]):.0f} |")


if __name__ == "__main__":
    main()
