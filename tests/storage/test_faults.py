"""One in ten requests spoiled, in both directions: a proxy before a real S3 server."""

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest

from tita.errors import TitaError
from tita.settings import settings
from tita.storage import open_store

FAULTS = ("503", "500", "reset before", "reset after", "truncated", "late")
TIMEOUT_S = 1.0


class Spoiler(BaseHTTPRequestHandler):
    """Passes requests on; every tenth or so meets one of the faults."""

    protocol_version = "HTTP/1.1"
    upstream: ClassVar[str] = ""
    dice: ClassVar[random.Random] = random.Random(0)
    seen: ClassVar[Counter[str]] = Counter()
    lose_conditional: ClassVar[bool] = False
    """Every first answer to a conditional write of a key is lost."""
    ignore_conditions: ClassVar[bool] = False
    """As servers do that do not know conditional writes."""

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.dice.choice(FAULTS) if self.dice.random() < 0.1 else ""
        if self.headers.get("If-None-Match"):
            lost = f"lost {self.path}"
            if self.lose_conditional and not self.seen[lost]:
                fault = "reset after"
                self.seen[lost] += 1
            if self.ignore_conditions:
                del self.headers["If-None-Match"]
        self.seen[fault] += 1
        if fault in ("503", "500"):
            return self.answer(int(fault), {}, b"<Error><Code>SlowDown</Code></Error>")
        if fault == "reset before":
            return self.hang_up()
        link = http.client.HTTPConnection(self.upstream)
        link.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            link.putheader(name, value)
        link.endheaders(body)
        got = link.getresponse()
        data, headers = got.read(), dict(got.getheaders())
        link.close()
        if fault == "reset after":
            return self.hang_up()
        if fault == "late":
            time.sleep(1.5 * TIMEOUT_S)
        return self.answer(got.status, headers, data, cut=fault == "truncated")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on  # noqa: N815

    def answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        try:
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
        except OSError:
            cut = True  # a client that no longer waits
        if cut:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def spoiled(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    upstream = urlsplit(s3_environment["TITA_S3_ENDPOINT_URL"]).netloc
    monkeypatch.setattr(Spoiler, "upstream", upstream)
    monkeypatch.setattr(Spoiler, "seen", Counter())
    monkeypatch.setattr(Spoiler, "dice", random.Random(0))
    monkeypatch.setattr("tita.storage.s3_client.READ_TIMEOUT_S", TIMEOUT_S)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Spoiler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("TITA_S3_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
    settings.cache_clear()
    yield
    proxy.shutdown()
    proxy.server_close()
    settings.cache_clear()


def test_one_in_ten_requests_spoiled_and_every_byte_right(spoiled: None, tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    folder.mkdir()
    content = {f"{number:03}.bin": random.Random(number).randbytes(3_000) for number in range(300)}
    content["large.bin"] = random.Random(-1).randbytes(17 << 20)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    store = open_store()
    store.push_tree(folder, "data")
    pulled = store.pull_tree("data", into=tmp_path / "copy")
    assert {name: (pulled / name).read_bytes() for name in content} == content
    assert [info.key for info in store.list("data/")] == sorted(
        f"data/{name}" for name in (*content, "manifest.json")
    )
    for number in range(60):
        assert store.put(f"locks/{number}", b"mine", if_absent=True)
        assert not store.put(f"locks/{number}", b"mine", if_absent=True)
        assert store.get(f"locks/{number}") == b"mine"
    assert set(Spoiler.seen) == {"", *FAULTS}, "some fault was never met"


def test_of_writers_whose_answers_are_lost_one_wins(
    spoiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spoiler, "lose_conditional", True)
    store = open_store()
    for number in range(8):
        assert store.put(f"locks/{number}", b"mine", if_absent=True)
        assert not store.put(f"locks/{number}", b"mine", if_absent=True)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: store.put("race", bytes([n]), if_absent=True), range(8)))
    assert sum(won) == 1
    assert store.get("race") == bytes([won.index(True)])
    assert sum(name.startswith("lost ") for name in Spoiler.seen) == 10, "one was the probe's"


def test_a_server_that_ignores_conditions_is_refused(
    spoiled: None, moto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # moto does not mind that the signature is for more headers.
    monkeypatch.setattr(Spoiler, "upstream", urlsplit(moto_url).netloc)
    monkeypatch.setattr(Spoiler, "ignore_conditions", True)
    with pytest.raises(TitaError, match=r"ignores If-None-Match.*TITA_S3_ENDPOINT_URL"):
        open_store().put("lock", b"mine", if_absent=True)
    assert list(open_store().list()) == []
