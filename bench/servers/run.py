#!/usr/bin/env python3
"""Measure model servers side by side on this machine. Everything on 127.0.0.1.

    run.py --root DIR --out results.jsonl [--servers a,b] [--models m,n] [--rounds 3]
           [--seconds 5] [--warm 5] [--conc 1,8,64] [--no-off] [--check-only] [--adapters DIR]

DIR holds venvs/<name>/ (one virtual env per server), models/ (make_models.py), and gets
logs/ and work/. Servers are interleaved: every round measures each model on every
server once, each on a fresh start. A server whose answer differs from the in-process
one by more than 1e-4 is not measured. Needs `wrk` on PATH. The Python that runs this
needs numpy, torch and mlserve. One adapter file per server lies in adapters/.
"""
import argparse
import concurrent.futures
import http.client
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from pathlib import Path

import numpy as np

from common import BENCH, MODELS, Ctx

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
ADAPTERS = [BENCH / "adapters"]


# ---------------------------------------------------------------- processes
def mine(marker):
    """Pids of all processes that carry our marker in their environment."""
    out, needle = [], f"BENCH_MARK={marker}".encode()
    for p in os.listdir("/proc"):
        if p.isdigit():
            try:
                with open(f"/proc/{p}/environ", "rb") as f:
                    if needle in f.read().split(b"\0"):
                        out.append(int(p))
            except OSError:
                pass
    return out


def descendants(root):
    kids = {}
    for p in os.listdir("/proc"):
        if p.isdigit():
            try:
                with open(f"/proc/{p}/stat") as f:
                    kids.setdefault(int(f.read().rsplit(")", 1)[1].split()[1]), []).append(int(p))
            except (OSError, IndexError, ValueError):
                pass
    out, todo = [], [root]
    while todo:
        p = todo.pop()
        out.append(p)
        todo += kids.get(p, [])
    return out


def tree(proc, marker):
    return sorted(set(mine(marker)) | set(descendants(proc.pid)))


def memory(pids):
    rss = pss = 0
    for p in pids:
        try:
            with open(f"/proc/{p}/statm") as f:
                rss += int(f.read().split()[1]) * PAGE
            with open(f"/proc/{p}/smaps_rollup") as f:
                pss += sum(int(x.split()[1]) * 1024 for x in f if x.startswith("Pss:"))
        except (OSError, IndexError):
            pass
    return round(rss / 2**20, 1), round(pss / 2**20, 1)


def cpu_s(pids):
    t = 0
    for p in pids:
        try:
            with open(f"/proc/{p}/stat") as f:
                v = f.read().rsplit(")", 1)[1].split()
            t += int(v[11]) + int(v[12])
        except (OSError, IndexError):
            pass
    return t / TICK


def busy_s():
    with open("/proc/stat") as f:
        v = [int(x) for x in f.readline().split()[1:]]
    return (v[0] + v[1] + v[2] + v[5] + v[6]) / TICK, v[7] / TICK   # busy, stolen


def stop(proc, marker):
    pids = tree(proc, marker)
    if proc.poll() is None:
        proc.send_signal(signal.SIGTERM)
        try:
            proc.wait(8)
        except subprocess.TimeoutExpired:
            pass
    for sig, wait in ((signal.SIGTERM, 2), (signal.SIGKILL, 5)):
        left = set(mine(marker)) | {p for p in pids if os.path.exists(f"/proc/{p}") and p in descendants(proc.pid)}
        left.discard(os.getpid())
        for p in left:
            try:
                os.kill(p, sig)
            except OSError:
                pass
        end = time.time() + wait
        while time.time() < end and (mine(marker) or proc.poll() is None):
            time.sleep(0.05)
            proc.poll()
        if not mine(marker):
            break
    proc.poll()


# ---------------------------------------------------------------- requests
def free_port():
    """A port with the next few free too (several servers want neighbours)."""
    for _ in range(200):
        p = random.randrange(20000, 30000, 10)
        ok = True
        for i in range(6):
            with socket.socket() as s:
                try:
                    s.bind(("127.0.0.1", p + i))
                except OSError:
                    ok = False
        if ok:
            return p
    raise RuntimeError("no free ports")


def call(port, r, timeout=60):
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        c.request("POST", r.path, r.body, r.headers)
        a = c.getresponse()
        return a.status, {k.lower(): v for k, v in a.getheaders()}, a.read()
    finally:
        c.close()


def diff(ad, c, reply, want):
    got = np.asarray(ad.answer(c, reply[1], reply[2]), np.float32).ravel()
    if got.shape != want.ravel().shape:
        return float("inf")
    return float(np.abs(got - want.ravel()).max())


