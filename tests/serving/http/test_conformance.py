"""What every route must do alike, and what each protocol asks for; runs against any server.

`pytest tests/serving/http/test_conformance.py --url http://…` asks a server that serves a model which doubles pairs of numbers (input `x`, output `y`,
FP32, [-1, 2]) under the name `double`; without `--url` one is started."""
import asyncio
import json
import struct

import httpx
import numpy as np
import pytest
from servers import Server

NAME = "double"
SETTINGS = dict(ui=True, model_version=1)
V2 = f"/v2/models/{NAME}"


def v2(rows, **extra):
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [len(rows), 2], "data": [v for r in rows for v in r]}]} | extra


def from_v2(o):
    y = o["outputs"][0]
    assert y["name"] == "y" and y["datatype"] == "FP32" and o["model_name"] == NAME
    return np.array(y["data"], "f4").reshape(y["shape"]).tolist()


ROUTES = {
    "/predict": (lambda rows: {"inputs": rows}, lambda o: o["outputs"]),
    f"/predictions/{NAME}": (lambda rows: {"inputs": rows}, lambda o: o["outputs"]),
    f"{V2}/infer": (v2, from_v2),
    f"{V2}/versions/1/infer": (v2, from_v2),
    f"/v1/models/{NAME}:predict": (lambda rows: {"instances": rows}, lambda o: o["predictions"]),
    f"/v1/models/{NAME}/versions/1:predict": (lambda rows: {"instances": rows}, lambda o: o["predictions"]),
    "/invocations": (lambda rows: {"inputs": rows}, lambda o: o["predictions"]),
}


@pytest.fixture(scope="module")
def url(request, double, tmp_path_factory):
    if given := request.config.getoption("--url"):
        yield given
        return
    with Server(double, tmp_path_factory.mktemp("conformance"), **SETTINGS) as s:
        yield s.url


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as c:
        yield c


@pytest.fixture(params=ROUTES)
def route(request):
    return request.param


def failed(r, status):
    assert r.status_code == status, (r.status_code, r.text)
    assert r.headers["content-type"] == "application/json" and list(r.json()) == ["error"] and len(r.content) <= 1024
    assert r.headers["x-request-id"]


# ---- every route alike


@pytest.mark.parametrize("rows", [[[1, 2]], [[1, 2], [3.5, -4]], [[float(i), 0.1] for i in range(100)]], ids=["one row", "two rows", "100 rows"])
def test_an_answer_is_right(http, route, rows):
    ask, read = ROUTES[route]
    r = http.post(route, json=ask(rows))
    assert r.status_code == 200 and r.headers["content-type"] == "application/json", r.text
    assert np.array_equal(np.array(read(r.json()), "f4"), np.array(rows, "f4") * 2)


def test_the_client_s_request_id_comes_back(http, route):
    r = http.post(route, json=ROUTES[route][0]([[1, 2]]), headers={"x-request-id": "order-17"})
    assert r.headers["x-request-id"] == "order-17"


