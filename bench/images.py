"""Images side by side: ours, MLflow's generated Dockerfile and the two-stage Dockerfile of the field's tutorials.

    python bench/images.py [--package DIR] [--runs 3] [--out bench/results/DATE-images.md]

One engine, one registry on loopback, one Debian base, one torch, one digits model; all builds offline from wheels on the disk, in turn.
A build is cold when no instruction comes from the builder's cache and the context is sent anew. What is pushed is counted from the
manifests before and after: the compressed layers that the registry did not have, and the configuration. The cold builds leave some 30 GB in
the cache of the engine; `make clean` takes away the one that `make engine-start` made.

What was changed to make the other two buildable without a network, nothing else:
- MLflow: its base `python:3.11.7-slim` is the Debian base with a virtual environment on PATH; pip reads wheels from the disk
  (PIP_NO_INDEX, PIP_FIND_LINKS); nginx is left out, and pip's download cache, which a real build leaves in the image, does not arise.
  All three make its image smaller and its build shorter.
- tutorial: pip reads wheels from the disk. Its requirements are `torch fastapi uvicorn[standard] numpy`.
"""
import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from mlserve.package import load_package
from mlserve.release.image import built_image as image
from mlserve.release.image.engine import engine, find_builder, run_build
from mlserve.release.plan import build_image, prepare
from mlserve.release.registry import client as distribution
from mlserve.release.spec import ReleaseSpec

ROOT = Path(__file__).parent.parent
TUTORIAL = """FROM {base} AS builder
RUN python3 -m venv /opt/venv
ENV PATH="/opt/venv/bin:$PATH"
COPY requirements.txt .
RUN --mount=type=bind,source=wheels,target=/wheels pip install --no-cache-dir --no-index --find-links /wheels -r requirements.txt

FROM {base}
COPY --from=builder /opt/venv /opt/venv
ENV PATH="/opt/venv/bin:$PATH"
WORKDIR /app
COPY model.pt .
COPY main.py .
USER 1000
EXPOSE 8000
CMD ["uvicorn", "main:app", "--host", "0.0.0.0", "--port", "8000"]
"""
MAIN = """from fastapi import FastAPI
import torch
app, model = FastAPI(), torch.jit.load("model.pt")
@app.post("/predict")
def predict(body: dict): return {"outputs": model(torch.tensor(body["inputs"])).tolist()}
"""


@dataclass
class Build:
    "One way to an image: a context, and what builds it"
    name: str
    folder: Path
    repository: str
    make: object = None  # ours: a function of `cache` that gives a BuiltImage
    stage: object = None  # ours: puts the context together, which belongs to every build


def built(b, cache=True):
    "Build; the image and the seconds"
    began, iid = time.monotonic(), b.folder.with_suffix(".iid")
    if b.make:
        return b.make(cache), time.monotonic() - began
    run_build(find_builder(), ["--progress", "plain", "--network", "none", "--iidfile", str(iid), *([] if cache else ["--no-cache"]), str(b.folder)])
    return image.BuiltImage(iid.read_text(), 0, 0), time.monotonic() - began


def pushed(b, made):
    "Push; the reference and the seconds. Ours is settled and confirmed by the registry; the others are pushed by the engine's client"
    began = time.monotonic()
    if b.make:
        return image.push(made, b.repository), time.monotonic() - began
    client = engine().api
    client.tag(made.id, b.repository, "latest")
    digest = image.pushed_digest(client.push(b.repository, "latest", stream=True, decode=True))
    return f"{b.repository}@{digest}", time.monotonic() - began


def manifest(reference):
    "Layers of a pushed image: digest → compressed bytes, in order; and the bytes of its configuration"
    data, _ = distribution.manifest(distribution.Remote(where := distribution.read_reference(reference)), where.which)
    m = json.loads(data)
    return {layer["digest"]: layer["size"] for layer in m["layers"]}, m["config"]["size"] + len(data)


