"""Files for a model's own steps, as the whole body and as parts of a form: taken under the limits of every body, or refused with a sentence."""
import contextlib
import gzip
import io
import json
import subprocess
import threading
import wave

import pytest
from commands import TESTS
from hypothesis import given, settings, strategies as st
from pydantic import TypeAdapter
from servers import Server, Wire, request, until
from test_decoding import Probed

from mlserve.client import Client
from mlserve.errors import InvalidInput, MlserveError, TooLarge
from mlserve.wire.form import form_of

HANDLER, MOST = TESTS / "picture_handler.py", 32 * 2**20
SETTINGS = dict(FAKE_HANDLER=HANDLER, FAKE_SECONDS=0, max_body=MOST, ui=True)
IMAGE = b"P5 2 1 255 \x03\x07"
FORM = {"content-type": "multipart/form-data; boundary=b"}


def sound():
    with io.BytesIO() as file:
        with wave.open(file, "wb") as w:
            w.setnchannels(1), w.setsampwidth(2), w.setframerate(8000)
            w.writeframes(b"\x05\x00\x09\x00")
        return file.getvalue()


def part(name, content=IMAGE, more='; filename="a.pgm"\r\nContent-Type: image/x-portable-graymap'):
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"


def form(*parts):
    return b"".join(parts) + b"--b--\r\n"


@pytest.fixture(scope="module")
def server(double, tmp_path_factory):
    with Server(double, tmp_path_factory.mktemp("uploads"), **SETTINGS) as s:
        yield s


def ask(server, body, kind="multipart/form-data; boundary=b", **headers):
    return server.http.post("/handle", content=body, headers={"content-type": kind, **headers})


def curl(server, *args):
    return json.loads(subprocess.run(["curl", "-sS", f"{server.url}/handle", *args], capture_output=True, check=True, text=True).stdout)


# ---- what is taken

@pytest.mark.parametrize("name,content,media,kind,y", [("a.pgm", IMAGE, "image/x-portable-graymap", "image", [6, 14]), ("a.wav", sound(), "audio/wav", "sound", [10, 18])])
def test_an_image_and_a_sound_by_curl_and_by_the_client(server, tmp_path, name, content, media, kind, y):
    file = tmp_path / name
    file.write_bytes(content)
    answer = {"kind": kind, "size": len(content), "y": y, "note": None}
    assert curl(server, "-F", f"image=@{file}") == answer
    assert curl(server, "-H", f"content-type: {media}", "--data-binary", f"@{file}") == answer
    assert curl(server, "-F", f"image=@{file}", "-F", "scale=2", "-F", "note=twice") == answer | {"y": [2 * v for v in y], "note": "twice"}
    with Client(server.url) as client:
        assert client.handle(files={"image": file}) == client.handle(files={"image": content}) == answer
        assert client.handle({"scale": 2, "note": "é"}, {"image": file}) == answer | {"y": [2 * v for v in y], "note": "é"}
        with pytest.raises(InvalidInput, match="neither a grey map nor a sound"):
            client.handle(files={"image": b"GIF"})


def test_a_compressed_file_and_json_are_taken_too(server):
    answer = {"kind": "image", "size": len(IMAGE), "y": [6, 14], "note": None}
    for body, kind in ((IMAGE, "application/octet-stream"), (form(part("image")), FORM["content-type"])):
        assert ask(server, gzip.compress(body), kind, **{"content-encoding": "gzip"}).json() == answer
    assert ask(server, json.dumps({"image": IMAGE.decode()}).encode(), "application/json").json() == answer


def test_a_failure_of_the_models_own_steps_is_counted_as_one_of_the_model(server):
    "A library's error about a broken file is no ValueError, and so a 500 that an operator must see"
    before = server.metric("failed_total")
    assert ask(server, b"RIFF, and no sound", "audio/wav").status_code == 500
    until(lambda: server.metric("failed_total") == before + 1, 10)  # a worker tells now and then
    assert ask(server, b"GIF", "image/gif").status_code == 400 and server.metric("failed_total") == before + 1


def test_openapi_tells_of_every_body(server):
    post = server.http.get("/openapi.json").json()["paths"]["/handle"]["post"]
    bodies = post["requestBody"]["content"]
    assert set(bodies) == {"application/json", "multipart/form-data", "image/*", "audio/*"}
    assert bodies["multipart/form-data"]["encoding"] == {"image": {"contentType": "image/*, audio/*"}}
    assert bodies["image/*"]["schema"] == {"type": "string", "format": "binary"}


# ---- what is refused

def test_a_file_on_a_route_of_tensors_is_415(server):
    assert server.http.post("/predict", content=IMAGE, headers={"content-type": "image/png"}).status_code == 415
    assert server.http.post("/predict", content=form(part("image")), headers=FORM).status_code == 415


