"""A real browser: opens a page in light or dark, wide or narrow, and tells what the page asked of others or complained of; axe reads it."""
import shutil
import sys

import pytest
from linters import pinned

WIDTHS = {"wide": 1280, "narrow": 390}
NOTE = "Autofocus processing was blocked because a document's URL has a fragment"  # Chromium's, of the field of the site's search


@pytest.fixture(scope="session")
def chromium():
    "Debian's browser, and axe"
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "The tests of pages need a browser: apt-get install chromium"
    sys.path.append(str(pinned("browser")))
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    "Opens a page; what it asked of others, and what it complained of, is a failure at the end"
    contexts, said = [], []

    def opened(url, scheme="light", width="wide", ready="#send"):
        home = "/".join(url.split("/")[:3]) + "/"
        contexts.append(chromium.new_context(color_scheme=scheme, viewport={"width": WIDTHS[width], "height": 900}))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: None if message.text.startswith(NOTE) else said.append(message.text))
        page.on("request", lambda request: None if request.url.startswith((home, "data:")) else said.append(request.url))
        page.goto(url)
        page.wait_for_selector(ready, state="visible", timeout=60_000)
        return page
    opened.said = said
    yield opened
    for context in contexts:
        context.close()
    assert not said, said


def serious(page):
    "What axe finds that somebody cannot use"
    from axe_playwright_python.sync_playwright import Axe
    found = Axe().run(page).response["violations"]
    return [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]
