"""Versions of torch and onnxruntime: models are saved, served and asked in an environment of each.

    python bench/versions.py [--out bench/results/DATE-versions.md] [--torch FOLDER …]

For each version a process of its own saves models that were made from one seed, serves them, and asks 320 rows over JSON and V2; the largest difference
is from the live model. `make models` puts each minor version of onnxruntime that the table of `mlserve.package.environment` calls tested into
`state/tools/onnxruntime-VERSION` (`pip install --target`). A folder with another torch is given by hand: its wheels take gigabytes.

A second table serves what one version of onnxruntime saved with another, as `mlserve serve` outside of an image may: it must come up with
the same answers and the event `version_skew` in its log, or not come up.
"""
import argparse
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
ROWS = 320
HANDLER = """import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 10))
    def forward(self, image): return self.layers(image)
"""


def table(framework):
    "Names of models, and how each is saved: model, example, held-back inputs, outputs, further arguments"
    from sklearn.ensemble import HistGradientBoostingClassifier
    sys.path[:0] = [str(ROOT / "tests/package"), str(ROOT / "tests")]
    from test_tables import BOTH, HELD, NUMBERS, TRAIN
    (frame, texts, _), (held, _, _) = TRAIN, HELD
    model = HistGradientBoostingClassifier(max_iter=20, random_state=0).fit(frame[NUMBERS], texts)
    yield "boosted table", model, frame[NUMBERS], held[NUMBERS], BOTH, model.predict_proba(held[NUMBERS]), {}


def networks(folder):
    "The same for networks of torch, in each format"
    import torch
    (folder / "net.py").write_text(HANDLER)
    space: dict = {}
    exec(HANDLER, space)  # noqa: S102
    torch.manual_seed(0)
    net = space["Net"]().eval()
    rng = np.random.default_rng(0)
    image, held = (rng.random((n, 1, 8, 8), dtype=np.float32) for n in (8, ROWS))

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 3)
            self.mix = torch.nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, ids):
            x = self.embed(ids)
            return self.out(self.mix(x, x, x, need_weights=False)[0].mean(1))
    encoder = Encoder().eval()
    first, second, words = (rng.integers(0, 50, (n, length)) for n, length in ((8, 12), (8, 20), (ROWS, 15)))
    with torch.inference_mode():
        answers = net(torch.from_numpy(held)).numpy(), encoder(torch.from_numpy(words)).numpy()
    for format in ("torchscript", "export", "safetensors", "onnx"):
        more = {"format": format} | ({"handler": folder / "net.py"} if format == "safetensors" else {})
        yield f"convolution, {format}", net, {"image": image}, {"image": held}, ["logits"], answers[0], more
    for format in ("torchscript", "export", "onnx"):
        inputs = [{"ids": first}, {"ids": second}]
        yield f"attention over texts of any length, {format}", encoder, inputs, {"ids": words}, ["scores"], answers[1], {"format": format}


def asked(url, held, outputs):
    "By wire: what the server said, as arrays by name"
    import httpx

    from mlserve.client import Client
    from mlserve.package.convert.columns import to_arrays
    from mlserve.tensors import TensorSpec
    frame = hasattr(held, "columns")
    if frame:
        rows = held.astype(object).where(held.notna(), None).to_dict("records")
    else:
        [rows] = [array.tolist() for array in held.values()]
    answer = httpx.post(url + "/predict", json={"inputs": rows}, trust_env=False, timeout=60)
    answer.raise_for_status()
    told = answer.json()["outputs"]
    yield "JSON", {name: np.array([row[name] for row in told]) for name in outputs} if frame else {outputs[0]: np.array(told)}
    with Client(url) as client:
        arrays = held
        if frame:
            specs = [TensorSpec(t["name"], t["datatype"], tuple(t["shape"]), t.get("parameters", {}).get("optional", False)) for t in client.metadata()["inputs"]]
            arrays = to_arrays(held, specs)
        for name, binary in (("V2", False), ("V2 binary", True)):
            yield name, client.infer(arrays, binary=binary)


def worst(url, held, outputs, expected):
    "The largest difference by wire"
    return {wire: float(np.abs(np.asarray(told[outputs[-1]], dtype=float).reshape(expected.shape) - expected).max()) for wire, told in asked(url, held, outputs)}


def kinds(framework, folder):
    "The models that a framework runs"
    for kind in [*table(framework), *networks(folder)] if framework == "onnxruntime" else networks(folder):
        if framework == "torch" or not kind[0].endswith(("torchscript", "export", "safetensors")):
            yield kind


