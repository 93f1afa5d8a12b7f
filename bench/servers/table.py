#!/usr/bin/env python3
"""Print markdown tables (medians over rounds) from a results file of run.py.

    table.py results.jsonl
"""
import json
import statistics as st
import sys
from collections import defaultdict

rows = [json.loads(x) for x in open(sys.argv[1]) if x.strip()]
for r in rows:
    if r.get("workers", 1) > 1:
        r["server"] += f" (x{r['workers']} workers)"
MODELS = [m for m in ("mlp128", "cnn") if any(r.get("model") == m for r in rows)]
med = lambda v: st.median(v) if v else None                     # noqa: E731


def f(v, d=1):
    if v is None:
        return "–"
    return f"{v:,.0f}" if abs(v) >= 100 else f"{v:.{d}f}"


# model floor
fl = defaultdict(list)
for r in rows:
    if r["kind"] == "floor":
        fl[r["model"], r["threads"], r["batch"]].append(r["per_s"])
if fl:
    n = max(len(v) for v in fl.values())
    print(f"### Model floor: in-process inferences/s (median of {n} runs)\n")
    bs = sorted({k[2] for k in fl})
    print("| model | threads | " + " | ".join(f"batch {b}" for b in bs) + " |\n|---|--:|" + "--:|" * len(bs))
    for m in MODELS:
        for t in (1, 2):
            print(f"| {m} | {t} | " + " | ".join(f(med(fl[m, t, b])) for b in bs) + " |")
    print()

load, start, bad = defaultdict(list), defaultdict(list), []
batchers = set()
for r in rows:
    if r["kind"] == "load":
        load[r["server"], r["model"], r["batching"], r["conc"]].append(r)
    elif r["kind"] == "start":
        start[r["server"], r["model"], r["batching"]].append(r)
    elif r["kind"] in ("fail", "wrong"):
        bad.append(r)
    if r.get("batching") and r["kind"] != "floor":
        batchers.add(r["server"])

for m in MODELS:
    servers = sorted({k[0] for k in load if k[1] == m})
    if not servers:
        continue
    concs = sorted({k[3] for k in load if k[1] == m})
    key = lambda s: -(med([r["rps"] for r in load[s, m, s in batchers, concs[-1]]]) or 0)   # noqa: E731
    print(f"### {m}\n\nrequests/s, then p50 / p99 ms, at concurrency " + ", ".join(map(str, concs)) + "; batching on where "
          "the server has it. `off` = without batching: p50 at the lowest concurrency, requests/s at the highest. CPU = server CPU "
          "µs per request at the highest concurrency. n = rounds.\n")
    print("| server | body | " + " | ".join(f"c={c} r/s | p50 / p99" for c in concs) +
          " | off c=1 ms | off r/s | CPU µs/req | start s | RSS MiB | PSS MiB | procs | errors | n |")
    print("|---|---|" + "--:|--:|" * len(concs) + "--:|" * 9)
    for s in sorted(servers, key=key):
        on = s in batchers
        cells = []
        for c in concs:
            v = load[s, m, on, c]
            cells += [f(med([r["rps"] for r in v])),
                      f"{f(med([r['p50_ms'] for r in v]), 2)} / {f(med([r['p99_ms'] for r in v]), 2)}"]
        off = load[s, m, False, concs[-1]] if on else []
        off1 = load[s, m, False, concs[0]] if on else []
        st_ = start[s, m, on]
        errs = sum(r["errors"] for k, v in load.items() if k[0] == s and k[1] == m for r in v)
        print(f"| {s} | {st_[0]['body']} | " + " | ".join(cells) + f" | {f(med([r['p50_ms'] for r in off1]), 2)} | {f(med([r['rps'] for r in off]))} | " +
              " | ".join([f(med([r["server_cpu_us_per_req"] for r in load[s, m, on, concs[-1]]])),
                          f(med([r["startup_s"] for r in st_])), f(med([r["rss_mib"] for r in st_])),
                          f(med([r["pss_mib"] for r in st_])), f(med([r["processes"] for r in st_]), 0), str(errs),
                          str(len(load[s, m, on, concs[-1]]))]) + " |")
    print()

