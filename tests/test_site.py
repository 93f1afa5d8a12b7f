"""The documentation site in a real browser, as `make docs` made it: searched, read by axe, on a desk and on a phone, with nothing from elsewhere."""
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser import WIDTHS, serious
from commands import ROOT

SITE = ROOT / "_docs"
SEARCHES = {
    "my own model": "tutorials/my_own_model",
    "roll back": "tutorials/deploy_and_roll_back",
    "GPU not found": "tutorials/when_something_is_wrong",
    "exit code 9": "reference/exit_codes",
    "dynamic batching": "serving/batching/scheduler",
    "corporate proxy certificate": "tutorials/behind_a_corporate_proxy",
    "weights from S3": "tutorials/which_delivery",
    "readiness": "serving/state",
    "package digest": "package/lock",
    "slow first request": "tutorials/when_something_is_wrong",
    "out of memory": "tutorials/when_something_is_wrong",
    "different predictions": "tutorials/when_something_is_wrong"}
# one of each kind: the start, prose with tables, executed answers, pictures, data frames, generated tables, drawings, cards, plots, a room, commands, what is not there
KINDS = ["index", "tutorials/when_something_is_wrong", "tutorials/my_own_model", "tutorials/which_model", "examples/digits", "examples/table", "reference/commands",
         "reference/settings", "explanations/architecture", "explanations/glossary", "package/trial/card", "release/check/curves", "serving/batching/scheduler", "404"]


class Pages(SimpleHTTPRequestHandler):
    "The site below the path at which it is published; what is not there is its own page 404"

    def translate_path(self, path):
        return super().translate_path(path.removeprefix("/mlserve"))

    def send_error(self, code, *_):
        body = (SITE / "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    "Where the built site is served"
    assert (SITE / "index.html").exists(), "There is no site to look at: make docs"
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Pages, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/mlserve"
        server.shutdown()


def searched(page, text):
    "What the search finds, best first: pages, without their anchors"
    page.keyboard.press("Control+k")
    page.get_by_role("combobox", name="Search").fill(text)
    page.get_by_role("option").first.wait_for()
    found = [option.get_attribute("href") for option in page.get_by_role("option").all()]
    return [place.partition("/mlserve/")[2].partition(".html")[0] for place in found]


@pytest.mark.parametrize("text", SEARCHES)
def test_a_search_finds_the_right_page_among_its_first_three(site, visit, text):
    page = visit(f"{site}/index.html", ready="h1")
    found = searched(page, text)
    assert SEARCHES[text] in found[:3], found[:10]
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/{found[0]}.html*")


@pytest.mark.timeout(2400)
def test_every_page_opens_without_a_word_and_fits_a_phone(site, visit):
    "No error in the console, nothing asked of another host, no broken picture, no sideways scrolling"
    page, wrong = visit(f"{site}/index.html", width="narrow", ready="h1"), {}
    for place in sorted(SITE.rglob("*.html")):
        name = str(place.relative_to(SITE))
        page.goto(f"{site}/{name}", wait_until="load")
        found = page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => 'no picture: ' + i.src)")
        wide = page.evaluate("document.documentElement.scrollWidth")
        wrong[name] = found + visit.said + [f"{wide} pixels wide"] * (wide > WIDTHS["narrow"])
        visit.said.clear()
    assert len(wrong) > 100
    assert not {name: found for name, found in wrong.items() if found}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_has_no_serious_finding(site, visit, scheme, width):
    page, wrong = visit(f"{site}/index.html", scheme, width, "h1"), {}
    assert page.get_attribute("body", "data-md-color-scheme") == {"light": "default", "dark": "slate"}[scheme]
    for name in KINDS:
        page.goto(f"{site}/{name}.html")
        page.evaluate("[...document.querySelectorAll('article details')].slice(0, 3).forEach(d => d.open = true)")
        wrong[name] = serious(page)
    assert not {name: found for name, found in wrong.items() if found}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_the_search_shows_can_be_read(site, visit, scheme):
    page = visit(f"{site}/index.html", scheme, ready="h1")
    assert searched(page, "batch")
    assert {rule for rule, _ in serious(page)} <= {"scrollable-region-focusable"}  # the list, through which the arrows go


def test_what_is_not_there_leads_back(site, visit):
    page = visit(f"{site}/tutorials/nothing.html", ready="h1")
    assert visit.said.pop().endswith("404 (Not Found)") and "404" in page.inner_text("h1")
    page.click("a[data-md-component=logo] >> visible=true")
    page.wait_for_url(f"{site}/index.html")


def test_control_a_page_that_asks_elsewhere_and_a_fault_are_seen(site, visit):
    page = visit(f"{site}/index.html", ready="h1")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"http://127.0.0.2:9/x.png\">')")
    page.wait_for_timeout(500)
    assert "http://127.0.0.2:9/x.png" in visit.said
    assert "image-alt" in [rule for rule, _ in serious(page)]
    visit.said.clear()
