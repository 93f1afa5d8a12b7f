"""The page of a running model in a real browser: asked by a form, drawn on, read by axe, in light and dark, wide and narrow."""
import json
import wave
from base64 import b64encode
from io import BytesIO

import numpy as np
import pytest
from browser import WIDTHS, serious
from commands import TESTS
from PIL import Image
from servers import Server


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "A server of a model that says in which row of eight an image is brightest"
    import torch

    from mlserve.package import save_package

    class Brightest(torch.nn.Module):
        def forward(self, image):
            return torch.softmax(image.sum((1, 3)), 1)
    folder = tmp_path_factory.mktemp("drawn")
    save_package(Brightest().eval(), folder / "package", "brightest", {"image": torch.rand(4, 1, 8, 8)}, ["row"])
    with Server(folder / "package", folder, real=True, ui=True, model_version=3) as server:
        yield server


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "A server of a table: who is heavy, by mass and sex"
    import pandas as pd
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    from mlserve.package import save_package
    rows = pd.DataFrame({"mass": np.linspace(3000, 6000, 60), "sex": ["male", None, "female"] * 20})
    texts = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    model = make_pipeline(make_column_transformer((SimpleImputer(), ["mass"]), (texts, ["sex"])), LogisticRegression(max_iter=5000))
    model.fit(rows, np.where(rows["mass"] > 4500, "heavy", "light"))
    folder = tmp_path_factory.mktemp("table")
    save_package(model, folder / "package", "weights", inputs=rows, outputs=["label", "probabilities"], optional=["mass", "sex"])
    with Server(folder / "package", folder, real=True, ui=True) as server:
        yield server


HANDLERS = {
    "text": """
import numpy as np
def preprocess(request: list[str]) -> dict: return {'x': np.array([[text.count(c) for c in 'abcd'] for text in request], np.float32)}
def postprocess(outputs: dict, request) -> list[dict]: return [{'letter': 'abcd'[int(y.argmax())], 'probabilities': y.tolist()} for y in outputs['y']]
""",
    "days": """
import datetime
import numpy as np
from pydantic import BaseModel
class Day(BaseModel):
    date: datetime.date
    warm: float = 20
    open: bool
    names: list[str]
    note: str | None = None
def preprocess(request: list[Day]) -> dict: return {'x': np.array([[d.warm, d.open, d.date.month, len(d.names)] for d in request], np.float32)}
def postprocess(outputs: dict, request) -> list[str]: return [f'{d.date} {d.warm} {d.open} {d.names} {d.note}' for d in request]
"""}


@pytest.fixture(scope="module", params=HANDLERS)
def own(request, tmp_path_factory):
    "A server of a model that has types of its own: which, and the server"
    import torch

    from mlserve.package import save_package
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "handler.py").write_text(HANDLERS[request.param])
    save_package(torch.nn.Softmax(1).eval(), folder / "package", request.param, {"x": torch.rand(3, 4)}, ["y"], handler=folder / "handler.py")
    with Server(folder / "package", folder, real=True, ui=True) as server:
        yield request.param, server


def test_a_model_with_types_of_its_own_is_asked_in_these(own, visit):
    "A text is typed; a record is filled in, by date, number, choice, lines and a field that may be empty"
    kind, server = own
    page = visit(server.url + "/")
    if kind == "text":
        page.get_by_label("text", exact=True).fill("cab-bage\nbb")
        sent, told = ["cab-bage\nbb"], "b"
    else:
        for name, value in (("date (date)", "2026-11-29"), ("warm (number)", "7.5"), ("names (one a line)", "Ada\nMax"), ("note (string, may be empty)", "")):
            page.get_by_label(name, exact=True).fill(value)
        page.get_by_role("combobox", name="open (boolean)").select_option("true")
        sent, told = [{"date": "2026-11-29", "warm": 7.5, "open": True, "names": ["Ada", "Max"], "note": None}], "2026-11-29 7.5 True ['Ada', 'Max'] None"
    page.click("#send")
    page.wait_for_selector("#answer details", state="attached")
    assert json.loads(page.input_value("#body")) == sent and "/handle" in page.inner_text("#snippet")
    assert page.inner_text("#answer p b") == told and page.inner_text("#took").startswith("200 in")
    assert page.locator(".bar").count() == (4 if kind == "text" else 0)
    assert not serious(page)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A server of a model that takes a file and values beside it"
    import torch

    from mlserve.package import save_package
    folder = tmp_path_factory.mktemp("files")
    save_package(torch.nn.Identity().eval(), folder / "package", "files", {"x": torch.rand(3, 2)}, ["y"], handler=TESTS / "picture_handler.py")
    with Server(folder / "package", folder, real=True, ui=True) as server:
        yield server


