"""Images by URL: only from allowed hosts, and never from the private network."""

import contextlib
import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tita.errors import TitaError
from tita.vlm.image_fetcher import FetchError, FetchFault, ImageFetcher, is_public

CONTENT = b"\x89PNG, not decoded here"


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
        self.wfile.write(CONTENT)

    def misbehave(self) -> None:
        """Send one byte at a time, or too many."""
        with contextlib.suppress(OSError):
            if self.path == "/slow-head":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nx-y: ")
            else:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                if self.path == "/zipped":
                    self.wfile.write(b"content-encoding: gzip\r\n\r\n")
                    self.wfile.write(gzip.compress(CONTENT + bytes(50_000_000)))
                    return
                self.wfile.write(b"\r\n")
            # Ends when the client disconnects, or after some seconds.
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
    """A fetcher that resolves all names to this machine and treats its address as public."""
    given = {
        "hosts": ("images.test", ".cdn.test"),
        "resolve": lambda host, _: ["10.0.0.1"] if host == "inside.cdn.test" else ["127.0.0.1"],
        "public": lambda address: address == "127.0.0.1",
    }
    return ImageFetcher(**(given | options))  # type: ignore[arg-type]


def test_allowed_hosts_are_fetched_from(port: int):
    for host in ("images.test", "a.cdn.test", "IMAGES.test."):
        assert fetcher().fetch(f"http://{host}:{port}/x.png", max_bytes=10**6) == CONTENT


def test_a_redirect_to_an_allowed_host_is_followed(port: int):
    url = f"http://images.test:{port}/to/http://b.cdn.test:{port}/x.png"
    assert fetcher().fetch(url, max_bytes=10**6) == CONTENT


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
def test_other_urls_are_rejected(port: int, path: str, reason: str):
    with pytest.raises(FetchError, match=reason):
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
def test_no_spelling_of_a_url_bypasses_the_host_list(port: int, url: str):
    with pytest.raises(FetchError):
        fetcher().fetch(url.format(port=port), max_bytes=10**6)


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost"])
def test_this_machine_is_private_in_every_spelling(port: int, host: str):
    with pytest.raises(FetchError, match="private"):
        ImageFetcher(hosts=(host,)).fetch(f"http://{host}:{port}/x.png", max_bytes=10**6)


def test_the_connection_goes_to_the_checked_address(port: int):
    answers = [["127.0.0.1"], ["10.0.0.1"]]
    rebinding = fetcher(resolve=lambda *_: answers.pop(0))
    assert rebinding.fetch(f"http://images.test:{port}/x.png", max_bytes=10**6) == CONTENT
    assert len(answers) == 1


def test_one_private_address_among_others_is_rejected(port: int):
    both = fetcher(resolve=lambda *_: ["127.0.0.1", "10.0.0.1"])
    with pytest.raises(FetchError, match="private"):
        both.fetch(f"http://images.test:{port}/x.png", max_bytes=10**6)


def test_credentials_in_a_url_are_dropped(port: int):
    url = f"http://user:secret@images.test:{port}/x.png"
    assert fetcher().fetch(url, max_bytes=10**6) == CONTENT


@pytest.mark.parametrize("path", ["/slow-head", "/slow-body"])
def test_slow_responses_time_out(port: int, path: str):
    with pytest.raises(FetchError, match=r"did not arrive within 0\.3 s"):
        fetcher(timeout_s=0.3).fetch(f"http://images.test:{port}{path}", max_bytes=10**6)


def test_an_endless_body_is_aborted(port: int):
    with pytest.raises(FetchError, match="more than"):
        fetcher().fetch(f"http://images.test:{port}/endless", max_bytes=10**6)


def test_compressed_responses_are_not_decompressed(port: int):
    content = fetcher().fetch(f"http://images.test:{port}/zipped", max_bytes=10**6)
    assert content.startswith(b"\x1f\x8b")


def test_the_size_is_limited(port: int):
    with pytest.raises(FetchError, match="more than 10 bytes"):
        fetcher().fetch(f"http://images.test:{port}/x.png", max_bytes=10)


def test_the_default_check_rejects_this_machine(port: int):
    with pytest.raises(FetchError, match="private"):
        ImageFetcher(hosts=("localhost",)).fetch(f"http://localhost:{port}/x.png", max_bytes=10**6)


def test_faults_and_details_tell_the_reasons_apart(port: int):
    cases = {
        f"http://images.test:{port}/missing": (FetchFault.REFUSED, "HTTP 404"),
        f"http://other.test:{port}/x.png": (FetchFault.HOST, ""),
        "http://images.test:1/x.png": (FetchFault.UNREACHABLE, "All connection attempts failed"),
    }
    for url, expected in cases.items():
        with pytest.raises(FetchError) as refused:
            fetcher().fetch(url, max_bytes=10**6)
        assert (refused.value.fault, refused.value.detail) == expected


def test_without_a_host_list_private_addresses_are_still_refused(port: int):
    anywhere = fetcher(hosts=None)
    assert anywhere.fetch(f"http://any.test:{port}/x.png", max_bytes=10**6) == CONTENT
    with pytest.raises(FetchError, match="private"):
        anywhere.fetch("http://inside.cdn.test/x.png", max_bytes=10**6)


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


@pytest.mark.parametrize(
    "host", ["https://images.test", "images.test:8080", "*.images.test", "images.test/", "", "."]
)
def test_a_host_that_no_url_has_is_refused(host: str):
    with pytest.raises(TitaError, match="is no host name; give it without scheme and port"):
        ImageFetcher(hosts=("images.test", ".cdn.test", "127.0.0.1", "::1", host))