WRONG = {
    "missing": (400, "'image': Field required", form(part("note", b"a", ""))), "empty": (400, "'image': Field required", form()),
    "doubled": (400, "'image' twice", form(part("image"), part("image"))), "unknown": (400, "allowed are image, scale, note", form(part("mask"))),
    "another type": (415, "allowed is image/* or audio/*", form(part("image", more="\r\nContent-Type: text/html"))),
    "cut": (400, "Unexpected end", form(part("image"))[:-9]), "another boundary": (400, "does not begin", form(part("image")).replace(b"--b", b"--c")),
    "nothing": (400, "does not begin", b""), "NaN": (400, "is not JSON", form(part("image"), part("scale", b"NaN", ""))),
    "not UTF-8": (400, "is not UTF-8", form(part("image"), part("note", b"\xff", ""))), "a long text": (413, "values of the form", form(part("note", b"a" * 2**20, ""))),
    "a long head": (413, "long head", form(part("image", more="\r\nX: " + "a" * 10_000))), "a broken head": (400, "is not multipart", form(part("image", more="\r\nno colon"))),
    "ten thousand of one name": (400, "twice", form(*[part("image")] * 10_000)), "ten thousand names": (400, "allowed are", form(*[part(str(i)) for i in range(10_000)]))}


@pytest.mark.parametrize("name", WRONG)
def test_V1_a_form_that_is_wrong_has_its_status_and_its_sentence(server, name):
    status, words, body = WRONG[name]
    answer = ask(server, body)
    assert answer.status_code == status and words in answer.json()["error"], answer.text


PIECES = st.lists(st.sampled_from([b"\r\n", b"--b", b"--", b"\r", b"\n", b'Content-Disposition: form-data; name="image"', b"Content-Type: image/png", b"\0", b"a", b";", b'"', b":"]), max_size=12)


@settings(max_examples=300, deadline=None)
@given(PIECES.map(b"".join))
def test_any_form_is_read_or_refused_and_any_file_comes_as_it_was_sent(content):
    image = form_of(TypeAdapter(bytes).json_schema(), "image")
    for body in (content, b"--b\r\n" + content, form(part("image"))[:-7] + content):
        with contextlib.suppress(MlserveError):
            assert isinstance(image.values(body, FORM["content-type"]), bytes)
    if b"\r\n--b" not in b"\r\n" + content:
        assert image.values(form(part("image", content)), FORM["content-type"]) == content


def test_N11_a_list_of_files_has_its_bound():
    many = form_of(TypeAdapter(list[bytes]).json_schema(), "images")
    assert len(many.values(form(*[part("images")] * 1000), FORM["content-type"])) == 1000
    with pytest.raises(TooLarge, match="more than 1000 parts"):
        many.values(form(*[part("images")] * 1001), FORM["content-type"])


@pytest.mark.parametrize("kind,status", [("multipart/form-data", 400), ("multipart/form-data; boundary=", 400), ("multipart/form-data; boundary=" + "b" * 2000, 400),
                                         ("multipart/mixed; boundary=b", 415), ("text/html", 415), ("audio", 415)])
def test_another_type_or_no_boundary_is_refused(server, kind, status):
    assert ask(server, form(part("image")), kind).status_code == status


def test_a_part_over_the_limit_is_413_before_it_is_read(server):
    for kind in (FORM["content-type"], "image/png"):
        with Wire(server.port) as w:
            status, _, body = w.send(request("/handle", b"a", **{"content-type": kind, "content-length": str(MOST + 1)})).answer()
            assert status == 413 and b"allowed are" in body
    assert ask(server, gzip.compress(form(part("image", b"P5" + bytes(MOST)))), **{"content-encoding": "gzip"}).status_code == 413


# ---- while others are served

def test_N11_large_forms_and_forms_of_many_parts_disturb_nobody(double, tmp_path):
    large, many = form(part("image", b"P5" + bytes(MOST // 4))), form(*[part("image", b"", "")] * 200_000)
    with Server(double, tmp_path, hang_seconds=20, **SETTINGS) as s:
        told = []
        with Probed(s) as probed:
            threads = [threading.Thread(target=lambda body=body: told.append(ask(s, body).status_code)) for body in [large, many] * 6]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        assert set(told) <= {200, 400, 503} and {200, 400} <= set(told), told
        assert probed.worst <= 0.25 and probed.most < 2**30, f"liveness took {probed.worst:.3f} s, {probed.most / 2**20:.0f} MiB"
        print(sorted(told), f"{probed.worst:.3f} s, {probed.most / 2**20:.0f} MiB")
        assert ask(s, form(part("image"))).status_code == 200, "all that was counted is given back"


def test_N11_the_parts_of_a_form_are_counted_beside_it(double, tmp_path):
    with Server(double, tmp_path, **(SETTINGS | dict(max_body=100_000, max_decoded=150_000))) as s:
        for size, status in ((90_000, 503), (60_000, 200), (90_000, 503), (60_000, 200)):
            assert ask(s, form(part("image", b"P5" + bytes(size)))).status_code == status
        assert ask(s, gzip.compress(b"P5" + bytes(90_000)), "image/png", **{"content-encoding": "gzip"}).status_code == 503
        assert ask(s, b"P5" + bytes(60_000), "image/png").status_code == 200
