"""mlserve: plain JSON for mlp128, V2 binary for cnn; a package made from the same TorchScript file.

Two workers are two processes for mlp128, whose time goes into requests, and two threads of one process for cnn, whose time goes into the model."""
import json
import subprocess

from common import json_request, v2_answer, v2_binary

BATCHING = True
BODY = {"mlp128": "json", "cnn": "v2 binary"}
SAVE = """import sys, numpy as np
from mlserve.package import save_package
file, folder, name, example = sys.argv[1:]
save_package(file, folder, name=name, inputs={"x": np.load(example)["x"]}, outputs=["y"])"""


def command(c):
    package = c.root / "work" / f"{c.server}-{c.model}-package"
    if not (package / "package.lock").exists():
        example = c.model_path.with_suffix(".npz")
        subprocess.run([c.bin(c.server, "python"), "-c", SAVE, c.model_path, package, c.model, example], check=True, capture_output=True)
    c.env.update(MLSERVE_PACKAGE=str(package), MLSERVE_HOST="127.0.0.1", MLSERVE_PORT=str(c.port), MLSERVE_MAX_BATCH=str(c.max_batch if c.batching else 1))
    c.env["MLSERVE_WORKERS" if c.model == "mlp128" else "MLSERVE_THREADS"] = str(c.workers)
    if c.model == "mlp128":
        c.env["MLSERVE_THREADS"] = "1"
    return [c.bin(c.server, "python"), "-m", "mlserve.serving.server"]


def request(c, x):
    return json_request("/predict", {"inputs": x.tolist()}) if c.model == "mlp128" else v2_binary(c.model, x)


def answer(c, headers, body):
    return json.loads(body)["outputs"] if c.model == "mlp128" else v2_answer(headers, body)
