"""A proxy in front of a real S3 server makes one in ten requests fail."""

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

from tests.s3_server import client
from tita.errors import TitaError
from tita.launch.preflight import CheckStatus, check_store
from tita.settings import settings
from tita.storage import open_store

FAULTS = ("503", "500", "reset before", "reset after", "truncated", "late")
TIMEOUT_S = 1.0


class FaultyProxy(BaseHTTPRequestHandler):
    """Forwards requests; on average one in ten fails in one of the ways in `FAULTS`."""

    protocol_version = "HTTP/1.1"
    upstream: ClassVar[str] = ""
    dice: ClassVar[random.Random] = random.Random(0)
    seen: ClassVar[Counter[str]] = Counter()
    lose_conditional: ClassVar[bool] = False
    """The first response to a conditional write of each key is lost."""
    ignore_conditions: ClassVar[bool] = False
    """Behave like a server without conditional writes."""
    forbidden: ClassVar[str] = "nothing"
    """Requests whose path contains this are denied."""

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.forbidden in self.path:
            return self.answer(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
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
            cut = True  # the client has timed out
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
def faulty_proxy(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    upstream = urlsplit(s3_environment["TITA_S3_ENDPOINT_URL"]).netloc
    monkeypatch.setattr(FaultyProxy, "upstream", upstream)
    monkeypatch.setattr(FaultyProxy, "seen", Counter())
    monkeypatch.setattr(FaultyProxy, "dice", random.Random(0))
    monkeypatch.setattr("tita.storage.s3_client.READ_TIMEOUT_S", TIMEOUT_S)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), FaultyProxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("TITA_S3_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
    settings.cache_clear()
    yield
    proxy.shutdown()
    proxy.server_close()
    settings.cache_clear()


def test_every_byte_is_right_although_one_in_ten_requests_fails(
    faulty_proxy: None, tmp_path: Path
) -> None:
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
    assert set(FaultyProxy.seen) == {"", *FAULTS}, "some fault never occurred"


def test_one_writer_wins_although_responses_are_lost(
    faulty_proxy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FaultyProxy, "lose_conditional", True)
    store = open_store()
    for number in range(8):
        assert store.put(f"locks/{number}", b"mine", if_absent=True)
        assert not store.put(f"locks/{number}", b"mine", if_absent=True)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: store.put("race", bytes([n]), if_absent=True), range(8)))
    assert sum(won) == 1
    assert store.get("race") == bytes([won.index(True)])
    assert sum(name.startswith("lost ") for name in FaultyProxy.seen) == 10, "one is the probe's"


def test_server_without_conditional_writes_is_refused(
    faulty_proxy: None, moto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # moto accepts a signature that covers a removed header.
    monkeypatch.setattr(FaultyProxy, "upstream", urlsplit(moto_url).netloc)
    monkeypatch.setattr(FaultyProxy, "ignore_conditions", True)
    with pytest.raises(TitaError, match=r"ignores If-None-Match, so.*TITA_S3_ENDPOINT_URL"):
        open_store().put("lock", b"mine", if_absent=True)
    assert list(open_store().list()) == []


@pytest.mark.parametrize("status", ["Enabled", "Suspended"])
def test_versioning_is_named_where_it_disables_conditions(
    faulty_proxy: None, moto_url: str, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    """As Ceph 16.2 does: the server honours conditions, but not in a versioned bucket."""
    moto = client(moto_url)
    bucket = f"versions-{status.lower()}"
    moto.create_bucket(Bucket=bucket)
    moto.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": status})
    monkeypatch.setattr(FaultyProxy, "upstream", urlsplit(moto_url).netloc)
    monkeypatch.setattr(FaultyProxy, "ignore_conditions", True)
    found = check_store(f"s3://{bucket}/x")
    assert found.mark is CheckStatus.BAD
    assert f"in this bucket, whose versioning is {status.lower()}" in found.text
    assert "use a bucket that never had versioning" in found.text
    assert "TITA_S3_ENDPOINT_URL" not in found.text


def test_versioning_that_cannot_be_read_is_named_as_a_cause(
    faulty_proxy: None, moto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FaultyProxy, "upstream", urlsplit(moto_url).netloc)
    monkeypatch.setattr(FaultyProxy, "ignore_conditions", True)
    monkeypatch.setattr(FaultyProxy, "forbidden", "?versioning")
    with pytest.raises(TitaError, match=r"use a bucket without versioning, or set TITA_S3_END"):
        open_store().put("lock", b"mine", if_absent=True)