def moved(before, after):
    "Bytes that a push had to send: new layers and the configuration"
    (old, _), (new, config) = manifest(before), manifest(after)
    return sum(size for digest, size in new.items() if digest not in old) + config, [size for digest, size in new.items() if digest not in old]


def wheels_for(folder, *asked):
    "The wheels of some requirements, with what they need, on the disk"
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--only-binary", ":all:", "-c", ROOT / "constraints.txt", "-d", part, *asked], check=True)
        part.rename(folder)
    return folder


def link(source, dest):
    shutil.copytree(source, dest, copy_function=os.link)


def ours(name, package, work, state, registry, extra=()):
    "Our image, made as `build_image` makes it; everything but the wheels' download belongs to a build"
    place = work / name
    shutil.copytree(package.path, place / "package")
    shutil.copytree(ROOT / "mlserve", place / "mlserve", ignore=shutil.ignore_patterns("__pycache__"))

    def make(cache=True):
        spec = ReleaseSpec(name="digits", notebook=ROOT / "nbs/examples/digits.ipynb", base=os.environ["MLSERVE_BASE"], requirements=list(extra), state=state)
        plan = replace(prepare(spec, load_package(place / "package")), code=place / "mlserve")
        return build_image(plan, None if cache else place / "again", cache)
    return Build(name, place, f"{registry}/bench/{name}", make)


def tutorial(package, work, wheels, registry):
    folder = work / "tutorial"
    folder.mkdir()
    link(wheels, folder / "wheels")
    (folder / "Dockerfile").write_text(TUTORIAL.format(base=os.environ["MLSERVE_BASE"]))
    (folder / "requirements.txt").write_text("torch==2.13.0\nfastapi\nuvicorn[standard]\nnumpy\n")
    (folder / "main.py").write_text(MAIN)
    shutil.copy(package.path / "model.pt", folder)
    return Build("tutorial", folder, f"{registry}/bench/tutorial")


def mlflow(package, work, wheels, registry):
    "`mlflow models generate-dockerfile` of the same TorchScript program, with the changes named above"
    import mlflow.pytorch
    import numpy
    import torch
    model, folder = work / "model", work / "mlflow"
    mlflow.pytorch.save_model(torch.jit.load(str(package.path / "model.pt")), str(model), pip_requirements=["torch==2.13.0", f"numpy=={numpy.__version__}"], serialization_format="pickle")
    subprocess.run([Path(sys.executable).parent / "mlflow", "models", "generate-dockerfile", "-m", model, "-d", folder], check=True, capture_output=True)
    text = (folder / "Dockerfile").read_text()
    head = f"FROM {os.environ['MLSERVE_BASE']}\nRUN python3 -m venv /usr/local/python\nENV PATH=/usr/local/python/bin:$PATH PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels\n"
    text = re.sub(r"^FROM python:\S+\n", head, text, flags=re.M)
    text = re.sub(r"# Fail fast.*?\nRUN apt-get[^\n]*\n", "", text, flags=re.S)
    text = re.sub(r"^RUN (pip install|python -c)", r"RUN --mount=type=bind,source=wheels,target=/wheels \1", text, flags=re.M)
    (folder / "Dockerfile").write_text(text)
    link(wheels, folder / "wheels")
    return Build("mlflow", folder, f"{registry}/bench/mlflow")


def measured(b, runs, change_code, change_weights, log):
    "Size, layers, cold build, and what a change of code and of weights costs"
    log(f"{b.name}: cold build")
    cold = []
    for _ in range(runs):
        iid, seconds = built(b, cache=False)
        cold.append(seconds)
    iid, _ = built(b)  # from the cache, so that the kept context is known to the engine
    first, push_seconds = pushed(b, iid)
    layers, _ = manifest(first)
    attributes = engine().images.get(iid.id).attrs
    row = {"name": b.name, "mb": attributes["Size"] / 1e6, "compressed_mb": sum(layers.values()) / 1e6, "layers": len(layers), "cold_s": min(cold), "first_push_s": push_seconds}
    before = first
    for what, change in (("code", change_code), ("weights", change_weights)):
        if not change:
            continue
        times = []
        for n in range(runs):
            change(n)
            iid, rebuild = built(b)
            after, push = pushed(b, iid)
            size, new = moved(before, after)
            times.append((rebuild + push, rebuild, push))
            before = after
        row[what] = dict(zip(("total_s", "build_s", "push_s"), min(times)), kb=size / 1e3, layers=len(new))
        log(f"{b.name}: {what} {row[what]}")
    row |= {"reference": before, "iid": iid.id, "first": first, "repository": b.repository}
    return row