def references(root, name, n=48):
    """n different inputs and their in-process answers (to catch mixed-up batches)."""
    import torch
    torch.set_num_threads(1)
    z = np.load(root / "models" / f"{name}.npz")
    m = torch.jit.load(str(root / "models" / f"{name}.pt")).eval()
    rng = np.random.default_rng(7)
    xs = [z["x"]]
    for _ in range(n - 1):
        xs.append(rng.standard_normal(z["x"].shape).astype(np.float32) if z["x"].dtype == np.float32
                  else rng.integers(0, 8192, z["x"].shape))
    with torch.inference_mode():
        ys = [m(torch.from_numpy(x)).numpy() for x in xs]
    assert np.abs(ys[0] - z["y"]).max() < 1e-4
    return xs, ys


def wrk(port, path, work, conc, seconds):
    env = {**os.environ, "BENCH_BODY": str(work / "body"), "BENCH_HEADERS": str(work / "headers")}
    p = subprocess.run(["wrk", "-t1", f"-c{conc}", f"-d{seconds}s", "--timeout", "30s", "-s", str(BENCH / "wrk.lua"),
                        f"http://127.0.0.1:{port}{path}"], env=env, capture_output=True, text=True,
                       timeout=seconds + 60)
    for line in p.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:])
    raise RuntimeError("wrk: " + (p.stdout + p.stderr)[-500:])


# ---------------------------------------------------------------- one start
def adapter(name):
    name = name.partition("@")[0]
    path = next(d / f"{name}.py" for d in ADAPTERS if (d / f"{name}.py").exists())
    spec = importlib.util.spec_from_file_location("adapter_" + name, path)
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m


