"""Pictures from the web: only from hosts that are allowed, and never from this machine's own network."""

import http.server
import socket
import threading

import pytest

pytest.importorskip("fastapi")
from nanochat.serving import sources as module
from nanochat.serving.problems import ApiError
from nanochat.serving.sources import Sources, public_address
from tests.serving import png


class Pictures(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/red.png")
            return self.end_headers()
        self.send_response(200 if self.path == "/red.png?a=b" else 404)
        self.end_headers()
        self.wfile.write(png())

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def port():
    server = http.server.HTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def sources(port, monkeypatch):
    """Sources that may ask a host whose address is said to be public."""
    monkeypatch.setattr(module, "public_address", lambda host, port: "127.0.0.1")
    return Sources((f"pictures.example:{port}",), max_bytes=1000)


def test_a_picture_of_an_allowed_host(sources, port):
    assert sources.load(f"http://pictures.example:{port}/red.png?a=b", "p") == png()


@pytest.mark.parametrize(
    "url",
    ["http://other.example/x", "http://127.0.0.1/x", "http://pictures.example:99/x", "http://a@pictures.example/x"],
)
def test_no_other_host_port_or_user_is_asked(monkeypatch, url):
    monkeypatch.setattr(module, "download", lambda *args: b"downloaded")
    sources = Sources(("pictures.example",))
    assert sources.load("http://pictures.example/x", "p") == b"downloaded"
    with pytest.raises(ApiError, match="fetches pictures from pictures.example only"):
        sources.load(url, "p")


@pytest.mark.parametrize(("path", "words"), [("moved", "302; redirects are not followed"), ("other", "status 404")])
def test_other_answers_are_errors(sources, port, path, words):
    with pytest.raises(ApiError, match=words):
        sources.load(f"http://pictures.example:{port}/{path}", "p")


def test_a_large_picture_is_not_read_whole(sources, port, monkeypatch):
    small = Sources(sources.allow_hosts, max_bytes=10)
    with pytest.raises(ApiError, match="at most 10 bytes") as error:
        small.load(f"http://pictures.example:{port}/red.png?a=b", "p")
    assert error.value.status == 413


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.5.5", "169.254.169.254", "0.0.0.0", "224.0.0.1", "100.64.0.1", "::1",
     "fe80::1", "fc00::1", "::ffff:127.0.0.1", "2002:7f00:1::", "::"],
)  # fmt: skip
def test_names_with_an_address_of_this_network_are_refused(monkeypatch, address):
    found = [(socket.AF_INET, 1, 6, "", ("93.184.216.34", 80)), (socket.AF_INET6, 1, 6, "", (address, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    with pytest.raises(ValueError, match="is not public"):
        public_address("inner.example", 80)
    found.pop()
    assert public_address("outer.example", 80) == "93.184.216.34"
