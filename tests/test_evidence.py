"""What a release left in MLflow, in a real browser: the page of an executed notebook by itself, and the pages of MLflow that show it."""
import os
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import nbformat
import pytest
from browser import WIDTHS, serious
from emulators import mlflow_server
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from mlserve.release.record.evidence import page_of
from mlserve.release.check.curves import speed_plot

SPEED = {"rows": [1, 8, 32], "p50_ms": [1.4, 2.2, 3.6], "p99_ms": [2.1, 3.0, 5.3], "model_ms": [1.0, 1.7, 3.1], "clients": [1, 4, 16],
         "requests_per_second": [690.4, 1200.0, 1983.7], "first_ms": 2.0, "cold_ms": 9.0}
NUMBERS = {"notebook": 0.9944, "container": 0.9944, "production": 0.9911, "baseline": 0.1028}
FOUND = {"passed": True, "rows": 360, "reference": "live model", "metrics": {"accuracy": NUMBERS}, "reading": "'y' as scores in 2 columns",
         "golden": {"max_abs": 0.0}, "holdout": {"max_abs": 1.9e-6}, "speed": {"cpu": SPEED}, "times": {"ready": 2.4}, "memory": 235_737_088,
         "when": "2026-11-29T04:45:00Z"}


def executed(**outputs):
    "A notebook that ran: prose, code, and outputs by their MIME type"
    from base64 import b64encode
    shown = {"image/png": b64encode(speed_plot({"cpu": SPEED})).decode(), **outputs}
    cells = [new_markdown_cell("# check\n\nEvery row *agrees*.\n\n## How fast\n\n| a | b |\n|---|---|\n| 1 | 2 |")]
    cells += [new_code_cell("draw(speed)  # as it was measured", outputs=[new_output("display_data", {kind: data})]) for kind, data in shown.items()]
    return new_notebook(cells=cells)


@contextmanager
def serving(folder, asked):
    "A folder, by http; whatever is asked for is noted"
    class Noted(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Noted, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def served(tmp_path):
    "A folder, by http"
    (tmp_path / "favicon.ico").touch()
    with serving(tmp_path, []) as url:
        yield url


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_executed_notebook_is_a_page_that_asks_nobody(served, visit, tmp_path, scheme, width):
    (tmp_path / "check.html").write_text(page_of(executed(), "check"))
    page = visit(f"{served}/check.html", scheme, width, ready="h1")
    assert page.inner_text("h1") == "check" and page.evaluate("document.images[0].naturalWidth") > 500
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
    assert [found for found in serious(page) if found[0] != "image-alt"] == []  # a plot of a notebook has no words of its own
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.querySelector('.highlight .c1')).color]")
    assert len(set(colours)) == 2


def test_control_what_a_notebook_brings_from_elsewhere_is_held_back(served, visit, tmp_path):
    "A plot that loads a library, an image by its address; without the policy the browser asks for both"
    asked = []
    with serving(tmp_path, asked) as elsewhere:
        loud = page_of(executed(**{"text/html": f'<script src="{elsewhere}/plot.js"></script><img src="{elsewhere}/pixel.png" alt="x">'}), "check")
        (tmp_path / "check.html").write_text(loud)
        (tmp_path / "open.html").write_text(loud.replace("default-src 'none'; img-src data:; ", "img-src *; "))
        visit(f"{served}/check.html", ready="h1").wait_for_timeout(500)
        assert not asked and sum("Content Security Policy" in said for said in visit.said) == 2, (asked, visit.said)
        visit(f"{served}/open.html", ready="h1").wait_for_timeout(500)
        assert {"/plot.js", "/pixel.png"} == set(asked)
    visit.said.clear()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    "A version, its run and its evidence in a real MLflow server: its address, and the pair"
    import torch

    from mlserve.package import save_package
    from mlserve.release.record import log_package, mark, record
    from mlserve.release.record.description import describe
    from mlserve.release.record.evidence import keep_evidence
    from mlserve.release.record.table import log_check_table
    home = tmp_path_factory.mktemp("mlflow")
    folder = home / "state/runs/1"
    folder.mkdir(parents=True)
    nbformat.write(executed(), folder / "check_inference.ipynb")
    package = save_package(torch.nn.Linear(4, 2), home / "sums", "sums", {"x": torch.ones(8, 4)}, ["y"])
    with mlflow_server(home, f"sqlite:///{home}/mlflow.db", 1) as url, pytest.MonkeyPatch.context() as env:
        env.setenv("MLFLOW_TRACKING_URI", url)
        env.delenv("MLFLOW_RUN_ID", raising=False)
        logged = log_package(package.path)
        pair = mark(record("sums", logged, "registry.test/sums@sha256:" + "a" * 64, {"mlserve.image_mb": "693.1"}), "cpu", FOUND)
        describe(pair)
        log_check_table(pair, "cpu", FOUND)
        keep_evidence(pair.run_id, folder)
        yield url, pair


@pytest.fixture
def mlflow_page(chromium, recorded):
    "Opens a page of MLflow"
    context = chromium.new_context(viewport={"width": 1500, "height": 1300})

    def opened(place):
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.goto(f"{recorded[0]}/#/{place}")
        return page
    yield opened
    context.close()


def keep_picture(page, name):
    "For whoever wants to look: where MLSERVE_PICTURES says"
    if folder := os.environ.get("PICTURES"):
        page.wait_for_timeout(3000)
        page.screenshot(path=f"{folder}/{name}.png")


def test_mlflow_shows_a_version_with_its_verdict_tables_and_next_steps(mlflow_page):
    page = mlflow_page("models/sums/versions/1")
    page.get_by_text("Passed on cpu").wait_for()
    for text in ("0.9944", "690", "registry.test/sums@sha256:aaaaaaaaaaaa…", "mlserve promote sums --version 1"):
        assert page.get_by_text(text).count(), text
    assert page.locator("table:has-text('baseline')").first.locator("td").count() == 5
    cells = page.locator("table:has-text('median, 1 row')").first.locator("th").all()
    left = [cell.bounding_box() for cell in cells]
    assert len(left) == 6 and page.evaluate("document.documentElement.scrollWidth") <= 1500
    keep_picture(page, "version")


def test_mlflow_opens_the_page_of_an_executed_notebook_among_the_artifacts(mlflow_page, recorded):
    _, pair = recorded
    page = mlflow_page(f"experiments/1/runs/{pair.run_id}/artifacts")
    page.get_by_text("evidence", exact=True).click()
    page.get_by_text("check_inference.html").click()
    frame = page.frame_locator("iframe").first
    frame.get_by_text("Every row agrees.").wait_for()
    assert frame.locator("img").evaluate("image => image.naturalWidth") > 500
    keep_picture(page, "page")


def test_mlflow_shows_the_check_as_a_table(mlflow_page, recorded):
    _, pair = recorded
    page = mlflow_page(f"experiments/1/runs/{pair.run_id}/artifacts")
    page.get_by_text("check_cpu.json").click()
    page.get_by_text("held-back, max difference").wait_for()
    assert page.get_by_text("constant answer").count()
    keep_picture(page, "table")


def test_mlflow_shows_the_run_with_its_logged_model_and_metrics(mlflow_page, recorded):
    _, pair = recorded
    page = mlflow_page(f"experiments/1/runs/{pair.run_id}")
    page.get_by_text("Logged models").first.wait_for()
    page.locator(f"a[href*='{pair.model_id}']").first.wait_for()
    keep_picture(page, "run")
    model = mlflow_page(f"experiments/1/models/{pair.model_id}")
    model.locator("a[href*='/models/sums/versions/1']").first.wait_for()
    keep_picture(model, "model")