BROKEN = {"empty": b"", "half": b'{"inputs": [[1,', "bad UTF-8": b'{"inputs": "\xff"}', "a list": b"[[1, 2]", "a text": b'"[[1, 2]]"', "a number": b"3", "nothing": b"{}",
          "NaN": b'{"inputs": [[NaN, 1]]}', "deep": b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "120 deep": b'{"inputs": ' + b"[" * 120 + b"]" * 120 + b"}",
          "a long number": b'{"inputs": [[' + b"9" * 5000 + b", 1]]}", "a key twice": b'{"inputs": [[1, 2]], "inputs": [[1, 2]]}'}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_V1_a_broken_body_is_400(http, route, body):
    failed(http.post(route, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("rows", [[], [[]], [[1]], [[1, 2, 3]], [[1, 2], [3]], [["a", "b"]], [[None, 1]], [[True, 1]], [[1e400, 1]], [[{}, 1]]],
                         ids=lambda r: json.dumps(r)[:20])
def test_V2_V3_wrong_tensors_are_400(http, route, rows):
    ask = ROUTES[route][0]
    try:
        body = json.dumps(ask(rows)).replace("Infinity", "1e400")
    except (TypeError, ValueError):
        body = json.dumps({"inputs": rows})
    failed(http.post(route, content=body, headers={"content-type": "application/json"}), 400)


def test_another_media_type_is_415(http, route):
    failed(http.post(route, content=b"<x>1</x>", headers={"content-type": "application/xml"}), 415)
    failed(http.post(route, content=b"{}", headers={"content-type": "application/json", "content-encoding": "br"}), 415)


def test_another_method_is_405(http, route):
    for method in ("GET", "PUT", "DELETE"):
        if not (method == "GET" and ":predict" in route):
            failed(http.request(method, route), 405)


def test_a_deadline_that_is_none_is_400(http, route):
    failed(http.post(route, json=ROUTES[route][0]([[1, 2]]), headers={"x-request-timeout": "soon"}), 400)


def test_a_gzipped_request_means_the_same(http, route):
    import gzip
    body = gzip.compress(json.dumps(ROUTES[route][0]([[1, 2]])).encode())
    r = http.post(route, content=body, headers={"content-type": "application/json", "content-encoding": "gzip"})
    assert r.status_code == 200 and ROUTES[route][1](r.json()) == [[2, 4]]


def test_a_large_request_is_right_and_compressed_when_asked(http, route):
    rows = [[float(i), 1.5] for i in range(20_000)]
    r = http.post(route, json=ROUTES[route][0](rows), headers={"accept-encoding": "gzip"})
    assert r.status_code == 200 and r.headers["content-encoding"] == "gzip"
    assert np.array_equal(np.array(ROUTES[route][1](r.json()), "f4"), np.array(rows, "f4") * 2)


# ---- V2


def test_V2_health_and_metadata(http):
    assert http.get("/v2/health/live").json() == {"live": True} and http.get("/v2/health/ready").json() == {"ready": True}
    server = http.get("/v2").json()
    assert server["name"] and server["version"] and "binary_tensor_data" in server["extensions"]
    model = http.get(V2).json()
    assert model["name"] == NAME and model["platform"] and model["versions"]
    assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}] and model["outputs"][0]["name"] == "y"
    version = model["versions"][0]
    assert http.get(f"{V2}/versions/{version}").json() == model
    for base in (V2, f"{V2}/versions/{version}"):
        assert http.get(base + "/ready").json() == {"name": NAME, "ready": True}
        assert http.get(base + "/stats").json()["model_stats"][0]["name"] == NAME
        config = http.get(base + "/config").json()
        assert config["name"] == NAME and config["max_batch_size"] >= 1
        assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [2]}] and config["output"] == [{"name": "y", "data_type": "TYPE_FP32", "dims": [2]}]
    assert http.get("/v2/models/stats").json()["model_stats"]
    assert NAME in http.get("/v2/models").json()["models"]
    assert http.post("/v2/repository/index", json={"ready": True}).json()[0]["state"] == "READY"


def test_V2_statistics_count(http):
    def rows(): return http.get(V2 + "/stats").json()["model_stats"][0]["inference_count"]
    before = rows()
    http.post(V2 + "/infer", json=v2([[1, 2]] * 5))
    assert rows() >= before + 5


def test_V2_the_id_comes_back_and_an_output_may_be_chosen(http):
    r = http.post(V2 + "/infer", json=v2([[1, 2]], id="a", outputs=[{"name": "y"}])).json()
    assert r["id"] == "a" and r["model_version"] and [o["name"] for o in r["outputs"]] == ["y"]


@pytest.mark.parametrize("change", [{"name": "z"}, {"datatype": "FP64"}, {"datatype": "INT8"}, {"shape": [2, 1]}, {"shape": [1, 3]}, {"shape": [-1, 2]}, {"shape": [1.0, 2]},
                                    {"shape": "x"}, {"shape": [2**4, 2**60 + 2]}, {"shape": [1] * 1000}, {"shape": [0, 2]}, {"shape": [True, 2]}, {"data": [1]},
                                    {"data": [1, "a"]}, {"data": {}}, {"more": 1}], ids=lambda c: json.dumps(c)[:30])
def test_V2_V4_what_is_not_the_contract_is_400(http, change):
    body = v2([[1, 2]])
    body["inputs"][0] |= change
    failed(http.post(V2 + "/infer", json=body), 400)


