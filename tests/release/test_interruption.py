"""An interrupted notebook: what its cell has started, it takes away before its kernel ends."""
import signal
import subprocess
import sys

import nbformat
import pytest

from servers import until

CELL = """import time
from pathlib import Path
try:
    Path("begun").touch()
    time.sleep(60)
finally:
    time.sleep(4)  # as an engine does on a busy machine, asked to remove a container
    Path("taken away").touch()"""
HEARS = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's job in the background is started deaf to it
WAYS = {"own": "run_notebook(*book)", "shared": "with shared_kernel('.', 'import json') as kernel: run_notebook(*book, kernel)"}


@pytest.mark.parametrize("way", WAYS)
def test_a_cell_that_is_interrupted_has_the_time_to_take_away_what_it_started(way, tmp_path):
    "Jupyter ends a kernel two and a half seconds after the interrupt, a warm one at once"
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)], metadata=kernel), tmp_path / "cell.ipynb")
    code = f"{HEARS}\nfrom mlserve.release.notebook import run_notebook, shared_kernel\nbook = 'cell.ipynb', {{}}, 'out/cell.ipynb'\n{WAYS[way]}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL)
    until((tmp_path / "begun").exists, 60)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert (tmp_path / "taken away").exists()
