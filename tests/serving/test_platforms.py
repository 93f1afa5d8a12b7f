"""What platforms do to a server: addresses, ports and variables of theirs, and what it tells them of itself."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from fake_server import WAIT
from commands import TESTS
from servers import Server, Wire, free_port, request, until

SETTINGS = dict(threads=1, queue=17, cache=TESTS)


@pytest.fixture(scope="module")
def server(double, tmp_path_factory):
    with Server(double, tmp_path_factory.mktemp("platforms"), **SETTINGS) as s:
        yield s


def lines(server, event):
    "The log lines of one event"
    found = [json.loads(l) for l in server.events().splitlines() if l.startswith("{")]
    return [l for l in found if l.get("event") == event]


def healthcheck(**env):
    "What the image's HEALTHCHECK runs: its exit code and what it printed"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLSERVE_")}
    done = subprocess.run([sys.executable, "-m", "mlserve.serving.healthcheck"], env=clean | {k: str(v) for k, v in env.items()}, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout + done.stderr


# ---- who answers


def test_A4_a_server_that_was_told_nothing_claims_nothing(server):
    "Every place that could name a version or an image"
    s = server
    name = s.http.get("/v2/models").json()["models"][0]
    ask = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 0]}]}
    assert s.http.get(f"/v2/models/{name}").json()["versions"] == []
    assert 'version=""' in s.http.get("/metrics").text and 'image=""' in s.http.get("/metrics").text
    assert "model_version" not in s.http.post(f"/v2/models/{name}/infer", json=ask).json()
    assert "version" not in s.http.post("/v2/repository/index").json()[0]
    card, health = s.http.get("/").json(), s.http.get("/health").json()
    assert card["version"] is card["image"] is health["version"] is health["image"] is None
    for path in ("", "/ready", "/stats"):
        assert s.http.get(f"/v2/models/{name}/versions/1{path}").status_code == 404, path
    assert s.http.post(f"/v2/models/{name}/versions/1/infer", json=ask).status_code == 404
    for path in (f"/predictions/{name}/1", f"/predictions/{name}/"):
        assert s.http.post(path, json={"inputs": [[1, 0]]}).status_code == 404, path
    assert not any("version" in l or "image" in l for l in lines(s, "ready"))


def test_a_server_that_was_told_says_it_everywhere_and_on_every_line(double, tmp_path):
    image = "registry.example/digits@sha256:" + "0" * 64
    with Server(double, tmp_path, model_version=7, image=image) as s:
        name = s.http.get("/v2/models").json()["models"][0]
        ask = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 0]}]}
        assert s.http.get(f"/v2/models/{name}").json()["versions"] == ["7"]
        assert s.http.post(f"/v2/models/{name}/versions/7/infer", json=ask).json()["model_version"] == "7"
        assert f'image="{image}"' in s.http.get("/metrics").text and 'version="7"' in s.http.get("/metrics").text
        card = s.http.get("/")
        assert card.status_code == 200 and card.headers["content-type"] == "application/json"
        card = card.json()
        assert (card["name"], card["version"], card["image"], card["status"], card["state"]) == (name, "7", image, "alive", "ready") and card["package"].startswith("sha256:")
        for link in set(card["links"].values()) - {"/predict", f"/v2/models/{name}/infer"}:
            assert s.http.get(link).status_code == 200, link
        for link in ("predict", "infer"):
            assert s.http.post(card["links"][link], json={"inputs": [[1, 0]]} if link == "predict" else ask).status_code == 200
        s.http.get("/nowhere")
        assert s.stop() == 0
        found = [json.loads(l) for l in s.events().splitlines()]
        assert {"listening", "ready", "refused", "draining", "stopped"} <= {l["event"] for l in found}
        for l in found:
            assert l["version"] == "7" and l["image"] == image, l
            assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", l["time"]) and l["level"] in ("info", "warning", "error"), l


# ---- where it listens


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_two_colons_serve_both_families_and_the_health_check_finds_it(double, tmp_path):
    with Server(double, tmp_path, host="::") as s:
        for url in (f"http://127.0.0.1:{s.port}", f"http://[::1]:{s.port}"):
            assert httpx.get(url + "/v2/health/ready", trust_env=False).status_code == 200, url
        assert healthcheck(MLSERVE_HOST="::", MLSERVE_PORT=s.port)[0] == 0
    with Server(double, tmp_path, wait=False, host="::1") as s:
        until(lambda: healthcheck(MLSERVE_HOST="::1", MLSERVE_PORT=s.port)[0] == 0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", s.port))


def test_the_health_check_asks_the_port_that_the_server_has(double, tmp_path):
    "Whoever named it, and beside the links that Kubernetes makes"
    with Server(double, tmp_path, wait=False, FAKE_LOAD_SECONDS=1) as s:
        until(lambda: lines(s, "listening"))
        code, said = healthcheck(MLSERVE_PORT=s.port)
        assert code == 1 and "503" in said
        s.wait_ready()
        for env in ({"MLSERVE_PORT": s.port}, {"MLSERVE_PORT": 8080, "SAGEMAKER_BIND_TO_PORT": s.port}, {"MLSERVE_PORT": "tcp://10.0.0.7:80", "AIP_HTTP_PORT": s.port},
                    {"PORT": s.port, "K_SERVICE": "digits"}):
            assert healthcheck(**env) == (0, f"127.0.0.1 port {s.port}: HTTP/1.1 200 OK\n"), env
        code, said = healthcheck(MLSERVE_PORT=free_port())
        assert code == 1 and "refused" in said


@pytest.mark.parametrize("variables", [{"SAGEMAKER_BIND_TO_PORT": ""}, {"AIP_HTTP_PORT": ""}, {"PORT": "", "K_SERVICE": "digits"}], ids=lambda v: next(iter(v)))
def test_a_port_that_the_platform_names_wins_over_the_images_own(variables, double, tmp_path):
    own, named = free_port(), free_port()
    platform = next(iter(variables))
    with Server(double, tmp_path, wait=False, port=own, **{**variables, platform: named}) as s:
        until(lambda: lines(s, "listening"))
        assert lines(s, "listening")[0]["port"] == named
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", own))
    with socket.create_server(("127.0.0.1", named)):
        with Server(double, tmp_path, wait=False, port=own, **{**variables, platform: named}) as s:
            assert s.ended() == 7 and s.last()["error"].startswith(f"{platform} asks for port {named}")


def test_a_port_that_is_taken_is_named_by_what_asked_for_it(double, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for settings, name in (({"port": port}, "MLSERVE_PORT"), ({"metrics_port": port}, "MLSERVE_METRICS_PORT")):
            with Server(double, tmp_path, wait=False, **settings) as s:
                assert s.ended() == 7
                assert f"{name} asks for port {port}" in s.last()["error"] and not lines(s, "listening")
        command = [sys.executable, "-m", "mlserve.cli", "serve", str(double), "--port", str(port)]
        program = "import sys; from mlserve.cli import main; sys.argv = sys.argv[1:]; main()"
        done = subprocess.run([sys.executable, "-c", program, *command[2:]], capture_output=True, text=True, timeout=60)
        assert done.returncode == 7 and f"--port asks for port {port}" in done.stderr, done.stderr


def test_variables_that_kubernetes_makes_for_a_service_are_ignored_and_told(double, tmp_path):
    links = {"MLSERVE_SERVICE_HOST": "10.0.0.7", "MLSERVE_SERVICE_PORT": "80", "MLSERVE_PORT_80_TCP": "tcp://10.0.0.7:80", "MLSERVE_PORT_80_TCP_PROTO": "tcp",
             "MLSERVE_METRICS_PORT": "tcp://10.0.0.8:9090", "MLSERVE_METRICS_SERVICE_PORT_HTTP": "9090", "MLSERVE_METRICS_PORT_9090_TCP_ADDR": "10.0.0.8"}
    with Server(double, tmp_path, **links) as s:
        assert s.http.get("/metrics").status_code == 200, "the metrics have no port of their own"
        assert [set(l["variables"]) for l in lines(s, "ignored")] == [set(links)]
    with Server(double, tmp_path, wait=False, MLSERVE_METRIC_PORT="9090") as s:
        assert s.ended() == 2 and "Did you mean MLSERVE_METRICS_PORT?" in s.last()["error"]


# ---- what it writes


def test_a_worker_says_listening_when_it_is(double, tmp_path):
    "One that takes the place of a dead one opens its door when it is ready, beside one that serves"
    with Server(double, tmp_path, workers=2) as s:
        until(lambda: len(lines(s, "ready")) == 2)
        first = len(s.events().splitlines())
        os.kill(s.worker(), signal.SIGKILL)
        until(lambda: len(lines(s, "listening")) == 3)
        told = [json.loads(l)["event"] for l in s.events().splitlines()[first:] if l.startswith("{")]
        assert told.index("ready") < told.index("listening")


def test_refused_requests_leave_a_few_lines_each_with_route_status_and_id(server):
    kinds = {"/predict": (request(body=b"{"), 400), "/nowhere": (request("/nowhere"), 404), "/v2/models/{name}": (b"GET /v2/models/nope HTTP/1.1\r\nhost: a\r\n\r\n", 404),
             "none": (b"GET / HTTP/1.1\r\n\r\n", 400)}
    s = server
    for route, (sent, status) in kinds.items():
        with Wire(s.port) as w:
            answer = w.send(sent).answer()
        assert answer[0] == status
        until(lambda: any(l["id"] == answer[1]["x-request-id"] for l in lines(s, "refused")))  # of the application's, it is written after the answer
        line, = [l for l in lines(s, "refused") if l["id"] == answer[1]["x-request-id"]]
        assert (line["route"], line["status"], line["level"]) == (route, status, "warning")
    time.sleep(1.1)
    before, begin = len(lines(s, "refused")), time.monotonic()
    with Wire(s.port) as w:
        for _ in range(400):
            assert w.send(request(body=b"{")).answer()[0] == 400
    seconds = time.monotonic() - begin
    assert len(lines(s, "refused")) - before <= 10 * (seconds + 2) < 400
    assert s.predict([1, 2]).status_code == 200


# ---- what is asked for at night


def test_the_queue_says_its_bound_and_how_long_the_oldest_has_waited(server):
    s = server
    with Wire(s.port) as busy, Wire(s.port) as waiting:
        assert s.metric("pending_limit") == 17 and s.metric("oldest_pending_seconds") == 0
        busy.send(request(body=b'{"inputs": [[1, %f]]}' % (WAIT + 3)))
        time.sleep(0.3)
        waiting.send(request())
        time.sleep(1.5)
        assert 0.8 < s.metric("oldest_pending_seconds") < 2.8
        assert busy.answer()[0] == waiting.answer()[0] == 200
        until(lambda: s.metric("oldest_pending_seconds") == 0)


def test_the_container_says_what_it_uses(server):
    used, s = server.metric("container_cpu_seconds_total"), server
    assert used > 0 and s.metric("container_memory_bytes") > s.metric("container_memory_working_set_bytes") > 0
    assert s.metric("cache_used_bytes") >= sum(p.stat().st_size for p in TESTS.glob("*.py")) and s.metric("cache_free_bytes") > 0
    for _ in range(50):
        s.predict([1, 2])
    assert s.metric("container_cpu_seconds_total") > used