def test_V4_missing_extra_and_repeated_inputs_and_outputs_are_400(http):
    one = v2([[1, 2]])["inputs"][0]
    for body in ({"inputs": []}, {"inputs": [one, one]}, {"inputs": [one, one | {"name": "z"}]}, {"inputs": [one], "outputs": [{"name": "z"}]},
                 {"inputs": [one], "outputs": [{"name": "y"}, {"name": "y"}]}, {"inputs": one}, {"inputs": [one], "id": 3}, {"inputs": [one] * 10_000}):
        failed(http.post(V2 + "/infer", json=body), 400)


def test_V4_a_query_is_refused_where_it_would_be_ignored(http, route):
    ask, _ = ROUTES[route]
    r = http.post(f"{route}?threshold=0.5", json=ask([[1, 2]]))
    if route != "/predict":
        assert r.status_code == 200, "the paths of other protocols are asked as their clients see fit"
        return
    failed(r, 400)
    assert "the query 'threshold=0.5', which is not read" in r.json()["error"]
    assert http.post(f"{route}?", json=ask([[1, 2]])).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}], ids=str)
def test_a_body_of_no_type_that_is_no_json_is_told_what_is_missing(http, route, headers):
    r = http.post(route, content=b"a,b\n1,2\n", headers=headers)
    failed(r, 400)
    told = r.json()["error"]
    assert "not JSON" in told and "so the body was read as JSON; allowed is application/json" in told and ("text/csv" in told) == (route == "/invocations")
    assert ("There is no Content-Type" in told) == (not headers)
    r = http.post(route, content=b"a,b\n1,2\n", headers={"content-type": "application/json; charset=utf-8"})
    failed(r, 400)
    assert "Content-Type" not in r.json()["error"]


def binary(array, asked=True, size=None, header=None, **extra):
    head = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": list(array.shape), "parameters": {"binary_data_size": array.nbytes if size is None else size}}]}
                      | ({"outputs": [{"name": "y", "parameters": {"binary_data": True}}]} if asked else {}) | extra).encode()
    return {"content": head + array.tobytes(), "headers": {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head) if header is None else header)}}


def test_V2_binary_tensors_in_and_out(http):
    x = np.array([[1, 2], [3, 4]], "<f4")
    r = http.post(V2 + "/infer", **binary(x))
    at = int(r.headers["inference-header-content-length"])
    y = json.loads(r.content[:at])["outputs"][0]
    assert r.status_code == 200 and y["shape"] == [2, 2] and y["parameters"]["binary_data_size"] == 16 and "data" not in y
    assert np.frombuffer(r.content[at:], "<f4").tolist() == [2, 4, 6, 8]
    r = http.post(V2 + "/infer", **binary(x, asked=False))
    assert from_v2(r.json()) == [[2, 4], [6, 8]]


@pytest.mark.parametrize("rows", [4_000, 100_000])
def test_V2_large_binary_tensors_come_in_pieces(http, rows):
    x = np.arange(2 * rows, dtype="<f4").reshape(rows, 2) % 999
    r = http.post(V2 + "/infer", **binary(x))
    assert r.status_code == 200, r.text
    at = int(r.headers["inference-header-content-length"])
    assert np.array_equal(np.frombuffer(r.content[at:], "<f4").reshape(-1, 2), 2 * x)


@pytest.mark.parametrize("header", ["-1", "+5", "abc", "99999999999", "10", ""])
def test_V7_a_header_length_that_lies_is_400_and_the_next_request_is_right(http, header):
    x = np.ones((1, 2), "<f4")
    failed(http.post(V2 + "/infer", **binary(x, header=header)), 400)
    assert http.post(V2 + "/infer", **binary(x)).status_code == 200


@pytest.mark.parametrize("size", [0, 4, 12, 2**40, -8, 8.5, "8"])
def test_V7_a_tensor_size_that_lies_is_400(http, size):
    failed(http.post(V2 + "/infer", **binary(np.ones((1, 2), "<f4"), size=size)), 400)


def test_V7_bytes_without_a_header_are_refused(http):
    r = http.post(V2 + "/infer", content=struct.pack("<2f", 1, 2), headers={"content-type": "application/octet-stream"})
    assert r.status_code in (400, 415)


