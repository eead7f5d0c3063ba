"""Images by URL: allowed hosts only, and never a way into the private network."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serve_process import picture

from tita.serve.failures import Refusal
from tita.serve.remote import Fetcher, is_public


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(200 if self.path == "/x.png" else 404)
        self.end_headers()
        self.wfile.write(picture())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def fetcher(**options: object) -> Fetcher:
    """One for which this machine is the internet; all names lead here."""
    given = {
        "hosts": ("images.test", ".cdn.test"),
        "resolve": lambda host, _: ["10.0.0.1"] if host == "inside.cdn.test" else ["127.0.0.1"],
        "public": lambda address: address == "127.0.0.1",
    }
    return Fetcher(**(given | options))  # type: ignore[arg-type]


def test_an_allowed_host_is_asked(port: int):
    for host in ("images.test", "a.cdn.test", "IMAGES.test."):
        assert fetcher().fetch(f"http://{host}:{port}/x.png", max_bytes=10**6) == picture()


def test_a_redirect_to_an_allowed_host_is_followed(port: int):
    url = f"http://images.test:{port}/to/http://b.cdn.test:{port}/x.png"
    assert fetcher().fetch(url, max_bytes=10**6) == picture()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("http://other.test:{port}/x.png", "from this host"),
        ("http://cdn.test:{port}/x.png", "from this host"),
        ("http://images.test@evil.test:{port}/x.png", "from this host"),
        ("http://inside.cdn.test:{port}/x.png", "private"),
        ("http://images.test:{port}/to/http://inside.cdn.test/x.png", "private"),
        ("http://images.test:{port}/to/http://169.254.169.254/latest", "from this host"),
        ("http://images.test:{port}/to/file:///etc/passwd", "http"),
        ("http://images.test:{port}/to//to//to//to//to//x.png", "redirects"),
        ("http://images.test:{port}/missing", "could not be fetched"),
        ("http://images.test:1/x.png", "could not be fetched"),
    ],
)
def test_all_else_is_refused(port: int, path: str, reason: str):
    with pytest.raises(Refusal, match=reason):
        fetcher().fetch(path.format(port=port), max_bytes=10**6)


def test_size_is_bounded(port: int):
    with pytest.raises(Refusal, match="more than 10 bytes"):
        fetcher().fetch(f"http://images.test:{port}/x.png", max_bytes=10)


def test_the_real_check_refuses_this_machine(port: int):
    with pytest.raises(Refusal, match="private"):
        Fetcher(hosts=("localhost",)).fetch(f"http://localhost:{port}/x.png", max_bytes=10**6)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",
     "100.64.0.1", "224.0.0.1", "::1", "::", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1",
     "64:ff9b::a00:1", "2002:a00:1::"],
)  # fmt: skip
def test_private_addresses(address: str):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address: str):
    assert is_public(address)