def run_all(framework, folder):
    "In a process of its own: each model saved, served and asked"
    from mlserve.package import save_package
    from mlserve.serving.server import serve_local
    for name, model, inputs, held, outputs, expected, more in kinds(framework, folder):
        place = folder / name.replace(", ", "-").replace(" ", "-")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            package = save_package(model, place, "version", inputs, outputs, **more)
        warned = any("not tested" in str(w.message) for w in caught)
        with serve_local(package.path) as url:
            found = worst(url, held, outputs, expected)
        assert all(number < 1e-5 for number in found.values()), (name, found)
        print(json.dumps({"model": name, "warned": warned, "found": found, "version": version(framework), "place": str(place)}), flush=True)


def serve_other(place):
    "In a process of its own: a package that another version saved, served here; what became of it"
    from mlserve.errors import MlserveError
    from mlserve.package import golden, load_package
    from mlserve.serving.process.loading import load
    from mlserve.serving.state import Lifecycle
    from mlserve.settings import Settings
    life, log = Lifecycle(), io.StringIO()
    try:
        with contextlib.redirect_stderr(log):
            load(life, Settings(package=place, max_batch=8))
    except MlserveError as e:
        print(json.dumps({"served": False, "told": f"{type(e).__name__} {e.code}: {e.message}"}))
        return
    inputs, answers = golden(load_package(place))
    given = life.model.predict(inputs)
    gap = max(float(np.abs(given[n] - a).max()) for n, a in answers.items() if a.dtype.kind == "f")
    print(json.dumps({"served": True, "loud": "version_skew" in log.getvalue(), "golden": life.golden.passed, "gap": gap}))


def child(home, *words):
    "Lines of JSON that a process with one version prints"
    path = os.pathsep.join(filter(None, [str(home or ""), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, *map(str, words)], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=550)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:400])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def rows_of(framework, home, folder):
    "Rows of the first table"
    folder.mkdir()
    try:
        for told in child(home, "--all", framework, folder):
            yield [f"{framework} {told['version']}", told["model"], "with a warning" if told["warned"] else "tested", *(f"{n:.1g}" for n in told["found"].values())], told
    except RuntimeError as e:
        yield [f"{framework} in {home.name if home else 'the environment'}", f"**failed**: {e}", "", "", "", ""], None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--torch", type=Path, nargs="*", default=[], help="folders with another torch")
    parser.add_argument("--all", nargs=2)
    parser.add_argument("--other")
    given = parser.parse_args()
    if given.all:
        return run_all(given.all[0], Path(given.all[1]))
    if given.other:
        return serve_other(given.other)
    scratch = Path(tempfile.mkdtemp())
    homes = [("onnxruntime", home) for home in sorted((ROOT / "state/tools").glob("onnxruntime-*"))]
    homes += [("onnxruntime", None), ("torch", None), *(("torch", home.absolute()) for home in given.torch)]
    table, saved, code = [], {}, 0
    for number, (framework, home) in enumerate(homes):
        print(framework, home.name if home else "as installed", "…", file=sys.stderr, flush=True)
        for row, told in rows_of(framework, home, scratch / str(number)):
            table.append(row)
            code |= told is None
            if told and framework == "onnxruntime":
                saved.setdefault((home, told["version"]), []).append(told)
    crossed = []
    for (home, trained), packages in saved.items():
        for other, serving in saved:
            if home == other:
                continue
            found = [child(other, "--other", told["place"])[0] for told in packages]
            good = [f for f in found if f["served"] and f["loud"] and f["golden"]]
            code |= any(f["served"] and f not in good for f in found)
            refused = "; ".join(f["told"] for f in found if not f["served"])
            crossed.append([trained, serving, f"{len(good)} of {len(found)}", f"{max((f['gap'] for f in good), default=0):.1g}", refused or "–"])
    head = ["framework", "model", "taken", "JSON", "V2", "V2 binary"], ["saved with", "served with", "ready, and said so", "largest difference of golden answers", "refused"]
    def lines(head, rows):
        return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    text = "\n".join([f"# Versions of torch and onnxruntime, {time.strftime('%Y-%m-%d')}", "", f"`make models` on Python {platform.python_version()}, numpy {version('numpy')}, onnx {version('onnx')}.", "",
                      " ".join(__doc__.split("\n\n")[2].split()), "", *lines(head[0], table), "", " ".join(__doc__.split("\n\n")[3].split()), "", *lines(head[1], crossed), ""])
    print(text)
    if given.out:
        given.out.write_text(text)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
