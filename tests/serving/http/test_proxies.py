"""Behind the proxies that people run, haproxy and nginx: a new version takes over under load (L6), and one request is one request (N7)."""
import collections
import contextlib
import shutil
import socket
import subprocess
import time

import pytest
from load import Load
from servers import Server, Wire, free_port, request, until

HAPROXY = """
global
    maxconn 2000
    stats socket {folder}/admin level admin
defaults
    mode http
    timeout connect 2s
    timeout client 30s
    timeout server 30s
    retries {retries}
    {retry_on}
listen models
    bind 127.0.0.1:{port}
    http-reuse safe
    server blue 127.0.0.1:{blue} disabled
    server green 127.0.0.1:{green} disabled
"""
NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;
events {{}}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    upstream models {{ server 127.0.0.1:{blue}; keepalive 4; }}
    server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://models; proxy_http_version 1.1; proxy_set_header Connection ""; }} }}
}}
"""


@contextlib.contextmanager
def running(*command, port):
    "A proxy, until the block ends"
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        def listens():
            assert process.poll() is None, process.stderr.read().decode()
            with socket.socket() as s:
                return s.connect_ex(("127.0.0.1", port)) == 0
        until(listens)
        yield
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


class Haproxy:
    "haproxy with two places, of which one serves"

    def __init__(self, folder, blue, green, retry=False):
        self.folder, self.port = folder, free_port()
        more = dict(retries=3, retry_on="option redispatch 1\n    retry-on all-retryable-errors") if retry else dict(retries=0, retry_on="")
        (folder / "haproxy.cfg").write_text(HAPROXY.format(folder=folder, port=self.port, blue=blue, green=green, **more))

    def run(self):
        return running(shutil.which("haproxy") or "/usr/sbin/haproxy", "-db", "-f", self.folder / "haproxy.cfg", port=self.port)

    def tell(self, *commands):
        "Commands for haproxy while it runs"
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(self.folder / "admin"))
            s.sendall("; ".join(commands).encode() + b"\n")
            said = b""
            while part := s.recv(4096):
                said += part
        assert not said.strip(), said


def roll(double, folder, cycles, each, switch=True, retry=False, last_bug={}):
    "Replace the server `cycles` times, each after so many answers: what the clients saw, what the models ran, and what was wrong"
    ports, places, wrong = {"blue": free_port(), "green": free_port()}, ["green", "blue"], []
    proxy, seen, servers = Haproxy(folder, **ports, retry=retry), folder / "seen", {}

    def start(version, place, **more):
        servers[place] = Server(double, folder, port=ports[place], model_version=version, drain_delay=0.1, FAKE_SEEN=seen, **{"FAKE_SECONDS": 0.001} | more)

    with proxy.run(), contextlib.ExitStack() as stack:
        stack.callback(lambda: [s.__exit__() for s in servers.values()])
        start("v0", "green", **last_bug)
        proxy.tell("set server models/green state ready")
        with Load(proxy.port) as load:
            for n in range(1, cycles + 1):
                until(lambda: len(load.answers) >= n * each or len(load.failures) > 100, 120)
                old, new = places[(n + 1) % 2], places[n % 2]
                start(f"v{n}", new)
                if switch:
                    proxy.tell(f"set server models/{new} state ready", f"set server models/{old} state drain")
                else:
                    proxy.tell(f"set server models/{new} state ready")
                switched = time.monotonic()
                time.sleep(0.2)
                if servers[old].stop() != 0:
                    wrong.append("exit code")
                servers.pop(old).__exit__()
                wrong += [(number, version) for number, (version, sent) in load.answers.copy().items() if sent > switched and version != f"v{n}"]
    ran = collections.Counter(seen.read_text().split())
    twice = [int(v) for v, n in ran.items() if v != "0" and n > 1 + int(v) % 3]  # so many rows has the request of this number
    return load, wrong, twice


@pytest.mark.parametrize("cycles, each", [pytest.param(10, 5_000, id="1in20"), pytest.param(200, 5_000, id="full", marks=pytest.mark.soak)])
def test_L6_a_new_version_takes_over_and_no_request_fails_runs_twice_or_meets_the_old_one(double, tmp_path, cycles, each):
    load, wrong, twice = roll(double, tmp_path, cycles, each)
    print(f"{len(load.answers)} requests over {cycles} replacements")
    assert len(load.answers) >= cycles * each
    assert not load.failures, load.failures[:3]
    assert not wrong and not twice
    assert {v for v, _ in load.answers.values()} == {f"v{n}" for n in range(cycles + 1)}


CUT = {"FAKE_PLANT": "connections_end_with_the_signal", "FAKE_SECONDS": 0.05}


@pytest.mark.parametrize("bug, sees", [(dict(last_bug=CUT, switch=False), "failures"), (dict(last_bug=CUT, switch=False, retry=True), "twice"), (dict(switch=False), "wrong")],
                         ids=["a server that cuts", "a proxy that asks again", "no switch"])
def test_L6_control_what_is_lost_run_twice_or_answered_by_the_old_one_is_seen(double, tmp_path, bug, sees):
    load, wrong, twice = roll(double, tmp_path, 1, 500, **bug)
    assert {"failures": load.failures, "twice": twice, "wrong": wrong}[sees]


# ---- one request is one request

def hidden(n):
    "A request that stands where another request's body might"
    return request(body=b'{"inputs": [[%d, 0]]}' % n, x_request_id=f"hidden-{n}")


TRICKS = {  # the head of a request behind its first two lines, and what follows; {h} is a hidden request, {n} its size
    "length and chunks": (b"content-length: {m}\r\ntransfer-encoding: chunked", b"0\r\n\r\n{h}"),
    "chunks and a short length": (b"transfer-encoding: chunked\r\ncontent-length: 4", b"{x}\r\n{h}\r\n0\r\n\r\n"),
    "two lengths": (b"content-length: 0\r\ncontent-length: {n}", b"{h}"),
    "two lengths, swapped": (b"content-length: {n}\r\ncontent-length: 0", b"{h}"),
    "a list of lengths": (b"content-length: {n}, 0", b"{h}"),
    "a signed length": (b"content-length: +{n}", b"{h}"),
    "a length and a space": (b"content-length : {n}", b"{h}"),
    "a coding and a space": (b"content-length: {m}\r\ntransfer-encoding : chunked", b"0\r\n\r\n{h}"),
    "a coding behind a tab": (b"content-length: {m}\r\ntransfer-encoding:\tchunked", b"0\r\n\r\n{h}"),
    "another coding": (b"content-length: {m}\r\ntransfer-encoding: xchunked", b"0\r\n\r\n{h}"),
    "two codings": (b"content-length: {m}\r\ntransfer-encoding: chunked, identity", b"0\r\n\r\n{h}"),
    "two codings, swapped": (b"content-length: {m}\r\ntransfer-encoding: identity, chunked", b"0\r\n\r\n{h}"),
    "two lines of coding": (b"content-length: {m}\r\ntransfer-encoding: chunked\r\ntransfer-encoding: x", b"0\r\n\r\n{h}"),
    "a coding with a control character": (b"content-length: {m}\r\ntransfer-encoding: \x0bchunked", b"0\r\n\r\n{h}"),
    "a coding behind a bare line feed": (b"x: y\ntransfer-encoding: chunked\r\ncontent-length: {m}", b"0\r\n\r\n{h}"),
    "a folded coding": (b"content-length: {m}\r\ntransfer-encoding:\r\n chunked", b"0\r\n\r\n{h}"),
    "a coding in another case": (b"content-length: {m}\r\nTRANSFER-ENCODING: ChUnKeD", b"0\r\n\r\n{h}"),
    "a signed chunk": (b"transfer-encoding: chunked", b"+0\r\n\r\n{h}"),
    "a chunk in 0x": (b"transfer-encoding: chunked", b"0x0\r\n\r\n{h}"),
    "a chunk ended by a line feed": (b"transfer-encoding: chunked", b"0\n\n{h}"),
    "an extension with a line feed": (b"transfer-encoding: chunked", b"1;a\nb\r\n{{\r\n0\r\n\r\n{h}"),
    "a chunk over 64 bits": (b"transfer-encoding: chunked", b"10000000000000000\r\n{h}\r\n0\r\n\r\n"),
    "trailers that look like a request": (b"transfer-encoding: chunked", b"0\r\n{h}"),
    "no body, and one": (b"x: y", b"{h}"),
    "an upgrade": (b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 0", b"{h}"),
    "a promise to wait": (b"expect: 100-continue\r\ncontent-length: {n}", b"{h}"),
    "a length over the limit": (b"content-length: 100500", b"{h}"),
    "another method": (b"x-http-method-override: GET\r\ncontent-length: {n}", b"{h}"),
    "a NUL": (b"x: a\x00b\r\ncontent-length: 0", b"{h}"),
    "an empty name": (b": y\r\ncontent-length: 0", b"{h}"),
}


def filled(trick, n):
    "A trick with its numbers, as (head, rest)"
    h = hidden(n)
    fields = {b"{h}": h, b"{n}": b"%d" % len(h), b"{m}": b"%d" % (len(h) + 5), b"{x}": b"%x" % len(h), b"{{": b"{"}
    head, rest = trick
    for k, v in fields.items():
        head, rest = head.replace(k, v), rest.replace(k, v)
    return b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nx-request-id: open-%d\r\n%s\r\n\r\n" % (n, head), rest


def ids_of(answers):
    "The ids in the answers that are ours"
    return [line.split(b": ")[1].decode() for line in answers.lower().split(b"\r\n") if line.startswith(b"x-request-id: ") and b"-" in line[13:]]


def one_to_one(port, accepted, rounds=1, wait=0.0):
    "Every trick, and a plain request after each: ids that the server worked on, and that no client was given; and plain requests that went wrong"
    given, wrong = collections.Counter(), []
    for n in range(1, rounds * len(TRICKS) + 1):
        name = list(TRICKS)[n % len(TRICKS)]
        head, rest = filled(TRICKS[name], n)
        with Wire(port, timeout=0.5) as w, contextlib.suppress(OSError):
            w.send(head)
            time.sleep(wait)
            w.send(rest)
            with contextlib.suppress(TimeoutError):
                while w.fill():
                    pass
        given.update(ids_of(w.buffer))
        for i in range(2):
            with Wire(port) as w:
                status, headers, body = w.send(request(body=b'{"inputs": [[%d, %d]]}' % (n, i), x_request_id=f"probe-{n}-{i}")).answer()
            given[headers.get("x-request-id")] += 1
            if status != 200 or headers["x-request-id"] != f"probe-{n}-{i}" or body != b'{"outputs":[[%.1f,%.1f]]}' % (2 * n, 2 * i):
                wrong.append((name, status, headers, body))
    worked = collections.Counter(accepted.read_text().split())
    return [i for i in worked if worked[i] > given[i]], wrong


@contextlib.contextmanager
def behind(proxy, double, folder, **bug):
    "A server behind haproxy or nginx: the proxy's port, and the file of ids that the server worked on"
    with Server(double, folder, max_body=100_000, FAKE_ACCEPTED=folder / "accepted", **bug) as s:
        (folder / "accepted").write_text("")  # what the server asked itself before it was ready is nobody's
        if proxy == "haproxy":
            h = Haproxy(folder, s.port, s.port)
            with h.run():
                h.tell("set server models/blue state ready")
                yield h.port, folder / "accepted"
        else:
            port = free_port()
            (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, blue=s.port))
            with running(shutil.which("nginx") or "/usr/sbin/nginx", "-c", folder / "nginx.conf", "-p", folder, port=port):
                yield port, folder / "accepted"


@pytest.mark.parametrize("rounds", [pytest.param(1, id="1in20"), pytest.param(20, id="full", marks=pytest.mark.soak)])
@pytest.mark.parametrize("proxy", ["haproxy", "nginx"])
def test_N7_behind_a_proxy_one_request_is_one_request(double, tmp_path, proxy, rounds):
    "No request is worked on that no client was given the answer of, and nobody is given another's"
    with behind(proxy, double, tmp_path) as (port, accepted):
        unknown, wrong = one_to_one(port, accepted, rounds)
        assert not unknown and not wrong


def test_N7_control_a_server_that_reads_on_after_a_refusal_is_seen(double, tmp_path):
    with behind("haproxy", double, tmp_path, FAKE_PLANT="what_follows_a_refusal_is_a_request") as (port, accepted):
        unknown, wrong = one_to_one(port, accepted, wait=0.1)
        assert [u for u in unknown if u.startswith("hidden")], (unknown, wrong)
