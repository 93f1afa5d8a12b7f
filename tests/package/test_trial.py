"""A package tried in a notebook: what ends with the kernel, what survives a cell, and what an error shows there."""
import os
import re
import signal
import subprocess
import sys

import nbformat
import numpy as np
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from servers import until

from mlserve.client import Client
from mlserve.package import save_package

KERNEL = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a kernel has a handler; a background job of a shell is started without
from mlserve.package import load_package
server = load_package(sys.argv[1]).serve()
try: # an interrupt may come before the line below ends
    print(server.url, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print('interrupted', flush=True)
time.sleep(60) # the next cell
"""


def test_a_server_outlives_an_interrupted_cell_and_ends_with_its_kernel(tmp_path):
    "Jupyter interrupts the process group of a kernel, and kills it when it is restarted"
    save_package(torch.nn.Linear(3, 2).eval(), tmp_path / "line", "line", {"x": torch.rand(4, 3)}, ["y"])
    kernel = subprocess.Popen([sys.executable, "-c", KERNEL, tmp_path / "line"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        with Client(kernel.stdout.readline().strip()) as client:
            os.killpg(kernel.pid, signal.SIGINT)
            assert kernel.stdout.readline() == "interrupted\n"
            assert client.infer({"x": np.zeros((1, 3), "f4")})["y"].shape == (1, 2)
            os.killpg(kernel.pid, signal.SIGKILL)
            until(lambda: not client.live())
    finally:
        kernel.kill()
        kernel.wait()


def test_an_error_in_a_cell_shows_the_sentence_the_mend_and_no_line_of_ours():
    cell = nbformat.v4.new_code_cell("from mlserve.package import load_package\nload_package('nowhere')")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    try:
        NotebookClient(notebook, timeout=60).execute()
    except CellExecutionError:
        pass
    (error,) = [o for o in notebook.cells[0].outputs if o.output_type == "error"]
    shown = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))
    assert error.ename == "LocalResource"
    assert shown == ("LocalResource: nowhere is asked for as a model package; found no such folder.\n"
                     "Make one there with save_package; in a container, mount it there.\n"
                     "  line 2 of this cell: load_package('nowhere')")
