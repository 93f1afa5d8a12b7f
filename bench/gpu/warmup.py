"""What the first request costs: in a fresh process without warm-up, and behind a server that says ready."""
import json
import re
import subprocess
import sys
import time

from gpu.models import CNN, encoder
from gpu.record import median
from gpu.serving import Server, Wire, body_of, packed

COLD = """
import json, sys, time
from pathlib import Path
from mlserve.package import load_package
from mlserve.serving.model.device import claim
from mlserve.serving.model import load_model
from mlserve.serving.model.warmup import warm
start = time.perf_counter()
package = load_package(sys.argv[1])
model = load_model(package, claim(sys.argv[2]))
loaded = time.perf_counter()
report = warm(model, package, 32)
print(json.dumps(dict(load=loaded - start, warm=time.perf_counter() - loaded, first_ms=report.first_ms, seconds=report.seconds)))
"""


def cold(r, kind):
    "The first call of a fresh process beside a warm one"
    command = [sys.executable, "-W", "ignore", "-c", COLD, str(kind.package(r.work).path), "cuda" if r.gpu else "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    found = json.loads(done.stdout.splitlines()[-1])
    warm = 1000 * found["seconds"]["1"]
    r.row("a fresh process, one row", model=kind.name, load_seconds=found["load"], warm_seconds=found["warm"], first_ms=found["first_ms"], warm_ms=warm,
          first_by_warm=found["first_ms"] / warm, ms_by_rows={k: round(1000 * v, 3) for k, v in found["seconds"].items()})


PROBE = b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\n\r\n"


def rested(wire, request):
    "How long an answer takes when nothing was asked for a twentieth of a second, as before the first"
    time.sleep(0.05)
    return wire.seconds(request)


def first_request(r, kind, probed=False):
    """First request after ready, on a new connection or on one that was asked for liveness, beside those after a pause (a processor that slept, and
    caches that others used, are paid by each of them) and those without one; then the first of each size"""
    with Server(r, kind.package(r.work).path, max_batch=32) as server:
        ready, wire = server.ready(90), Wire(server.port)
        one = packed(*body_of(kind, kind.rows(1)))
        if probed:
            wire.ask(PROBE)
        first = wire.seconds(one)
        usual = median([wire.seconds(one) for _ in range(r.several(300, 30))])
        paced = median([rested(wire, one) for _ in range(r.several(20, 8))])
        requests = {n: packed(*body_of(kind, kind.rows(n))) for n in (2, 3, 5, 8, 16, 31, 32)}
        starts, usuals = {}, {}
        for n, request in requests.items():
            starts[n], usuals[n] = wire.seconds(request), median([wire.seconds(request) for _ in range(r.several(40, 5))])
        again = {n: wire.seconds(request) for n, request in requests.items()}  # the same changes of size, which are not the first any more
        warmed, outside = server.events("warmed")[-1], re.search(r"^mlserve_outside_graphs_total (\S+)", server.get("/metrics"), re.M)
        r.row("a server over HTTP", model=kind.name, connection="probed before" if probed else "new", ready_seconds=ready,
              first_ms=1000 * first, paced_p50_ms=1000 * paced, p50_ms=1000 * usual, first_by_paced=first / paced, first_by_p50=first / usual,
              first_of_a_size={n: round(s / usuals[n], 2) for n, s in starts.items()}, again={n: round(s / usuals[n], 2) for n, s in again.items()}, max_batch=server.events("capacity")[-1]["max_batch"],
              graphs=warmed["graphs"], left_out=warmed["left_out"], outside_graphs=outside[1])
        return first / paced


def run(r):
    kinds, ratios = (CNN, encoder(r)), {}
    for i in range(r.several(2, 1)):
        for kind in kinds:
            if ratio := r.tried(first_request, r, kind):
                ratios.setdefault(kind.name, []).append(ratio)
        if len(ratios) == len(kinds):
            r.target("first_request", max(map(median, ratios.values())))
        if not i:
            for kind in kinds:
                r.tried(cold, r, kind)
    for kind in kinds:
        r.tried(first_request, r, kind, True)
