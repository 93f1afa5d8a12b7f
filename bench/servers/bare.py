#!/usr/bin/env python3
"""What nobody can avoid: a process that imports torch, loads a model and answers once.

    bare.py MODELS_DIR [--models a,b] [--threads 1] >> results.jsonl

One JSON line per model: seconds from the start of the process to the answer, resident memory and proportional set size, and milliseconds of one call.
"""
import argparse
import json
import subprocess
import sys
import time

CHILD = """import resource, sys, time, warnings
warnings.simplefilter('ignore')
import numpy as np, torch
torch.set_num_threads(int(sys.argv[3]))
model, x = torch.jit.load(sys.argv[1]).eval(), torch.from_numpy(np.load(sys.argv[2])['x'])
with torch.inference_mode():
    model(x)
    print('answered', flush=True)
    taken = []
    for _ in range(400):
        start = time.perf_counter(); model(x).numpy(); taken.append(time.perf_counter() - start)
rss = int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() / 2**20
pss = sum(int(l.split()[1]) for l in open('/proc/self/smaps_rollup') if l.startswith('Pss:')) / 2**10
print(rss, pss, sorted(taken)[200] * 1e3, flush=True)"""

ap = argparse.ArgumentParser()
ap.add_argument("dir")
ap.add_argument("--models", default="mlp128,cnn")
ap.add_argument("--threads", default="1")
a = ap.parse_args()
for name in a.models.split(","):
    start = time.perf_counter()
    p = subprocess.Popen([sys.executable, "-c", CHILD, f"{a.dir}/{name}.pt", f"{a.dir}/{name}.npz", a.threads], stdout=subprocess.PIPE, text=True)
    p.stdout.readline()
    seconds = time.perf_counter() - start
    rss, pss, call = map(float, p.stdout.readline().split())
    p.wait()
    print(json.dumps({"kind": "bare", "model": name, "startup_s": round(seconds, 3), "rss_mib": round(rss, 1), "pss_mib": round(pss, 1), "call_ms": round(call, 4)}), flush=True)