@pytest.mark.parametrize("name", ["nope", "DOUBLE", "double.", "a" * 3000, "..%2f", "%00", "double%0a", "%2e%2e", "double;x"])
def test_V8_another_name_is_404(http, name):
    for path in (f"/v2/models/{name}", f"/v2/models/{name}/ready", f"/v1/models/{name}"):
        failed(http.get(path), 404)
    for path in (f"/v2/models/{name}/infer", f"/v1/models/{name}:predict", f"/predictions/{name}", f"{V2}/versions/{name}/infer"):
        failed(http.post(path, json=v2([[1, 2]])), 404)


def test_V8_a_name_in_the_body_is_the_served_one(http):
    for path in (V2, f"{V2}/versions/1"):
        for names in ({"model_name": NAME}, {"model_name": NAME, "model_version": "1"}, {"model_name": None, "model_version": None}, {"model_name": "", "model_version": ""}):
            assert from_v2(http.post(path + "/infer", json=v2([[1, 2]], **names)).json()) == [[2, 4]]
        for names in ({"model_name": "nope"}, {"model_name": NAME.upper()}, {"model_name": "../" + NAME}, {"model_version": "2"}, {"model_name": NAME, "model_version": "01"}):
            failed(http.post(path + "/infer", json=v2([[1, 2]], **names)), 404)
            failed(http.post(path + "/infer", **binary(np.ones((1, 2), "<f4"), **names)), 404)
        for names in ({"model_name": 7}, {"model_version": 1}, {"model_version": ["1"]}):
            failed(http.post(path + "/infer", json=v2([[1, 2]], **names)), 400)


@pytest.mark.parametrize("change, status", [({"parameters": None}, 200), ({"parameters": {}}, 200), ({"parameters": {"content_type": "np"}}, 200), ({"parameters": {"content_type": "np", "custom": 1}}, 200),
                                            ({"parameters": {"content_type": "str"}}, 400), ({"parameters": {"content_type": "base64"}}, 400), ({"parameters": {"content_type": "datetime"}}, 400)], ids=str)
def test_V4_a_codec_is_followed_or_refused(http, change, status):
    body = v2([[1, 2]], id=None, outputs=None)
    body["inputs"][0] |= change
    r = http.post(V2 + "/infer", json=body)
    assert from_v2(r.json()) == [[2, 4]] if status == 200 else failed(r, status) is None


# ---- V1, MLflow, SageMaker