# how mlserve stands beside the best of the others, and beside what nobody can avoid
bare = defaultdict(list)
for r in rows:
    if r["kind"] == "bare":
        bare[r["model"]].append(r)
GOALS = {("mlp128", 64, 1): 4, ("mlp128", 64, 2): 2.5, ("mlp128", 8, 1): 6, ("cnn", 64, 2): 1, ("cnn", 8, 2): 1.3}


def rps(server, model, conc):
    return med([r["rps"] for r in load[server, model, server in batchers, conc]])


def ratio(what, value, goal, least=True):
    if value is not None:
        met = value >= goal if least else value <= goal
        print(f"| {what} | {value:.2f} | {'≥' if least else '≤'} {goal:g} | {'yes' if met else 'no'} |")


if any(k[0].startswith("mlserve") for k in load):
    print("### Ratios of this run\n\n| mlserve beside | ratio | goal | met |\n|---|--:|--:|---|")
    for (m, c, w), goal in GOALS.items():
        ours = "mlserve" + (f" (x{w} workers)" if w > 1 else "")
        others = {s: rps(s, m, c) for s in {k[0] for k in load if k[1] == m} if not s.startswith("mlserve")
                  and ("workers" in s) == (w > 1) and rps(s, m, c)}
        if others and rps(ours, m, c):
            best = max(others, key=others.get)
            ratio(f"{m}, concurrency {c}: requests/s over {best}", rps(ours, m, c) / others[best], goal)
    for m in MODELS:
        v, b = load["mlserve", m, True, 1], bare[m]
        if v and b:
            ours, call = med([r["p50_ms"] for r in v]), med([r["call_ms"] for r in b])
            naive = med([r["p50_ms"] for r in load["fastapi", m, False, 1]])
            if m == "mlp128" and naive:
                ratio(f"{m}, concurrency 1: p50 over plain FastAPI's", ours / naive, .5, False)
            if m == "cnn":
                ratio(f"{m}, concurrency 1: p50 less the bare call, ms", ours - call, .5, False)
        s = start["mlserve", m, True]
        if s and b:
            ratio(f"{m}: start to first answer over the bare process", med([r["startup_s"] for r in s]) / med([r["startup_s"] for r in b]), 1.2, False)
            ratio(f"{m}: memory (PSS, as processes share pages) over the bare process", med([r["pss_mib"] for r in s]) / med([r["pss_mib"] for r in b]), 1.2, False)
    for w in (1, 2):
        ours = rps("mlserve" + (f" (x{w} workers)" if w > 1 else ""), "cnn", 64)
        top = [med(v) for k, v in fl.items() if k[:2] == ("cnn", w)]
        if ours and top:
            ratio(f"cnn, concurrency 64: share of the model's floor, {w} thread{'s' if w > 1 else ''}", ours / max(top), .9)
    print()

dirty = [r for v in load.values() for r in v if r["other_cpus"] > 0.25 or r["stolen"] > 0.1]
n = sum(map(len, load.values()))
print(f"{n} load measurements; in {len(dirty)} of them other processes used over 0.25 CPU or over 0.1 CPU was stolen.\n")
if bad:
    print("Failures:\n")
    for k in sorted({(b["server"], b["model"], b["batching"], b["error"][:160]) for b in bad}):
        print(f"- {k[0]} / {k[1]} / batching {k[2]}: {k[3]}")
for earlier in sorted({k[0] for k in load if k[0].startswith("mlserve@")}):
    print(f"\n### Beside {earlier}, as ratios of medians\n\n| model | concurrency | requests/s (at least 0.9) | server CPU of a request (at most 1.05) | start |\n|---|--:|--:|--:|--:|")
    for m in MODELS:
        begin = [med([r["startup_s"] for r in start[s, m, True]]) for s in ("mlserve", earlier)]
        for c in sorted({k[3] for k in load if k[:3] == (earlier, m, True)}):
            (fast, cpu), (was_fast, was_cpu) = [[med([r[what] for r in load[s, m, True, c]]) for what in ("rps", "server_cpu_us_per_req")]
                                                for s in ("mlserve", earlier)]
            print(f"| {m} | {c} | {fast / was_fast:.2f} | {cpu / was_cpu:.2f} | {begin[0] / begin[1]:.2f} |")
