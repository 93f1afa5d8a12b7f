#!/usr/bin/env python3
"""The server's processor time of a request over gRPC, beside V2 binary and JSON over HTTP, asked in turn in one run.

    grpc_cost.py FOLDER [--rounds 7]

FOLDER keeps the packages. One client on one connection of each kind; the model answers the first number of its row, so that what is measured is the way to it.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from large import Server, binary, cpu, free_port, package, post  # noqa: E402

from mlserve.serving.grpc.messages import write_message  # noqa: E402


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("root", type=Path)
    ap.add_argument("--rounds", type=int, default=7)
    a = ap.parse_args()
    a.root.mkdir(parents=True, exist_ok=True)
    for size, count in ((400, 300), (40_000, 300), (400_000, 60)):
        port = free_port()
        env = {"MLSERVE_PACKAGE": str(package(a.root.resolve(), "in", size)), "MLSERVE_HOST": "127.0.0.1", "MLSERVE_PORT": "{port}", "MLSERVE_GRPC_PORT": str(port),
               "MLSERVE_PROVE_SECONDS": "3600", "MLSERVE_THREADS": "1", "MLSERVE_KEEP_ALIVE_SECONDS": "3600"}
        with Server([sys.executable, "-m", "mlserve.serving.server"], env, b"/v2/health/ready", Path(__file__).resolve().parent.parent) as server:
            x = np.ones((1, size // 4), "f4")
            tensor = {"name": "x", "datatype": "FP32", "shape": x.shape}
            message = write_message("ModelInferRequest", model_name="big", inputs=[tensor], raw_input_contents=[x.tobytes()])
            typed = write_message("ModelInferRequest", model_name="big", inputs=[tensor | {"contents": {"fp32_contents": x.ravel()}}])
            text = json.dumps({"inputs": [{"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}]}).encode()
            stub = grpc.insecure_channel(f"127.0.0.1:{port}").unary_unary("/inference.GRPCInferenceService/ModelInfer")
            wide, plain = binary(x), post(b"/v2/models/big/infer", [text], content_type=b"application/json")
            ways = {"V2 binary over HTTP": lambda: server.ask(b"".join(wide)), "V2 JSON over HTTP": lambda: server.ask(b"".join(plain)),
                    "V2 over gRPC, raw contents": lambda: stub(message)}
            if len(typed) < 2**18:  # more is read in a process that has ended by the time its seconds are asked for
                ways["V2 over gRPC, numbers"] = lambda: stub(typed)
            taken = {name: [] for name in ways}
            for turn in range(a.rounds + 1):
                for name, ask in ways.items():
                    start = cpu(server.process.pid)
                    for _ in range(count):
                        ask()
                    if turn:
                        taken[name].append((cpu(server.process.pid) - start) / count / 1e3)
                    time.sleep(0.02)
            medians = {name: statistics.median(v) for name, v in taken.items()}
            for name, value in medians.items():
                print(f"| {size:,} B | {name} | {value:,.0f} | {value / medians['V2 binary over HTTP']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
