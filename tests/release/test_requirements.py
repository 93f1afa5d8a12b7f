"""What an image installs, by kind of model: what serves its format, and nothing that only training needs."""
from importlib import metadata
from types import SimpleNamespace

import mutations
import numpy as np
import pytest
from lite_files import lite_bytes
from lightgbm import LGBMClassifier
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sklearn.linear_model import LogisticRegression
from test_keras import PAIR, OnTorch
from test_python import place_in, save
from test_scaffold import NEEDED, SERVER
from test_tables import BOTH, NUMBERS, TRAIN
from xgboost import XGBClassifier

from mlserve.package import save_package
from mlserve.release.lock.dependencies import reached, requirements_of, spared_of

TORCH = {"torch", "filelock", "sympy", "mpmath", "networkx"}
WANTED = NEEDED | {"export": TORCH, "safetensors": TORCH}
TRAINS = set("""scikit-learn scipy pandas skl2onnx onnxmltools onnx onnxscript xgboost xgboost-cpu lightgbm catboost tensorflow tensorflow-cpu keras tf2onnx
                transformers tokenizers sentence-transformers huggingface-hub mlflow mlflow-skinny papermill nbdev docker""".split())


def installed(package):
    "The names that an image of a package would install, by what the distributions here ask for: pip's dry run without a network"
    asked = [Requirement(line) for line in requirements_of(package)]
    extras = {canonicalize_name(r.name): r.extras for r in asked}
    here = {canonicalize_name(d.metadata["Name"]): d.requires or [] for d in metadata.distributions()}
    assert set(extras) <= set(here)
    items = [{"metadata": {"name": name, "requires_dist": requires}, "requested": name in extras, "requested_extras": extras.get(name, ())} for name, requires in here.items()]
    return reached(items, spared_of(package.format))


def saved(kind, folder):
    "A package of a kind"
    numbers, labels = TRAIN[0].dropna()[NUMBERS].head(80), (TRAIN[1][TRAIN[0].notna().all(axis=1)] == "yes").astype(int)[:80]
    tables = {"scikit-learn": LogisticRegression(max_iter=20), "XGBoost": XGBClassifier(n_estimators=3, n_jobs=1), "LightGBM": LGBMClassifier(n_estimators=3, verbose=-1, n_jobs=1)}
    if kind in tables:
        return save_package(tables[kind].fit(numbers, labels), folder / "p", "table", numbers, BOTH)
    if kind == "LiteRT":
        (folder / "net.tflite").write_bytes(lite_bytes())
        return save_package(folder / "net.tflite", folder / "p", "lite", {"x": np.ones((4, 4), "f4")}, ["scores"])
    if kind == "Python":
        return save(place_in(folder))
    if kind == "Keras":
        return save_package(OnTorch(), folder / "p", "keras", PAIR, ["difference"])
    return SimpleNamespace(format=kind, providers=(), path=folder)  # a module of torch in any format: nothing else of it is asked


@pytest.mark.parametrize("kind", ["scikit-learn", "XGBoost", "LightGBM", "Keras", "LiteRT", "Python", "torchscript", "export", "safetensors", "onnx"])
def test_an_image_installs_what_serves_the_model_and_nothing_that_trained_it(kind, tmp_path):
    package = saved(kind, tmp_path)
    names = installed(package)
    assert not names & TRAINS, names & TRAINS
    assert names == SERVER | WANTED[package.format], names ^ (SERVER | WANTED[package.format])


def test_control_a_converter_in_the_image_is_seen(tmp_path, monkeypatch):
    mutations.sow("an_image_can_convert_what_it_serves", monkeypatch.setattr)
    with pytest.raises(AssertionError, match="skl2onnx"):
        test_an_image_installs_what_serves_the_model_and_nothing_that_trained_it("onnx", tmp_path)
