"""The documentation site in a real browser, as `make docs` made it: searched, read by axe, on a desk and on a phone, by keyboard, on paper, with nothing from elsewhere."""
import re
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
KINDS = ["index", "tutorials/first_release", "tutorials/when_something_is_wrong", "tutorials/my_own_model", "tutorials/which_model", "examples/digits", "examples/table", "reference/commands",
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


def test_the_start_shows_what_it_is_the_commands_and_what_comes_of_them(site, visit):
    page = visit(f"{site}/index.html", ready="h1")
    assert page.get_by_role("link", name="My first release").count()
    for picture in page.locator("article img").all():
        assert picture.get_attribute("alt") and picture.evaluate("i => i.naturalWidth > 300")
    assert page.locator("article img").count() == 2
    codes = "\n".join(page.locator("article pre").all_inner_texts())
    assert "git clone" in codes and "make release" in codes and "answers on cpu as the notebook did" in codes and "serve: docker run" in codes.replace("serve: DOCKER_HOST", "serve: docker run")


def test_what_readers_come_for_stands_in_five_tabs_tutorials_first(site, visit):
    page = visit(f"{site}/tutorials/first_release.html", ready="h1")
    assert page.locator(".md-tabs__link").all_inner_texts() == ["Start", "Tutorials", "How-to and triage", "Reference", "The house"]
    lessons = page.locator(".md-sidebar--primary .md-nav__link:visible").all_inner_texts()
    assert [lesson.strip() for lesson in lessons][:3] == ["My first release", "Release my own model", "Which models can I serve?"]


def test_the_version_is_shown_with_a_link_to_the_source(site, visit):
    version = re.search(r"^version = (.+)", (ROOT / "settings.ini").read_text(), re.M)[1]
    page = visit(f"{site}/tutorials/first_release.html", ready="h1")
    assert version in page.inner_text(".md-header__source") and version in page.inner_text("footer")
    assert page.get_attribute(".md-header__source a", "href") == "https://github.com/mlserve/mlserve"


def test_each_page_leads_to_its_notebook_and_a_room_to_its_module():
    rooms = 0
    for place in SITE.rglob("*.html"):
        sources = dict(re.findall(r'href="?https://github.com/mlserve/mlserve/blob/main/(\S+?)"? title="(The \w+) of this page"', place.read_text()))
        assert all((ROOT / file).is_file() for file in sources), (place, sources)
        assert "The notebook" in sources.values() or place.name == "404.html", place
        rooms += "The module" in sources.values()
    assert rooms > 80


def test_code_is_copied_by_its_button(site, visit):
    page = visit(f"{site}/tutorials/my_own_model.html", ready="h1")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    block = page.locator("article .highlight", has_text="save_package(model").first
    block.scroll_into_view_if_needed()
    block.hover()
    block.locator("button").first.click()
    assert page.evaluate("navigator.clipboard.readText()").strip() == block.locator("code").text_content().strip()


def test_next_leads_through_every_page_in_the_order_of_llms_txt():
    listed = re.findall(r"^- \[.+?\]\((.+?)\)", (SITE / "llms.txt").read_text(), re.M)
    assert listed[:3] == ["index.html", "tutorials/first_release.html", "tutorials/my_own_model.html"]
    place, walked = SITE / "index.html", []
    while place:
        walked.append(str(place.relative_to(SITE)))
        ahead = re.search(r'<link rel="?next"? href="?([^">\s]+)', place.read_text())
        place = (place.parent / ahead[1]).resolve() if ahead else None
    assert walked == listed and set(walked) == {str(p.relative_to(SITE)) for p in SITE.rglob("*.html")} - {"404.html"}


def test_the_footer_leads_back_and_forth(site, visit):
    page = visit(f"{site}/tutorials/my_own_model.html", ready="h1")
    page.click(".md-footer__link--prev")
    page.wait_for_url("**/tutorials/first_release.html")
    page.click(".md-footer__link--next")
    page.wait_for_url("**/tutorials/my_own_model.html")


def test_the_icon_is_our_own(site, visit):
    page = visit(f"{site}/serving/state.html", ready="h1")
    icon = page.evaluate("document.querySelector('link[rel=icon]').href")
    answer = page.request.get(icon)
    assert icon.endswith("/images/icon.svg") and answer.ok and answer.text() == (ROOT / ".ci/icon.svg").read_text()


def test_on_paper_there_is_the_page_and_no_furniture(site, visit):
    page = visit(f"{site}/tutorials/my_own_model.html", "dark", ready="h1")
    page.emulate_media(media="print")
    assert not [part for part in (".md-header", ".md-tabs", ".md-sidebar--primary", ".md-sidebar--secondary", ".md-footer") if page.is_visible(part)]
    assert page.is_visible("article h1") and page.is_visible("article pre")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")


def test_a_keyboard_is_enough(site, visit):
    "The first stop leads to the text; the search opens, answers and closes; what scrolls sideways is a stop"
    page = visit(f"{site}/reference/commands.html", ready="h1")
    page.keyboard.press("Tab")
    assert "md-skip" in page.evaluate("document.activeElement.className") and page.is_visible(".md-skip")
    page.keyboard.press("Enter")
    assert "#" in page.url
    assert searched(page, "roll back")
    page.keyboard.press("Escape")
    page.get_by_role("combobox", name="Search").wait_for(state="hidden")
    wide = "[...document.querySelectorAll('article .md-typeset__scrollwrap, article .output')].filter(b => b.scrollWidth > b.clientWidth)"
    assert page.evaluate(f"{wide}.every(b => b.tabIndex === 0)")


@pytest.mark.parametrize("name", ["tutorials/behind_a_corporate_proxy", "serving/observability/shared_memory", "release/deploy/render/kubernetes", "pipelines/record_release"])
def test_the_current_page_is_in_sight_in_the_sidebar(site, visit, name):
    page = visit(f"{site}/{name}.html", ready="h1")
    current = page.locator(".md-sidebar--primary a.md-nav__link--active").last
    box = current.bounding_box()
    assert current.is_visible() and 0 < box["y"] < 900 - box["height"], box


def test_a_room_shows_its_results_and_folds_its_source(site, visit):
    page = visit(f"{site}/serving/batching/scheduler.html", ready="h1")
    folds = page.locator("details.source")
    assert folds.count() > 5 and not page.locator("details.source[open]").count()
    assert not page.locator("details.source pre").first.is_visible() and page.locator("article pre.result").first.is_visible()
    folds.nth(1).locator("summary").click()
    assert page.locator("details.source[open] pre").first.is_visible()


def test_a_reference_page_shows_tables_and_no_code_that_made_them(site, visit):
    for place in (SITE / "reference").glob("*.html"):
        assert "IPython.display" not in place.read_text(), place
    page = visit(f"{site}/reference/settings.html", ready="h1")
    assert page.locator("article table").count()


def test_a_tutorial_shows_the_cells_that_go_into_the_package(site, visit):
    page = visit(f"{site}/tutorials/any_python_model.html", ready="h1")
    exported = page.locator("article .highlight", has_text="#| export")
    assert exported.count() > 1 and exported.first.is_visible()


def test_a_word_is_explained_where_a_page_uses_it_first(site, visit):
    page = visit(f"{site}/tutorials/first_release.html", ready="h1")
    assert page.locator("article a.term").count() > 2
    places = page.locator("article a.term").evaluate_all("all => all.map(a => a.hash)")
    assert len(places) == len(set(places))
    word = page.locator("article a.term").first
    assert len(word.get_attribute("title") or page.evaluate("a => a.dataset.mdTitle || ''", word.element_handle())) > 20
    word.click()
    page.wait_for_url("**/explanations/glossary.html#*")
    assert page.locator(page.evaluate("location.hash")).is_visible()


def test_control_a_page_that_asks_elsewhere_and_a_fault_are_seen(site, visit):
    page = visit(f"{site}/index.html", ready="h1")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"http://127.0.0.2:9/x.png\">')")
    page.wait_for_timeout(500)
    assert "http://127.0.0.2:9/x.png" in visit.said
    assert "image-alt" in [rule for rule, _ in serious(page)]
    visit.said.clear()
