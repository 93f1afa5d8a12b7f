"""JupyterLab as `make lab` opens it, in a real browser: the example runs from its top to its last cell, and shows what it should."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time

import nbformat
import pytest
from commands import ROOT
from servers import free_port, until

from mlserve.client import Client

SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"},  # every cell is there, seen or not
            "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the examples, since it saves what it runs"
    home, port = tmp_path_factory.mktemp("lab"), free_port()
    shutil.copytree(ROOT / "nbs/examples", home / "nbs/examples", ignore=shutil.ignore_patterns("*-package*", "state"))
    book = nbformat.read(home / "nbs/examples/digits.ipynb", 4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = []  # what is shown later was shown by this run
    nbformat.write(book, home / "nbs/examples/digits.ipynb")
    for name, values in SETTINGS.items():
        place = home / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(values))
    options = f"--no-browser --ip=127.0.0.1 --port={port} --IdentityProvider.token="
    env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    env |= {"LAB": options, "NOTEBOOKS": f"{home}/nbs", "JUPYTERLAB_SETTINGS_DIR": f"{home}/settings", "MLSERVE_STATE": f"{home}/state"}
    with open(home / "log", "w") as log:
        process = subprocess.Popen(["make", "lab"], cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: process.poll() is not None or Client(url).is_ok("/api/status"), 120)
        assert process.poll() is None, (home / "log").read_text()[-3000:]
        yield url, home / "nbs/examples"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)  # it ends its kernels
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_example_runs_to_its_last_cell_and_shows_what_it_should(lab, chromium):
    "From the page that opens first: a bar, plots, cards and the served model; nothing red, nothing asked of others"
    url, folder = lab
    context, elsewhere = chromium.new_context(viewport={"width": 1280, "height": 900}), []
    page = context.new_page()
    page.on("request", lambda request: None if request.url.startswith((url, "data:", "blob:")) else elsewhere.append(request.url))
    page.goto(url)
    page.get_by_role("heading", name="Start here").wait_for(timeout=60_000)
    page.get_by_role("link", name="digits", exact=True).first.click()
    page.get_by_role("heading", name="Parameters").wait_for(timeout=60_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Restart Kernel and Run All Cells").click()
    assert page.locator(".jp-OutputArea-output").count() == 0
    page.locator(".jp-Dialog-button.jp-mod-warn").click()
    page.locator("progress[max='30'][value='30']").wait_for(timeout=120_000, state="attached")
    began = time.monotonic()
    page.get_by_text("Proofs of digits").wait_for(timeout=120_000, state="attached")
    print(f"from the end of training to the last cell {time.monotonic() - began:.0f} s")
    shown = page.locator(".jp-OutputArea-output")
    assert shown.locator(".mlserve").count() >= 4  # the package, its server, the comparison, the proofs
    assert shown.locator("img").count() >= 4 and page.locator(".mlserve svg, .mlserve img").count() >= 1
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts() == []
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    page.keyboard.press("Control+s")
    until(lambda: "Proofs of digits" in (folder / "digits.ipynb").read_text(), 20)
    assert not elsewhere
    context.close()