def whole_command(package, env, runs, log):
    "`mlserve build` as a person types it, after a changed line of the server"
    with tempfile.TemporaryDirectory() as tmp:
        source = Path(tmp) / "mlserve"
        shutil.copytree(ROOT / "mlserve", source, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "nbs/pipelines", source / "pipelines")
        times, before, after = [], None, None
        for n in range(runs + 1):
            with open(source / "serving/http/app.py", "a") as f:
                f.write(f"\n# change {n} {time.time()}\n")
            began = time.monotonic()
            done = subprocess.run([Path(sys.executable).parent / "mlserve", "build", ROOT / "nbs/examples/digits.ipynb", "--package", package.path, "--json"],
                                  env=os.environ | env | {"PYTHONPATH": tmp}, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            times.append(time.monotonic() - began)
            before, after = after, json.loads(done.stdout)["image"]
        size, _ = moved(before, after)
    log(f"mlserve build: {times}")
    return {"total_s": min(times[1:]), "kb": size / 1e3}


def change_file(path, text):
    return lambda n: path.open("a").write(text.format(n=f"{n} {time.time()}"))


def change_program(path):
    "Other weights of the same size: the program is saved anew with one of them changed"
    def change(n):
        import torch
        model = torch.jit.load(str(path))
        with torch.no_grad():
            next(model.parameters()).add_(0.001 * (n + 1))
        torch.jit.save(model, str(path) + ".new")
        os.replace(str(path) + ".new", path)
    return change


def change_package(folder):
    "Other weights, and a lock that says so"
    program = change_program(folder / "model.pt")

    def change(n):
        from mlserve.package.lock import write_lock
        program(n)
        write_lock(folder)
    return change


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", help="of the digits example, in TorchScript; trained here when missing")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out")
    o = parser.parse_args()
    log = lambda line: print(line, file=sys.stderr, flush=True)
    registry, state = os.environ["MLSERVE_REGISTRY"], Path(os.environ.get("MLSERVE_STATE") or ROOT / "state").absolute()
    state.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=state, prefix="bench-"))  # beside the wheels, so that they can be linked
    rows = []
    try:
        package = load_package(o.package or trained(work))
        wheels = wheels_for(state / "bench-wheels/tutorial", "torch==2.13.0", "fastapi", "uvicorn[standard]", "numpy")
        more = wheels_for(state / "bench-wheels/mlflow", "gunicorn[gevent]", f"mlflow=={version('mlflow')}", "torch==2.13.0", f"numpy=={version('numpy')}",
                          *(f"{n}=={version(n)}" for n in ("pip", "setuptools", "wheel")))  # its image sets these three to training's
        torch, edge = ours("ours-torch", package, work, state, registry), ours("ours-onnx", as_onnx(package, work), work, state, registry)
        code = lambda b: change_file(b.folder / "mlserve/serving/http/app.py", "\n# change {n}\n")
        plain, generated = tutorial(package, work, wheels, registry), mlflow(package, work, more, registry)
        rows.append(measured(plain, o.runs, change_file(plain.folder / "main.py", "\n# change {n}\n"), change_program(plain.folder / "model.pt"), log))
        rows.append(measured(torch, o.runs, code(torch), change_package(torch.folder / "package"), log))
        rows.append(measured(edge, o.runs, code(edge), None, log))
        rows.append(measured(generated, 1, None, change_file(generated.folder / "model_dir/model/data/pickle_module_info.txt", "\n"), log))
        rows[1]["command"] = whole_command(package, {"MLSERVE_STATE": str(state)}, o.runs, log)
        rows[1]["dependency"] = dependency(package, rows[1], work, state, registry)
        text = table(rows, o.runs)
        print(text)
        if o.out:
            Path(o.out).write_text(text)
    finally:
        for row in rows:
            try:
                engine().images.remove(row["iid"], force=True)
            except Exception as e:
                log(f"{row['name']}: {e}")
        shutil.rmtree(work, ignore_errors=True)


