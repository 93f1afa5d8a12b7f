"""HTTPS is held against the authorities of this machine, wherever a client of ours speaks it; plain HTTP reads none of them."""
import datetime
import http.server
import ipaddress
import ssl
import threading

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mlserve import doctor
from mlserve.client import Client
from mlserve.errors import RemoteUnavailable
from mlserve.release.record.mlflow_store import ensure_reachable


class Fine(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def signed(folder):
    "A key and a certificate for this machine that no authority knows"
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False).sign(key, hashes.SHA256())
    text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "both.pem").write_bytes(text + made.public_bytes(serialization.Encoding.PEM))
    return folder / "both.pem"


@pytest.fixture
def url(tmp_path):
    "A server whose certificate nobody vouches for"
    server, context = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fine), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(signed(tmp_path))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_certificate_that_nobody_vouches_for_is_refused(url):
    assert httpx.get(url, verify=False, trust_env=False).status_code == 200  # it answers
    with pytest.raises(RemoteUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        ensure_reachable(url)
    for address in (url, url.replace("https", "HTTPS")):
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            doctor._get(address)
    with Client(url) as client, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        client.http.get("/")


def test_plain_http_reads_no_authorities(monkeypatch):
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *args, **more: pytest.fail("it read authorities"))
    with pytest.raises(RemoteUnavailable, match="did not answer"):
        ensure_reachable("http://127.0.0.1:9")
    assert Client("http://127.0.0.1:9").http.base_url.port == 9
