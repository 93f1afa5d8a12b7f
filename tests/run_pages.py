"""nbdev's tests of all pages, two at a time, by forks of a process that has imported what most of them need, and what exporters look up."""
import docker  # noqa: F401
import mlflow.pyfunc  # noqa: F401
import pandas  # noqa: F401
import papermill  # noqa: F401
import sklearn  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.export.decomp_utils  # noqa: F401
import torch.onnx._internal.exporter._registration  # noqa: F401
from nbdev.test import nbdev_test

import exporters

if __name__ == "__main__":
    exporters.remember()
    nbdev_test(n_workers=2, timing=True)