def test_V1_lists_and_describes(http):
    assert NAME in http.get("/v1/models").json()["models"]
    for path in (f"/v1/models/{NAME}", f"/v1/models/{NAME}/versions/1"):
        assert http.get(path).json() == {"name": NAME, "ready": True, "model_version_status": [{"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}]}
        found = http.get(path + "/metadata").json()
        assert found["model_spec"]["name"] == NAME and list(found["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]) == ["x"]
    for path in (f"/v1/models/{NAME}/versions/2", f"/v1/models/{NAME}/versions/2/metadata", "/v1/models/nope/metadata"):
        failed(http.get(path), 404)
    for path in (f"/v1/models/{NAME}/versions/2:predict", f"/v1/models/{NAME}/labels/stable:predict"):
        failed(http.post(path, json={"instances": [[1, 2]]}), 404)


def test_V1_takes_what_its_clients_send(http):
    "curl without a type as TensorFlow Serving's pages show it, and Vertex AI's parameters"
    for media in ("application/json", "application/x-www-form-urlencoded", "APPLICATION/JSON; charset=utf-8"):
        r = http.post(f"/v1/models/{NAME}:predict", content=b'{"instances": [[1, 2]], "parameters": {"confidence": 0.5}}', headers={"content-type": media})
        assert r.status_code == 200 and r.json() == {"predictions": [[2, 4]]}, r.text
    failed(http.post(f"/v1/models/{NAME}:predict", json={"instances": [{"b64": "AAAAAA=="}]}), 400)


def test_mlflow_s_formats(http):
    assert http.get("/ping").status_code == 200 and http.get("/version").text
    want = {"predictions": [[2.0, 4.0]]}
    for body in ({"inputs": [[1, 2]]}, {"instances": [[1, 2]]}, {"inputs": {"x": [[1, 2]]}}):
        r = http.post("/invocations", json=body)
        assert r.status_code == 200 and r.json() == want, r.text
    failed(http.post("/invocations", json={"inputs": [[1, 2]], "instances": [[1, 2]]}), 400)
    assert http.post("/invocations", json={"inputs": [[1, 2]], "params": {"temperature": 1}}).json() == want
    failed(http.post("/invocations", json={"inputs": [[1, 2]], "params": [1]}), 400)


SENT = {"json": b"[[1, 2], [3, 4]]", "objects": b' [{"x": [1, 2]}, {"x": [3, 4]}]', "csv": b"1,2\n3,4\n", "lines": b"[1, 2]\n[3, 4]\n", "named lines": b'{"x": [1, 2]}\r\n{"x": [3, 4]}'}
MEDIA = {"json": "application/json", "csv": "text/csv", "lines": "application/jsonlines"}


@pytest.mark.parametrize("answer", [None, "*/*", "application/json", "text/csv", "application/jsonlines"], ids=str)
@pytest.mark.parametrize("body", SENT)
def test_sagemaker_s_forms(http, body, answer):
    media = MEDIA.get(body.split()[-1], "application/json")
    r = http.post("/invocations", content=SENT[body], headers={"content-type": media} | ({"accept": answer} if answer else {}))
    assert r.status_code == 200, r.text
    form = answer if answer in ("text/csv", "application/jsonlines") else "application/json"
    want = {"text/csv": b"2.0,4.0\n6.0,8.0\n", "application/jsonlines": b"[2.0,4.0]\n[6.0,8.0]\n", "application/json": b'{"predictions":[[2.0,4.0],[6.0,8.0]]}'}
    assert (r.headers["content-type"], r.content) == (form, want[form])


@pytest.mark.parametrize("media, body, rows", [
    ("text/csv", b"1,2\n", 1), ("text/csv", b"1,2", 1), ("text/csv; header=present", b"a,b\n1,2\n", 1), ("text/csv; header=absent", b"1,2\n3,4", 2), ("text/csv", b"1,2\r\n3,4\r\n\r\n", 2),
    ("text/csv", b"a,b\n1,2\n", 400), ("text/csv", b"x\n1\n", 400), ("text/csv", b"1,2\n\n3,4\n", 400), ("text/csv", b"1,\n3,4", 400), ("text/csv", b"", 400), ("text/csv; header=maybe", b"1,2", 415),
    ("application/jsonlines", b"[1, 2], [3, 4]", 400), ("application/jsonlines", b"[1, 2]\n\n[3, 4]", 400), ("application/jsonlines", b"[1, 2]\n{}", 400), ("application/jsonlines", b"", 400),
    ("application/json", b"[[1, 2]], \"params\": {}", 400), ("application/json", b"[1, 2]", 400), ("application/json", b"[]", 400), ("application/x-npy", b"", 415)])
def test_V10_as_many_answers_as_rows_or_a_refusal(http, media, body, rows):
    r = http.post("/invocations", content=body, headers={"content-type": media})
    assert len(r.json()["predictions"]) == rows if rows < 400 else failed(r, rows) is None


# ---- the whole


def test_nothing_is_at_other_paths(http):
    for path in ("/admin", "/v2/repository/models/double/load", "/v2/models/double/unload", "/shutdown", "/v3"):
        for method in ("GET", "POST"):
            failed(http.request(method, path), 404)


def test_many_at_once_are_not_mixed_up(url):
    async def ask():
        async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as c:
            async def one(i):
                route = list(ROUTES)[i % len(ROUTES)]
                r = await c.post(route, json=ROUTES[route][0]([[i, i + 1]]))
                return ROUTES[route][1](r.json()) == [[2 * i, 2 * i + 2]]
            return await asyncio.gather(*[one(i) for i in range(300)])
    assert all(asyncio.run(ask()))


def test_openapi_is_valid_and_complete(http):
    document = http.get("/openapi.json")
    if document.status_code == 404:  # a server that is told to show none
        return failed(http.get("/"), 404)
    from openapi_spec_validator import validate
    validate(document.json())
    assert {"/predict", "/v2/models/{name}/infer", "/invocations", "/v1/models/{name}:predict"} <= set(document.json()["paths"])
    for path in ("/", "/docs"):
        page = http.get(path, headers={"accept": "text/html,*/*;q=0.8"})
        assert page.status_code == 200 and page.text.startswith("<!doctype html>") and "default-src 'none'" in page.headers["content-security-policy"]
    assert http.get("/").json()["name"] == "double"  # a program's Accept is anything


def test_every_example_of_openapi_is_answered_as_it_says(http):
    document = http.get("/openapi.json")
    if document.status_code == 404:
        return failed(http.get("/"), 404)
    import jsonschema
    asked = 0
    for path, ways in document.json()["paths"].items():
        post = ways.get("post", {})
        body = post.get("requestBody", {}).get("content", {}).get("application/json", {})
        if "example" in body:
            given = {p["name"]: p["example"] for p in post["parameters"] if p["in"] == "path"}
            got, told = http.post(path.format(**given), json=body["example"]), post["responses"]["200"]["content"]["application/json"]
            assert got.status_code == 200 and got.json() == told["example"], path
            jsonschema.validate(body["example"], body["schema"])
            jsonschema.validate(got.json(), told["schema"])
            wrong = {key: [["no number"]] for key in body["example"]}
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, body["schema"])
            asked += 1
    assert asked >= 8


def test_every_path_that_is_asked_by_get_is_asked_by_head(http):
    "The same status and headers, and no body"
    for path, methods in http.get("/openapi.json").json()["paths"].items():
        if "get" in methods:
            path = path.replace("{name}", "double").replace("{version}", "1")
            got, head = http.get(path), http.head(path)
            assert head.status_code == got.status_code == 200 and not head.content, path
            assert head.headers["content-type"] == got.headers["content-type"], path
    assert http.head("/predict").status_code == 405 and http.head("/nowhere").status_code == 404


@pytest.mark.parametrize("media", [None, "text/plain", "text/plain; charset=utf-8", "application/x-www-form-urlencoded"])
def test_json_is_json_where_the_media_type_says_nothing(http, route, media):
    "A client that names none, or what its tool puts there: `curl -d` calls every body a form"
    body = json.dumps(ROUTES[route][0]([[1, 2]])).encode()
    asked = http.build_request("POST", route, content=body, headers={"content-type": media} if media else {})
    if not media:
        asked.headers.pop("content-type", None)
    r = http.send(asked)
    assert r.status_code == 200 and r.content == http.post(route, content=body, headers={"content-type": "application/json"}).content


def test_a_byte_order_mark_is_no_part_of_the_text(http, route):
    body = json.dumps(ROUTES[route][0]([[1, 2]])).encode()
    assert http.post(route, content=b"\xef\xbb\xbf" + body, headers={"content-type": "application/json"}).status_code == 200


def test_an_answer_is_compressed_as_the_client_wants_it(http):
    rows = [[i, 0] for i in range(8000)]
    for accepted, packed in {"gzip;q=0": False, "identity, gzip;q=0.5": False, "*;q=0": False, "gzip;q=0.5": True, "*": True, "GZIP": True}.items():
        r = http.post("/predict", json={"inputs": rows}, headers={"accept-encoding": accepted})
        assert r.status_code == 200 and ("content-encoding" in r.headers) == packed, accepted


def test_a_compressed_body_is_one_whole_stream_in_any_form(http):
    "Deflate, and gzip in chunks; several members, or anything behind the end, is refused"
    import gzip
    import zlib
    body = json.dumps({"inputs": [[1, 2]] * 100}).encode() + b" " * 30_000

    def chunks(data):
        yield from (data[i:i + 700] for i in range(0, len(data), 700))
    whole = gzip.compress(body)
    for coding, sent in {"deflate": zlib.compress(body), "gzip": whole}.items():
        for content in (sent, chunks(sent)):
            assert http.post("/predict", content=content, headers={"content-encoding": coding}).json()["outputs"][0] == [2, 4]
    for wrong in (whole + gzip.compress(b" "), whole + b"x", whole[:-4]):
        failed(http.post("/predict", content=wrong, headers={"content-encoding": "gzip"}), 400)
