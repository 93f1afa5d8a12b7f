"""Malformed input in mass, at every door: no 5xx, no crash, no hang, no status outside the contract, and no word of what is inside (goals 3 and 4, row V9).

A twentieth of the goal's two million cases runs in `make test`, all of them in `make soak`; the last test counts them. Canaries stand in the
environment, in the path and in the weights of the servers: none may be in any answer."""
import asyncio
import collections
import contextlib
import gzip
import json
import random

import numpy as np
import pytest
import test_protocols as P
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from servers import Server, request, status_of
from test_conformance import NAME, ROUTES, V2, binary

SCALES = [pytest.param(20, id="1in20"), pytest.param(1, id="full", marks=pytest.mark.soak)]
GOAL = 2_000_000
PARTS = {"damaged": 1_260_000, "hypothesis": 40_000, "atheris": 600_000, "sockets": 160_000, "schemathesis": 12_000}  # cases of each part in full
SAID = {200, 400, 404, 405, 408, 413, 414, 415, 431}  # what a client may be told about its own request
RAN = collections.Counter()  # cases by (part, scale)


@pytest.fixture(scope="module")
def canaries(tmp_path_factory):
    "A server of a model that doubles, with canaries in all that it must not tell"
    import torch

    from mlserve.package import save_package

    class Double(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("canary_in_the_names", torch.frombuffer(bytearray(b"canary-in-the-weights"), dtype=torch.uint8))

        def forward(self, x):
            return x * 2
    folder = tmp_path_factory.mktemp("canary-in-the-path")
    save_package(Double().eval(), folder / NAME, NAME, {"x": torch.zeros(4, 2)}, ["y"])
    with Server(folder / NAME, folder, real=True, ui=True, model_version=1, max_body=100_000, head_seconds=1, body_seconds=1, CANARY_IN_THE_ENVIRONMENT="canary-in-the-environment") as s:
        yield s


def in_contract(status, headers, body):
    "An answer that a stranger may be given"
    assert status in SAID, (status, headers, body[:300])
    assert b"canary" not in body.lower() and "canary" not in repr(headers).lower() and b"Traceback" not in body and b"/mlserve/" not in body, body
    assert headers["x-request-id"]
    if status != 200:
        assert headers["content-type"] == "application/json" and len(body) <= 1024 and list(json.loads(body)) == ["error"], (status, headers, body)


# ---- in this process


def damaged(cases, **kw):
    "Valid bodies with one to three changes, to the decoder they were made for"
    chance, bodies, passed = random.Random(11), P.corpus(), 0
    for i in range(cases):
        data, number, header = bodies[i % len(bodies)]
        data = P.damage(data, chance)
        if header is None:
            passed += P.refuse_or_meet(P.decoders(data, number if number not in (2, 3, 4) else number + 88))
        else:
            moved, specs = str(max(0, header + chance.choice([0, 0, 0, -1, 1, 5]))), {2: (P.X,), 3: (P.X, P.T), 4: (P.T,)}[number]
            passed += P.refuse_or_meet(lambda: P.decode_infer(data, specs, P.Y, 2**20, moved))
    assert passed > cases // 60, "the damage is too heavy to reach the inner checks"
    return cases


def hypothesis(cases, **kw):
    "Any bytes, and any JSON with our words in it, to every decoder"
    ran = [0]
    words = st.sampled_from(["inputs", "outputs", "instances", "dataframe_split", "dataframe_records", "params", "id", "parameters", "signature_name"])

    @settings(max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(st.binary(max_size=200), st.dictionaries(words, P.json_values, max_size=3).map(lambda o: json.dumps(o).encode())), st.integers(0, 2**16))
    def any_body(data, number):
        ran[0] += 1
        P.refuse_or_meet(P.decoders(data, number))
    any_body()
    assert ran[0] >= cases, "hypothesis stops early when it has seen all there is"
    return ran[0]


def atheris(cases, folder, **kw):
    "Guided by coverage, to the binary decoder"
    P.fuzz(cases, folder)
    return cases


# ---- over a port


def requests():
    "Valid requests of every kind, to be damaged"
    x = binary(np.ones((1, 2), "<f4"))
    chunked = b"POST /predict HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n10\r\n{\"inputs\": [[1, \r\n4\r\n0]]}\r\n0\r\n\r\n"
    paths = ["/", "/v2", V2, V2 + "/versions/1/stats", V2 + "/ready", "/v2/models", "/v2/models/stats", "/v1/models", f"/v1/models/{NAME}", "/ping", "/health", "/version", "/metrics", "/openapi.json", "/docs"]
    whole = [request(path, json.dumps(ask([[1, 2]])).encode()) for path, (ask, _) in ROUTES.items()]
    whole += [request(V2 + "/infer", x["content"], **{k.replace("-", "_"): v for k, v in x["headers"].items()}), chunked, request("/v2/repository/index", b'{"ready": true}')]
    whole += [request(body=gzip.compress(b'{"inputs": [[1, 2]]}'), content_encoding="gzip"), request("/invocations", b"a,b\n1,2\n", content_type="text/csv")]
    return whole + [b"GET %s HTTP/1.1\r\nhost: a\r\nx-request-timeout: 5\r\n\r\n" % p.encode() for p in paths]


TOKENS = [b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"%2e%2e", b"//", b"?", b"#", b"..", b"\r\n\r\n", b"content-length: 5\r\n", b"content-length: -1\r\n", b"transfer-encoding: chunked\r\n",
          b"expect: 100-continue\r\n", b"content-encoding: gzip\r\n", b"content-type: text/csv\r\n", b"inference-header-content-length: 3\r\n", b"x-request-timeout: nan\r\n", b"x-request-id: \xff\r\n",
          b"connection: close\r\n", b"connection: upgrade\r\nupgrade: websocket\r\n", b"host: b\r\n", b"HTTP/1.0", b"HTTP/2.0", b"0\r\n\r\n", b"ffffffffffffffff", b"\xff\xfe", b"a" * 300]
LAST = b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


def spoiled(data, chance):
    "A request with one to three changes, most of them in its head"
    if chance.random() < 0.4:
        return P.damage(data, chance)
    lines = data.split(b"\r\n")
    for _ in range(chance.choice([1, 1, 2, 3])):
        i = chance.randrange(min(len(lines), 7))
        match chance.randrange(5):
            case 0: lines.insert(i, chance.choice(TOKENS))
            case 1: lines[i] = lines[i][:(at := chance.randrange(len(lines[i]) + 1))] + chance.choice(TOKENS) + lines[i][at:]
            case 2: lines.insert(i, lines[i])
            case 3: del lines[i]
            case 4: lines[i] = lines[i].replace(b" ", chance.choice([b"", b"  ", b"\t", b"\x0b"]), 1)
        lines = lines or [b""]
    return b"\r\n".join(lines)


def answers(stream):
    "The answers in what a server sent, each as (status, headers, body)"
    while stream:
        head, end, stream = stream.partition(b"\r\n\r\n")
        assert end and head.startswith(b"HTTP/1.1 "), (head, stream)
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        if (status := int(first.split(" ")[1])) == 100:
            continue
        size = int(headers["content-length"])
        assert len(stream) >= size, "an answer is cut"
        yield status, headers, stream[:size]
        stream = stream[size:]


async def ask(port, data):
    "Send it, and a last request; all that comes back until the server closes"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    try:
        writer.write(data + LAST)
        return await asyncio.wait_for(reader.read(-1), 5)  # a server that hangs is a failure
    except ConnectionResetError:
        return b""
    finally:
        writer.transport.abort()


async def storm(port, cases, seed):
    "Many spoiled requests at once; how many answers there were of each status"
    chance, whole, statuses, left = random.Random(seed), requests(), collections.Counter(), iter(range(cases))

    async def client():
        for i in left:
            data = spoiled(whole[i % len(whole)], chance)
            for answer in answers(await ask(port, data)):
                if not data.startswith(b"HEAD"):
                    in_contract(*answer)
                statuses[answer[0]] += 1
    await asyncio.gather(*[client() for _ in range(200)])
    return statuses


def sockets(cases, server, **kw):
    "Spoiled requests on connections of their own; what leaks grows in every quarter of them, what settles does not"
    asyncio.run(storm(server.port, 2_000, 1))
    worker, statuses, grown = server.worker(), collections.Counter(), []
    for quarter in range(4):
        before = status_of(worker, "VmRSS")
        statuses += asyncio.run(storm(server.port, cases // 4, 2 + quarter))
        grown.append(status_of(worker, "VmRSS") - before)
    print(f"answers: {dict(sorted(statuses.items()))}; memory {grown} kB")
    assert statuses[200] > cases / 20 and statuses[400] > cases / 20, "the damage is too heavy, or too light"
    assert min(grown) < 256 * max(1, cases / 100_000), "memory grows"
    assert server.worker() == worker, "the worker died"
    assert server.predict([1, 2]).json() == {"outputs": [[2.0, 4.0]]} and "internal_error" not in server.events()
    return cases


def schemathesis(cases, server, **kw):
    "What schemathesis makes of our OpenAPI, valid and not, for every operation"
    import schemathesis as tool
    from schemathesis import GenerationMode
    api = tool.openapi.from_url(server.url + "/openapi.json")
    operations, ran, statuses = [o.ok() for o in api.get_all_operations()], [0], collections.Counter()
    taking = [o for o in operations if o.body]
    assert len(operations) > 20 and len(taking) > 6
    for operation in operations:
        for mode in GenerationMode:
            @settings(max_examples=cases // len(taking) // 2 if operation.body else 10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
            @given(operation.as_strategy(generation_mode=mode), st.booleans())
            def any_call(case, known):
                ran[0] += 1
                if known and case.path_parameters:  # a model that is served, so that the body is read
                    case.path_parameters |= {k: v for k, v in dict(name=NAME, version="1").items() if k in case.path_parameters}
                r = case.call(base_url=server.url, timeout=5)
                statuses[r.status_code] += 1
                late = r.status_code == 504 and float((case.headers or {}).get("X-Request-Timeout", "inf")) < 5  # a deadline of its own, and a body that is read
                in_contract(408 if late else r.status_code, {k.lower(): ", ".join(v) for k, v in r.headers.items()}, r.content)
            with contextlib.suppress(Unsatisfiable):  # what takes nothing has nothing wrong to be given
                any_call()
    print(f"answers to schemathesis: {dict(sorted(statuses.items()))}")
    return ran[0]


def part(name, scale, canaries, folder):
    "Run a part once; a second time it is known"
    if not RAN[name, scale]:
        RAN[name, scale] = globals()[name](PARTS[name] // scale, server=canaries, folder=folder)
    return RAN[name, scale]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", PARTS)
def test_V9_fuzzed_input_is_refused_in_our_words(name, scale, canaries, tmp_path):
    assert part(name, scale, canaries, tmp_path) >= 0.9 * PARTS[name] / scale


@pytest.mark.parametrize("scale", SCALES)
def test_all_fuzzed_input_is_counted(scale, canaries, tmp_path, capsys):
    counts = {name: part(name, scale, canaries, tmp_path) for name in PARTS}
    with capsys.disabled():
        print(f"\n{sum(counts.values()):,} fuzz cases: {counts}")
    assert sum(counts.values()) >= GOAL / scale


@pytest.mark.parametrize("part, bug, sees", [("sockets", "json_as_the_standard_library_reads_it", "500"), ("schemathesis", "an_error_tells_all_it_knows", "canary"),
                                             ("sockets", "an_error_tells_all_it_knows", "canary")])
def test_V9_control_a_server_that_fails_or_tells_is_seen(double, tmp_path, part, bug, sees):
    with Server(double, tmp_path, ui=True, model_version=1, head_seconds=1, body_seconds=1, FAKE_SECONDS=0, FAKE_PLANT=bug, CANARY_IN_THE_ENVIRONMENT="canary") as s:
        with pytest.raises(AssertionError) as caught:
            globals()[part](2_000, server=s)
        assert sees in str(caught.value)
