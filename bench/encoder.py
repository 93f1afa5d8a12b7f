#!/usr/bin/env python3
"""Sixty-four clients of a transformer encoder, beside the model's own loop: what serving leaves of the machine.

    encoder.py FOLDER [--rounds 5] [--seconds 4]

MiniLM's architecture in four layers, 64 tokens a row, two widths; FOLDER keeps the packages. *Its own loop* runs the saved program on batches of a size
without end, in a process of its own, with as many threads as the server has: in one batch at a time (as torch splits it), or in as many loops as threads;
the best of all sizes and of both ways counts. *Served* are rows a second at 64 connections, one row a request, V2 binary, by `wrk` on the same machine,
whose own work is in the server's disadvantage. Every round runs all in turn; medians of the rounds.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench" / part) for part in ("gpu", ".", "servers")]
from large import Server, cpu  # noqa: E402
from run import wrk  # noqa: E402

SIZES, TOKENS, LAYERS, CLIENTS = (1, 4, 8, 16, 32, 64), 64, 4, 64
LOOP = """import sys, time, torch
from concurrent.futures import ThreadPoolExecutor
from mlserve.package import load_package, load_program
threads, loops, size, seconds = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
torch.set_num_threads(threads // loops)
model = load_program(load_package(sys.argv[1])).module
rows = [torch.randint(1, 30522, (size, 64)), torch.ones(size, 64, dtype=torch.int64)]
def run(seconds):
    torch.set_num_threads(threads // loops)
    count, start = 0, time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - start < seconds:
            model(*rows)
            count += size
    return count / (time.perf_counter() - start)
with ThreadPoolExecutor(loops) as pool:
    list(pool.map(run, [0.3] * loops))
    print(sum(pool.map(run, [seconds] * loops)))"""


def package(folder, width):
    "The encoder as a package, with random weights"
    import torch
    from models import Encoder

    from mlserve.package import save_package
    if not folder.exists():
        torch.manual_seed(0)
        model = Encoder(width=width, heads=width // 32, inner=4 * width, layers=LAYERS).eval()
        rows = {"ids": torch.randint(1, 30522, (8, TOKENS)), "mask": torch.ones(8, TOKENS, dtype=torch.int64)}
        save_package(model, folder, name="encoder", inputs=rows, outputs=["vector"])
    return folder


def body():
    "One row as a V2 binary request"
    tensors = {"ids": np.arange(1, TOKENS + 1)[None], "mask": np.ones((1, TOKENS), "i8")}
    entries = [{"name": n, "shape": x.shape, "datatype": "INT64", "parameters": {"binary_data_size": x.nbytes}} for n, x in tensors.items()]
    head = json.dumps({"inputs": entries, "parameters": {"binary_data_output": True}}).encode()
    return len(head), b"".join([head, *(x.tobytes() for x in tensors.values())])


def served(server, folder, seconds):
    "Rows a second at 64 clients, and the server's microseconds of a processor for each"
    head, data = body()
    (folder / "body").write_bytes(data)
    (folder / "headers").write_text(f"content-type: application/octet-stream\ninference-header-content-length: {head}\n")
    before = cpu(server.process.pid)
    result = wrk(server.port, "/v2/models/encoder/infer", folder, CLIENTS, seconds)
    assert not sum(result[k] for k in result if k.startswith("err")), result
    return result["requests"] / result["seconds"], (cpu(server.process.pid) - before) / result["requests"] / 1e3, result["p99_ms"]


def looped(place, threads, loops, size, seconds):
    told = subprocess.run([sys.executable, "-c", LOOP, str(place), str(threads), str(loops), str(size), str(seconds)], capture_output=True, text=True, check=True)
    return float(told.stdout)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=Path)
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--seconds", type=int, default=4)
    ap.add_argument("--widths", type=int, nargs="*", default=[128, 384])
    a = ap.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    print("| width | threads | best loop: rows/s | batch, loops | served: rows/s | of the loop | least and most of a round | p99, ms | CPU of a row, µs |")
    print("| --: | --: | --: | --- | --: | --: | --- | --: | --: |")
    for width in a.widths:
        place = package(a.folder / f"encoder-{width}", width)
        for threads in (1, 2):
            env = {"MLSERVE_PACKAGE": str(place), "MLSERVE_HOST": "127.0.0.1", "MLSERVE_PORT": "{port}", "MLSERVE_DEVICE": "cpu", "MLSERVE_THREADS": str(threads)}
            ways = [(loops, size) for loops in {1, threads} for size in SIZES]
            loops, rounds = {way: [] for way in ways}, []
            with Server([sys.executable, "-m", "mlserve.serving.server"], env, b"/v2/health/ready") as server:
                served(server, a.folder, 2)
                for _ in range(a.rounds):
                    for way in ways:
                        loops[way].append(looped(place, threads, *way, a.seconds / 4))
                    rounds.append((*served(server, a.folder, a.seconds), max(told[-1] for told in loops.values())))
            best = max(loops, key=lambda way: statistics.median(loops[way]))
            rate, floor = (statistics.median(values) for values in ([r[0] for r in rounds], loops[best]))
            ratios = [r[0] / r[3] for r in rounds]
            print(f"| {width} | {threads} | {floor:,.0f} | {best[1]}, {best[0]} | {rate:,.0f} | {rate / floor:.2f} | {min(ratios):.2f}–{max(ratios):.2f} | "
                  f"{statistics.median(r[2] for r in rounds):.0f} | {statistics.median(r[1] for r in rounds):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
