"""What torch.compile costs at the start: once with an empty cache, once with the cache that the first left."""
import json
import os
import subprocess
import sys
import tempfile

from gpu.models import CNN, encoder

CHILD = """
import json, sys, time
start = time.perf_counter()
import torch
from gpu.models import Kind, tensors
device, kind = sys.argv[1], Kind(sys.argv[2], '', *map(int, sys.argv[3:]))
module = kind.module().to(device)
inputs = tensors(kind, 32, device)
def once(f):
    with torch.inference_mode(): y = f(*inputs)
    if device != 'cpu': torch.cuda.synchronize()
    return y
want, loaded = once(module), time.perf_counter() - start
fast = torch.compile(module, dynamic=False)
got, ready = once(fast), time.perf_counter() - start
def best(f):
    taken = []
    for _ in range(10):
        begin = time.perf_counter(); once(f); taken.append(time.perf_counter() - begin)
    return sorted(taken)[5]
print(json.dumps(dict(loaded=loaded, ready=ready, eager=best(module), compiled=best(fast), differs=float((got - want).abs().max()))))
"""


def run(r):
    kind, ready = encoder(r) if r.gpu else CNN, {}
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": os.path.join(cache, "triton"), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
        for state in ("cold", "warm"):
            command = [sys.executable, "-W", "ignore", "-c", CHILD, r.device, kind.name, *map(str, (kind.tokens, kind.words, kind.layers))]
            done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if done.returncode:
                r.note(f"with a {state} cache it ended with {done.returncode}: {done.stderr[-600:]}")
                return
            found = json.loads(done.stdout.splitlines()[-1])
            ready[state] = found["ready"]
            r.row("torch.compile, 32 rows", cache=state, eager_ready_seconds=found["loaded"], ready_seconds=found["ready"], eager_ms=1000 * found["eager"],
                  compiled_ms=1000 * found["compiled"], differs=found["differs"])
    r.target("compiled", ready["warm"] / ready["cold"])