def trained(work):
    from mlserve.release.notebook import run_notebook
    run_notebook(ROOT / "nbs/examples/digits.ipynb", {"package_dir": str(work / "package")}, work / "digits.ipynb")
    return work / "package"


def as_onnx(package, work):
    "The same program as ONNX"
    import torch
    from mlserve.package import golden, save_package
    model, (inputs, _) = torch.jit.load(str(package.path / "model.pt")), golden(package)
    [(name, x)] = inputs.items()
    file = work / "digits.onnx"
    torch.onnx.export(model, (torch.from_numpy(x),), str(file), dynamo=False, input_names=[name], output_names=[s.name for s in package.outputs],
                      dynamic_axes={name: {0: "rows"}, package.outputs[0].name: {0: "rows"}})
    return save_package(file, work / "onnx-package", "digits", {name: x}, [s.name for s in package.outputs], format="onnx")


def dependency(package, row, work, state, registry):
    "One more requirement of the model: which of the layers moves"
    more = ours("ours-more", package, work, state, registry, ["tomli>=2"])
    made, seconds = built(more)
    more.repository = row["repository"]
    after, _ = pushed(more, made)
    engine().images.remove(made.id, force=True)
    old, new = manifest(row["first"])[0], manifest(after)[0]
    return {"build_s": seconds, "mb": sum(s for d, s in new.items() if d not in old) / 1e6, "moved": [n for n, d in zip(("runtime", "wheels", "weights", "ground", "code"), new) if d not in old]}


def cell(row, key, what):
    return f"{row[key][what]:.1f}" if key in row else "–"


def table(rows, runs):
    "What is published"
    import psutil
    tutorial, names = rows[0], {"tutorial": "two-stage Dockerfile of the tutorials", "ours-torch": "mlserve, torch", "ours-onnx": "mlserve, ONNX (edge)", "mlflow": "MLflow's generated Dockerfile"}
    lines = [f"# Images side by side, {time.strftime('%Y-%m-%d')}", "",
             f"One run of `make bench-images` on {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.system()}, engine "
             f"{engine().version()['Version']}, a registry on loopback, load {os.getloadavg()[0]:.1f} at its end; the least of {runs} runs each (MLflow: 1). MB are 10**6 bytes.", "",
             "| image | MB | of the tutorials' | compressed MB | layers | cold build s | code: build s | code: push s | code: kB moved | weights: build + push s | weights: kB moved |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {names[r['name']]} | {r['mb']:.0f} | {r['mb'] / tutorial['mb']:.2f} | {r['compressed_mb']:.0f} | {r['layers']} | {r['cold_s']:.1f} | {cell(r, 'code', 'build_s')} | "
                     f"{cell(r, 'code', 'push_s')} | {cell(r, 'code', 'kb')} | {cell(r, 'weights', 'total_s')} | {cell(r, 'weights', 'kb')} |")
    own = next(r for r in rows if r["name"] == "ours-torch")
    lines += ["", f"The whole command `mlserve build` after a changed line, imports and a verified package included: {own['command']['total_s']:.1f} s, {own['command']['kb']:.0f} kB moved.",
              f"One more requirement of the model: built in {own['dependency']['build_s']:.1f} s, {own['dependency']['mb']:.0f} MB moved, in {', '.join(own['dependency']['moved'])} alone.", "",
              "Ours verifies the package, looks up lock and wheels and puts the context together in each build, and asks the registry for what it holds after each push; the others do none of it.",
              "", *[line for line in __doc__.splitlines()[4:] if line.strip()], ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
