"""Images by URL: allowed hosts only, and never a way into the private network."""

import contextlib
import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serve_process import picture

from tita.serve.errors import APIError
from tita.serve.images import ImageFetcher, encoded_image, is_public
from tita.serve.options import Limits


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        if self.path in ("/slow-head", "/slow-body", "/endless", "/zipped"):
            self.misbehave()
            return
        self.send_response(200 if self.path == "/x.png" else 404)
        self.end_headers()
        self.wfile.write(picture())

    def misbehave(self) -> None:
        """Send a byte now and then, or more than anybody wants."""
        with contextlib.suppress(OSError):
            if self.path == "/slow-head":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nx-y: ")
            else:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                if self.path == "/zipped":
                    self.wfile.write(b"content-encoding: gzip\r\n\r\n")
                    self.wfile.write(gzip.compress(picture() + bytes(50_000_000)))
                    return
                self.wfile.write(b"\r\n")
            # Ends when the other side hangs up, and well before a test could hang for good.
            for _ in range(10_000 if self.path == "/endless" else 300):
                self.wfile.write(bytes(65536) if self.path == "/endless" else b"x")
                self.wfile.flush()
                if self.path != "/endless":
                    time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def fetcher(**options: object) -> ImageFetcher:
    """One for which this machine is the internet; all names lead here."""
    given = {
        "hosts": ("images.test", ".cdn.test"),
        "resolve": lambda host, _: ["10.0.0.1"] if host == "inside.cdn.test" else ["127.0.0.1"],
        "public": lambda address: address == "127.0.0.1",
    }
    return ImageFetcher(**(given | options))  # type: ignore[arg-type]


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
    with pytest.raises(APIError, match=reason):
        fetcher().fetch(path.format(port=port), max_bytes=10**6)


@pytest.mark.parametrize(
    "url",
    [
        "http://2130706433:{port}/x.png", "http://0x7f000001:{port}/x.png",
        "http://0177.0.0.1:{port}/x.png", "http://127.1:{port}/x.png",
        "http://[::ffff:127.0.0.1]:{port}/x.png", "http://[::1]:{port}/x.png",
        "http://images.test.evil.test:{port}/x.png", "http://evilimages.test:{port}/x.png",
        "http://evil.test\\\\@images.test@evil.test:{port}/x.png",
        "http://evil.test#@images.test:{port}/x.png", "http://evil.test?@images.test:{port}/",
        "http://evil.test%2f@cdn.test:{port}/x.png", "http://a.images.test:{port}/x.png",
        "ftp://images.test/x.png", "gopher://images.test/x", "file://images.test/etc/passwd",
        "HTTP://", "http:///x.png", "http://images.test:99999/x.png", "http://images.test:x/",
        "http://[images.test/x.png",
    ],
)  # fmt: skip
def test_no_spelling_leads_past_the_list(port: int, url: str):
    with pytest.raises(APIError):
        fetcher().fetch(url.format(port=port), max_bytes=10**6)


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost"])
def test_no_spelling_of_this_machine_is_public_even_if_listed(port: int, host: str):
    with pytest.raises(APIError, match="private"):
        ImageFetcher(hosts=(host,)).fetch(f"http://{host}:{port}/x.png", max_bytes=10**6)


def test_a_name_is_resolved_once_and_the_connection_goes_there(port: int):
    answers = [["127.0.0.1"], ["10.0.0.1"]]
    rebinding = fetcher(resolve=lambda *_: answers.pop(0))
    assert rebinding.fetch(f"http://images.test:{port}/x.png", max_bytes=10**6) == picture()
    assert len(answers) == 1


def test_one_private_address_among_others_is_enough_to_refuse(port: int):
    both = fetcher(resolve=lambda *_: ["127.0.0.1", "10.0.0.1"])
    with pytest.raises(APIError, match="private"):
        both.fetch(f"http://images.test:{port}/x.png", max_bytes=10**6)


def test_credentials_in_a_url_are_not_passed_on(port: int):
    url = f"http://user:secret@images.test:{port}/x.png"
    assert fetcher().fetch(url, max_bytes=10**6) == picture()


@pytest.mark.parametrize("path", ["/slow-head", "/slow-body"])
def test_a_byte_now_and_then_gains_no_time(port: int, path: str):
    with pytest.raises(APIError, match="too slowly"):
        fetcher(timeout_s=0.3).fetch(f"http://images.test:{port}{path}", max_bytes=10**6)


def test_an_endless_body_is_broken_off(port: int):
    with pytest.raises(APIError, match="more than"):
        fetcher().fetch(f"http://images.test:{port}/endless", max_bytes=10**6)


def test_nothing_is_unpacked_on_the_way(port: int):
    content = fetcher().fetch(f"http://images.test:{port}/zipped", max_bytes=10**6)
    assert content.startswith(b"\x1f\x8b")
    with pytest.raises(APIError, match="image"):
        encoded_image(content, limits=Limits()).decoded()


def test_size_is_bounded(port: int):
    with pytest.raises(APIError, match="more than 10 bytes"):
        fetcher().fetch(f"http://images.test:{port}/x.png", max_bytes=10)


def test_the_real_check_refuses_this_machine(port: int):
    with pytest.raises(APIError, match="private"):
        ImageFetcher(hosts=("localhost",)).fetch(f"http://localhost:{port}/x.png", max_bytes=10**6)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",
     "100.64.0.1", "224.0.0.1", "::1", "::", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1",
     "64:ff9b::a00:1", "2002:a00:1::", "::10.0.0.1", "::7f00:1", "fec0::1", "255.255.255.255"],
)  # fmt: skip
def test_private_addresses(address: str):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address: str):
    assert is_public(address)