def test_a_file_is_chosen_and_sent_in_a_form(files, visit):
    page = visit(files.url + "/")
    assert "-F 'image=@image'" in page.inner_text("#snippet") and page.get_by_label("scale (number)").input_value() == "1"
    page.click("#send")
    page.wait_for_selector("#answer .wrong")
    assert "'image': Field required" in page.inner_text("#answer")
    visit.said[:] = [said for said in visit.said if "400" not in said]  # Chromium tells of each
    page.get_by_label("image (file)").set_input_files({"name": "a.pgm", "mimeType": "image/x-portable-graymap", "buffer": b"P5 2 1 255 \x03\x07"})
    page.get_by_label("scale (number)").fill("2")
    page.get_by_label("note (string, may be empty)").fill("of a cat")
    page.click("#send")
    page.wait_for_selector("#answer details", state="attached")
    answer = {"kind": "image", "size": 13, "y": [6, 14], "note": "of a cat"}
    assert json.loads(page.locator("#answer pre").text_content()) == answer
    assert "-F 'image=@a.pgm'" in page.inner_text("#snippet") and "scale=2" in page.inner_text("#snippet")
    page.get_by_role("button", name="JavaScript").click()
    assert "new FormData()" in page.inner_text("#snippet")
    with BytesIO() as file:
        with wave.open(file, "wb") as sound:
            sound.setparams((1, 2, 8000, 2, "NONE", None))
            sound.writeframes(b"\x05\x00\x09\x00")
        page.get_by_label("image (file)").set_input_files({"name": "a.wav", "mimeType": "audio/wav", "buffer": file.getvalue()})
    page.click("#send")
    page.wait_for_function("() => /sound/.test(document.querySelector('#answer pre')?.textContent)")
    assert json.loads(page.locator("#answer pre").text_content())["y"] == [10, 18]
    assert not serious(page)


def test_its_route_has_an_example_that_is_answered(own, visit):
    page = visit(own[1].url + "/docs", ready="#routes summary")
    row = page.locator("#routes details", has_text="/handle").first
    row.locator("summary").first.click()
    assert json.loads(row.locator("textarea").input_value())
    row.get_by_role("button", name="Send").click()
    row.locator("pre").first.wait_for()
    assert row.locator("pre").first.inner_text().startswith("200 in")


def test_a_dropped_image_is_asked(drawn, visit):
    "Only its seventh row is bright, and another file says that it is no image"
    page = visit(drawn.url + "/")
    drop = """async ([text, type, name]) => {
        const data = new DataTransfer(), bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0))
        data.items.add(new File([bytes], name, {type}))
        document.querySelector('canvas').dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}))}"""
    with BytesIO() as file:
        pixels = np.zeros((8, 8), np.uint8)
        pixels[6] = 255
        Image.fromarray(pixels).save(file, "PNG")
        picture = b64encode(file.getvalue()).decode()
    before = page.input_value("#body")
    page.evaluate(drop, [picture, "image/png", "seven.png"])
    page.wait_for_function("before => document.getElementById('body').value !== before", arg=before)
    page.click("#send")
    page.wait_for_selector(".bar")
    assert page.locator(".bar").first.inner_text().split()[0] == "6"
    page.evaluate(drop, [b64encode(b"no image").decode(), "text/plain", "notes.txt"])
    page.wait_for_selector("#problem", state="visible")
    assert "notes.txt is no image" in page.inner_text("#problem")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_drawing_is_answered_with_bars(drawn, visit, scheme, width):
    page = visit(drawn.url + "/", scheme, width)
    page.click("text=Clear")
    box = page.locator("canvas").bounding_box()
    y = box["y"] + box["height"] * 5.5 / 8
    page.mouse.move(box["x"] + 20, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 20, y, steps=8)
    page.mouse.up()
    page.click("#send")
    page.wait_for_selector(".bar")
    assert page.locator(".bar").first.inner_text().split()[0] == "5" and page.locator(".bar").first.inner_text().endswith("%") and page.locator(".bar").count() == 8
    sent = json.loads(page.input_value("#body"))
    assert np.argmax(drawn.http.post("/predict", json=sent).json()["outputs"][0]) == 5
    assert "200 in" in page.inner_text("#took") and page.inner_text("#state") == "ready" and "version 3" in page.inner_text("header")
    assert not serious(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]


