"""Keras without TensorFlow: what stands on no page. The real models are run by `make models`."""
import types

import mutations
import numpy as np
import pytest
import torch

from mlserve.errors import LocalResource, UsageError
from mlserve.package import golden, save_package


class Difference:
    "Looks like a functional model of Keras with two inputs of one shape"
    inputs = [types.SimpleNamespace(name=name, dtype="float32") for name in ("left", "right")]
    output_names, layers = ["difference"], []

    def call(self, given, training=None):
        assert training is False
        return given["left"] - given["right"]

    def __call__(self, given, training=None):
        return self.call(given, training=training)


class OnTorch(Difference, torch.nn.Module):
    "The same, on the backend torch"


Difference.__module__ = "keras.src.models.functional"
PAIR = {"right": np.full((2, 3), 1.0), "left": np.full((2, 3), 5.0)}


def test_on_torch_inputs_are_met_by_name_in_inference_mode_and_in_the_types_of_the_model(tmp_path):
    package = save_package(OnTorch(), tmp_path / "p", name="k", inputs=PAIR, outputs=["difference"])
    assert (golden(package)[1]["difference"] == 4).all() and {spec.datatype for spec in package.inputs} == {"FP32"}


def test_control_inputs_that_go_by_their_order_are_seen(tmp_path, monkeypatch):
    mutations.sow("inputs_of_keras_go_by_their_order", monkeypatch.setattr)
    with pytest.raises(AssertionError):
        test_on_torch_inputs_are_met_by_name_in_inference_mode_and_in_the_types_of_the_model(tmp_path)


@pytest.mark.parametrize("format, error, words", [("torchscript", UsageError, "it becomes 'onnx'"), (None, LocalResource, r"mlserve\[keras\]")])
def test_what_tensorflow_is_needed_for_says_so(tmp_path, monkeypatch, format, error, words):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow", None)
    monkeypatch.setitem(__import__("sys").modules, "keras", types.SimpleNamespace(backend=types.SimpleNamespace(backend=lambda: "tensorflow")))
    with pytest.raises(error, match=words):
        save_package(Difference(), tmp_path / "p", name="k", inputs=PAIR, format=format)
    assert not list(tmp_path.iterdir())


def test_a_table_and_a_file_of_keras_name_the_way(tmp_path):
    import pandas as pd
    for model, inputs, words in ((Difference(), pd.DataFrame({"left": [1.0]}), "to_numpy"), ("m.keras", PAIR, "load_model")):
        with pytest.raises(UsageError, match=words):
            save_package(model, tmp_path / "p", name="k", inputs=inputs)