def one(a, name, model, batching, emit, refs, concs):
    ad = adapter(name)
    c = Ctx(root=a.root, server=name, model=model, port=free_port(), batching=batching, max_batch=a.max_batch,
            delay_ms=a.delay_ms, workers=a.workers)
    marker = uuid.uuid4().hex
    c.work = a.root / "work" / f"{name}-{model}-{marker[:6]}"
    c.work.mkdir(parents=True)
    c.env = {"BENCH_MARK": marker, "BENCH_MODEL": model, "BENCH_MODEL_PATH": str(c.model_path),
             "BENCH_PORT": str(c.port), "BENCH_BATCHING": "1" if batching else "0",
             "BENCH_MAX_BATCH": str(c.max_batch), "BENCH_WORKERS": str(c.workers), "BENCH_DELAY_MS": str(c.delay_ms),
             "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    argv = ad.command(c)
    base = {"server": name, "model": model, "batching": batching, "workers": c.workers, "round": a.round, "body": ad.BODY[model]}
    logf = a.root / "logs" / f"run-{name}-{model}-{'on' if batching else 'off'}.log"
    xs, ys = refs
    reqs = [ad.request(c, x) for x in xs]
    with open(logf, "wb") as log:
        t0 = time.perf_counter()
        proc = subprocess.Popen(argv, env={**os.environ, **c.env}, stdin=subprocess.DEVNULL, stdout=log,
                                stderr=subprocess.STDOUT, cwd=c.work, start_new_session=True)
        try:
            last = "no answer"
            while True:
                if proc.poll() is not None:
                    raise RuntimeError(f"process ended with {proc.returncode}; last: {last}")
                if time.perf_counter() - t0 > getattr(ad, "START_LIMIT", 90):
                    raise RuntimeError(f"no correct answer in time; last: {last}")
                try:
                    reply = call(c.port, reqs[0])
                    last = f"{reply[0]} {reply[2][:300]!r}"
                    if reply[0] == 200 and diff(ad, c, reply, ys[0]) < 1e-4:
                        break
                except (OSError, http.client.HTTPException) as e:
                    last = repr(e)
                except (KeyError, ValueError, TypeError, IndexError) as e:
                    last += " " + repr(e)
                time.sleep(0.02)
            startup = time.perf_counter() - t0

            def check():
                with concurrent.futures.ThreadPoolExecutor(16) as ex:
                    rs = list(ex.map(lambda r: call(c.port, r), reqs))
                bad = [r[:1] + r[2:] for r in rs if r[0] != 200]
                if bad and all(status == 503 for status, _ in bad) and time.perf_counter() - t0 < 30:  # another worker is loading
                    time.sleep(0.2)
                    return check()
                if bad:
                    raise RuntimeError(f"{len(bad)} bad answers: {str(bad[0])[:300]}")
                return max(diff(ad, c, r, y) for r, y in zip(rs, ys))

            err = check()
            if err > 1e-4:
                raise RuntimeError(f"wrong answer: off by {err}")
            (c.work / "body").write_bytes(reqs[0].body)
            (c.work / "headers").write_text("".join(f"{k}: {v}\n" for k, v in reqs[0].headers.items()))
            if not a.check_only:
                wrk(c.port, reqs[0].path, c.work, 8, a.warm)
            rss, pss = memory(tree(proc, marker))
            emit({"kind": "start", **base, "startup_s": round(startup, 3), "rss_mib": rss, "pss_mib": pss,
                  "processes": len(tree(proc, marker)), "max_err": err, "body_bytes": len(reqs[0].body)})
            for conc in ([] if a.check_only else concs):
                if conc != 8:
                    wrk(c.port, reqs[0].path, c.work, conc, 1)
                pids = tree(proc, marker)
                c0, (b0, s0), w0 = cpu_s(pids), busy_s(), time.perf_counter()
                ch0 = os.times().children_user + os.times().children_system
                r = wrk(c.port, reqs[0].path, c.work, conc, a.seconds)
                wall = time.perf_counter() - w0
                cpu, (b1, s1) = cpu_s(pids) - c0, busy_s()
                gen = os.times().children_user + os.times().children_system - ch0
                errs = sum(r[k] for k in r if k.startswith("err_"))
                emit({"kind": "load", **base, "conc": conc, "rps": round(r["requests"] / r["seconds"], 2),
                      "errors": errs, **r, "server_cpu_us_per_req": round(cpu / max(1, r["requests"]) * 1e6, 1),
                      "server_cpus": round(cpu / wall, 3), "wrk_cpus": round(gen / wall, 3),
                      "other_cpus": round(max(0, b1 - b0 - cpu - gen) / wall, 3), "stolen": round((s1 - s0) / wall, 3)})
            err = check()
            if err > 1e-4:
                emit({"kind": "wrong", **base, "error": f"after load: off by {err}"})
        except Exception as e:                                  # noqa: BLE001
            emit({"kind": "fail", **base, "error": f"{type(e).__name__}: {e}"[:600]})
        finally:
            stop(proc, marker)
            shutil.rmtree(c.work, ignore_errors=True)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--root", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--servers", default="")
    ap.add_argument("--models", default=",".join(MODELS))
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--first-round", type=int, default=1)
    ap.add_argument("--seconds", type=int, default=5)
    ap.add_argument("--warm", type=int, default=5)
    ap.add_argument("--conc", default="1,8,64")
    ap.add_argument("--off-conc", default="64")
    ap.add_argument("--max-batch", type=int, default=32)
    ap.add_argument("--delay-ms", type=float, default=2.0)
    ap.add_argument("--workers", type=int, default=1)
    ap.add_argument("--no-off", action="store_true")
    ap.add_argument("--only-off", action="store_true")
    ap.add_argument("--check-only", action="store_true")
    ap.add_argument("--no-floor", action="store_true")
    ap.add_argument("--adapters", type=Path, help="a further folder with adapters")
    a = ap.parse_args()
    if a.adapters:
        ADAPTERS.append(a.adapters.resolve())
    a.root = a.root.resolve()
    servers = a.servers.split(",") if a.servers else sorted(p.stem for p in (BENCH / "adapters").glob("*.py"))
    models = a.models.split(",")
    (a.root / "logs").mkdir(exist_ok=True)
    (a.root / "work").mkdir(exist_ok=True)

    def emit(d):
        d["t"] = round(time.time(), 1)
        with open(a.out, "a") as f:
            f.write(json.dumps(d) + "\n")
        print({k: d[k] for k in d if k in ("kind", "server", "model", "batching", "conc", "rps", "p50_ms", "p99_ms",
                                           "errors", "startup_s", "rss_mib", "error", "other_cpus")}, flush=True)

    refs = {m: references(a.root, m) for m in models}
    for a.round in range(a.first_round, a.first_round + a.rounds):
        for script in () if a.check_only or a.no_floor else ("floor.py", "bare.py"):
            p = subprocess.run([a.root / "venvs/mlserve/bin/python", "-W", "ignore", str(BENCH / script), str(a.root / "models"),
                                "--models", ",".join(models)], capture_output=True, text=True, check=True)
            for line in p.stdout.splitlines():
                emit({**json.loads(line), "round": a.round})
        order = servers[:]
        random.Random(a.round).shuffle(order)
        for model in models:
            for name in order:
                for batching in ((True, False) if adapter(name).BATCHING else (False,)):
                    off_ref = adapter(name).BATCHING and not batching
                    if (off_ref and a.no_off) or (a.only_off and not off_ref):
                        continue
                    concs = [int(x) for x in (a.off_conc if off_ref else a.conc).split(",")]
                    try:
                        one(a, name, model, batching, emit, refs[model], concs)
                    except Exception as e:                      # noqa: BLE001
                        traceback.print_exc()
                        emit({"kind": "fail", "server": name, "model": model, "batching": batching,
                              "round": a.round, "error": f"{type(e).__name__}: {e}"[:600]})


if __name__ == "__main__":
    sys.path.insert(0, str(BENCH))
    main()