def test_the_request_elsewhere_is_the_request(drawn, visit):
    page = visit(drawn.url + "/")
    body = json.loads(page.input_value("#body"))
    for language, start in (("curl", "curl -s"), ("Python", "import requests"), ("JavaScript", "const answer = await fetch")):
        page.click(f"#tongues >> text={language}")
        text = page.inner_text("#snippet")
        assert text.startswith(start) and f"{drawn.url}/predict" in text
    page.click("#tongues >> text=Python")
    named = {}
    exec(page.inner_text("#snippet").partition("body = ")[2].partition("\n")[0].join(["body = ", ""]), named)
    assert named["body"] == body


def test_a_row_of_a_table_is_filled_in(table, visit):
    page = visit(table.url + "/", "dark")
    for mass, sex, sent in (("5900", "", {"mass": 5900, "sex": None}), ("3100", "male", {"mass": 3100, "sex": "male"})):
        page.get_by_label("mass").fill(mass)
        page.get_by_label("sex").fill(sex)
        with page.expect_response("**/predict"):
            page.click("#send")
        page.wait_for_selector("#answer details", state="attached")
        assert json.loads(page.input_value("#body"))["inputs"] == [sent]
        label = table.http.post("/predict", json={"inputs": [sent]}).json()["outputs"][0]["label"]
        assert page.inner_text("#answer p b") == label == ("heavy" if mass == "5900" else "light")
    assert not serious(page)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_route_that_has_an_example_answers_it(drawn, visit, width):
    page = visit(drawn.url + "/docs", width=width, ready="#routes summary")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    asked = 0
    for row in page.locator("#routes details:not(.group)").all():
        body = row.locator("textarea")
        if row.locator("button").count() and (not body.count() or body.input_value()):
            row.locator("button").click()
            row.locator("pre").first.wait_for()
            said = row.locator("pre").first.inner_text()
            assert said.startswith("200 in"), (row.locator("summary").first.inner_text(), said)
            asked += 1
    assert asked > 25
    assert not serious(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
    assert "`" not in page.inner_text("#routes summary:has-text('MLSERVE_UI')")


def test_a_token_is_asked_for_and_kept_nowhere(drawn, visit, tmp_path):
    (tmp_path / "token").write_text("s3cret")
    package = next(drawn.log.parent.glob("package"))
    with Server(package, tmp_path, wait=False, real=True, ui=True, token_file=tmp_path / "token") as server:
        server.wait_ready()
        assert server.http.get("/").status_code == 401
        page = visit(server.url + "/", ready="#secret")
        assert not page.is_visible("#send")
        for given in ("wrong", "s3cret"):
            page.fill("#secret", given)
            page.click("text=Use it")
            page.wait_for_selector("#problem" if given == "wrong" else "#send", state="visible")
        page.click("#send")
        page.wait_for_selector(".bar")
        assert page.evaluate("[document.cookie, localStorage.length, sessionStorage.length]") == ["", 0, 0]
        assert "s3cret" not in page.content()
        visit.said[:] = [said for said in visit.said if "401" not in said]  # Chromium tells of each


def test_control_axe_sees_a_fault_and_the_policy_stops_a_script(drawn, visit):
    page = visit(drawn.url + "/")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\"><b onclick=\"1\">x</b>')")
    assert [rule for rule, _ in serious(page)] == ["image-alt"]
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))")
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in said for said in visit.said)
    visit.said.clear()
