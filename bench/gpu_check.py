"""What can only be seen on a GPU, in one run of at most eight minutes:

    python bench/gpu_check.py --out DIR [--cpu] [--only proof,graphs]

It runs from a source tree (PYTHONPATH at its root), without pip, Docker or network, on Python 3.11 to 3.13 and torch from 2.9 on. Each section of
`bench/gpu/` is a process of its own, killed at its limit. After each, DIR/results.json and DIR/results.md are written anew; DIR/log.txt holds
what the sections printed. Without a GPU it says so and ends with 9; `--cpu` rehearses every section there, with small counts, so that nothing
is tried for the first time on a GPU's clock. `make gpu-wheels` fetches what a machine with torch alone lacks, `bash bench/gpu_check.sh DIR`
installs that and runs this.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {"machine": 60, "proof": 120, "graphs": 75, "half": 45, "differences": 45, "benchmark": 120, "warmup": 100, "watch": 75, "refusals": 90,
            "compiled": 120}  # in this order, the short ones and those that hang on most first; the most seconds of each
WHOLE = 465  # seconds; what comes after has so much less
TARGETS = [  # name, what it is, how it is compared, with what
    ("refused", "refusals that end with 9, of those provoked", ">=", 1.0),
    ("refused_seconds", "the slowest of them, seconds", "<=", 5.0),
    ("proved", "golden and new answers within the tolerance, parameters and outputs on the device", ">=", 1.0),
    ("first_request", "first request after ready ÷ p50 of requests after a pause, over HTTP", "<=", 1.2),
    ("saturation", "requests/s at saturation ÷ the model's own loop at the same batch size, where 32 rows take 5 ms", ">=", 0.9),
    ("graph_cnn", "CUDA graph's replay, times as fast as eager, batch 1, digits CNN", ">=", 1.5),
    ("graph_encoder", "the same, encoder of MiniLM's architecture", ">=", 1.5),
    ("half", "float16 or bfloat16, times as fast as float32, batch 32, encoder, within its tolerance", ">=", 1.8),
    ("compiled", "torch.compile: ready with a warm cache ÷ with a cold one", "<=", 0.7),
    ("litserve", "requests/s ÷ LitServe's, same model, same run", ">=", 1.0),
    ("own_answers", "answers of many clients at once, all their own", ">=", 1.0),
    ("mended", "out of memory and a lost kernel are answered as promised", ">=", 1.0),
]
NEVER = ["onnxruntime on CUDA and on TensorRT: the wheels are larger than what can be brought"]


def gpu_missing():
    "Why there is no GPU, or nothing"
    from mlserve.errors import GpuRefused
    from mlserve.serving.model.device import cuda_driver
    try:
        return "" if cuda_driver()[1] else "The NVIDIA driver shows no GPU."
    except GpuRefused as e:
        return str(e)


def kill(process):
    "End a section with all it started"
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_section(name, seconds, cpu, work, log):
    "Run one section in a process of its own; what it recorded, and how it ended"
    began, record = time.monotonic(), work / f"{name}.json"
    command = [sys.executable, "-W", "ignore", "-m", "gpu", name, str(record), str(work), *(["--cpu"] if cpu else [])]
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    print(f"\n=== {name}", file=log, flush=True)
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        state = "done" if process.wait(seconds) == 0 else f"failed: it ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        state = f"killed at its limit of {seconds:.0f} s"
    kill(process)
    found = json.loads(record.read_text()) if record.exists() else {}
    return {"state": state, "seconds": round(time.monotonic() - began, 1)} | found


def judged(results):
    "Each target with what was measured"
    values = {k: v for s in results["sections"].values() for k, v in s.get("targets", {}).items()}
    for name, what, sign, want in TARGETS:
        value = values.get(name)
        kept = value is not None and (value >= want if sign == ">=" else value <= want)
        verdict = "not run" if value is None else "rehearsed" if results["rehearsal"] else "met" if kept else "missed"
        yield {"target": what, "wanted": f"{sign} {want:g}", "measured": "–" if value is None else f"{value:.3g}", "verdict": verdict}


def table(rows):
    "Rows as Markdown; columns in the order in which they first occur"
    names = list(dict.fromkeys(k for row in rows for k in row))
    text = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v).replace("|", "\\|").replace("\n", " ")
    return "\n".join(["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *("| " + " | ".join(text(r.get(n, "")) for n in names) + " |" for r in rows)])


def write(out, results):
    "Both files anew, each in one step"
    parts = [f"# {'Rehearsal on the CPU of the' if results['rehearsal'] else 'The'} GPU check, {results['date']}, {results['seconds']:.0f} s",
             "## Targets", table(list(judged(results))), "Never run here: " + "; ".join(NEVER) + "."]
    for name, section in results["sections"].items():
        parts.append(f"## {name}: {section['state']}, {section['seconds']} s")
        parts += [f"**{title}**\n\n{table(rows)}" for title, rows in section.get("tables", {}).items()]
        parts += ["\n".join(f"- {note}" for note in section["notes"])] if section.get("notes") else []
        parts += [f"```\n{section['error'][-1500:]}\n```"] if section.get("error") else []
    for file, text in (("results.json", json.dumps(results | {"judged": list(judged(results))}, indent=1)), ("results.md", "\n\n".join(parts) + "\n")):
        (out / f".{file}").write_text(text)
        (out / f".{file}").replace(out / file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, results.md and log.txt")
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by name")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if not given.cpu and (why := gpu_missing()):
        print(f"gpu-check: {why} Give --cpu to rehearse without one.", file=sys.stderr)
        return 9
    given.out.mkdir(parents=True, exist_ok=True)
    began, names = time.monotonic(), given.only.split(",")
    results = {"rehearsal": given.cpu, "date": time.strftime("%Y-%m-%d"), "seconds": 0, "sections": {}}
    with tempfile.TemporaryDirectory() as work, open(given.out / "log.txt", "w") as log:
        for name in names:
            left = WHOLE - (time.monotonic() - began)
            seconds = 3 * SECTIONS[name] if given.cpu else min(SECTIONS[name], left)
            section = run_section(name, seconds, given.cpu, Path(work), log) if seconds > 5 else {"state": "not run: no time was left", "seconds": 0}
            results["sections"][name], results["seconds"] = section, time.monotonic() - began
            write(given.out, results)
            print(f"gpu-check: {name}: {section['state']}, {section['seconds']} s", file=sys.stderr, flush=True)
    print(table(list(judged(results))))
    return 0 if all(s["state"] == "done" for s in results["sections"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
