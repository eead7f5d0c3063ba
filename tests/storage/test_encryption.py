"""Writes ask for the encryption, and all requests accept the charges, that the settings name."""

import http.client
import random
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest

from tests.s3_server import client
from tests.storage.test_resuming import watched
from tita.errors import ExitCode, TitaError
from tita.settings import settings
from tita.storage.s3_store import S3Store

KEY = "arn:aws:kms:us-east-1:123456789012:key/0d1c"
PART = 5 << 20
"""The minimum of S3."""
SIZE = PART + 17


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tita.storage.upload.MULTIPART_THRESHOLD_BYTES", PART)
    monkeypatch.setattr("tita.storage.upload._PART_BYTES", PART)
    monkeypatch.setattr("tita.storage.s3_bucket._COPY_PART_BYTES", PART)
    # One thread, so that requests have a fixed order.
    monkeypatch.setattr("tita.storage.transfers.WORKERS", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "small").write_bytes(b"small")
    (tmp_path / "tree" / "large").write_bytes(random.Random(1).randbytes(SIZE))
    return tmp_path / "tree"


Open = Callable[..., S3Store]


@pytest.fixture
def open_with(moto_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Open:
    """A function that opens the store under other settings: `s3_encryption="AES256"`."""

    def open_store(**changed: str) -> S3Store:
        for name, value in changed.items():
            monkeypatch.setenv(f"TITA_{name.upper()}", value)
        settings.cache_clear()
        return S3Store(moto_environment["TITA_STORE"])

    return open_store


def encryption(url: str, store: S3Store) -> dict[str, tuple[str | None, str | None]]:
    """Kind and key of the encryption of every object of the store, as its server names them."""
    bucket, s3 = store._bucket, client(url)
    page = s3.list_objects_v2(Bucket=bucket.name, Prefix=bucket.prefix)
    found = {}
    for entry in page["Contents"]:
        head = s3.head_object(Bucket=bucket.name, Key=entry["Key"])
        name = entry["Key"].removeprefix(bucket.prefix)
        found[name] = head.get("ServerSideEncryption"), head.get("SSEKMSKeyId")
    return found


@pytest.mark.parametrize(
    ("kind", "key"),
    [("AES256", None), ("aws:kms", None), ("aws:kms", KEY), ("aws:kms:dsse", None)],
)
def test_every_object_has_the_encryption_of_the_settings(
    open_with: Open, folder: Path, tmp_path: Path, moto_url: str, kind: str, key: str | None
) -> None:
    store = open_with(s3_encryption=kind, s3_kms_key_id=key or "")
    store.push_tree(folder, "data")
    manifest = store.read_manifest("data")
    assert manifest is not None
    digests = {file.path: file.sha256 for file in manifest.files}
    for name in ("small", "large"):
        store._bucket.copy(f"data/{name}", f"copies/{name}", sha256=digests[name])
    store.put("lock", b"1", if_absent=True)
    assert not store.put("lock", b"2", if_absent=True)
    (folder / "small").write_bytes(b"changed")
    store.push_tree(folder, "data")
    found = encryption(moto_url, store)
    assert {"lock", "copies/large", "data/large", "data/manifest.json"} < set(found)
    assert set(found.values()) == {(kind, key)}
    pulled = store.pull_tree("data", into=tmp_path / "pulled")
    assert (pulled / "large").read_bytes() == (folder / "large").read_bytes()
    assert (pulled / "small").read_bytes() == b"changed"


def test_without_the_settings_nothing_is_asked_for(
    open_with: Open, folder: Path, moto_url: str
) -> None:
    store = open_with(s3_encryption="", s3_requester_pays="false")
    names = ("PutObject", "CreateMultipartUpload", "HeadObject")
    with watched(store, *names) as requests:
        store.push_tree(folder, "data")
    headers = {name.lower() for request in requests for name in request["headers"]}
    assert "x-amz-server-side-encryption" not in headers
    assert "x-amz-request-payer" not in headers


@pytest.mark.parametrize(
    ("before", "after", "num_parts"),
    # The ETags of parts under KMS are not their MD5, so that upload starts again.
    [("AES256", "AES256", 1), ("", "AES256", 1), ("aws:kms", "AES256", 1), ("", "aws:kms", 2)],
)
def test_a_resumed_upload_has_the_encryption_of_the_settings(
    open_with: Open, folder: Path, moto_url: str, before: str, after: str, num_parts: int
) -> None:
    store = open_with(s3_encryption=before)
    with watched(store, "UploadPart", fail_at=2), pytest.raises(KeyboardInterrupt):
        store.push_tree(folder, "data")
    store = open_with(s3_encryption=after)
    with watched(store, "UploadPart") as sent:
        store.push_tree(folder, "data")
    assert len(sent) == num_parts
    bucket = store._bucket
    page = bucket._client.list_multipart_uploads(Bucket=bucket.name, Prefix=bucket.prefix)
    assert page.get("Uploads", []) == []
    assert encryption(moto_url, store)["data/large"] == (after, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"s3_kms_key_id": KEY},
            "TITA_S3_KMS_KEY_ID: a KMS key needs encryption by KMS; set TITA_S3_ENCRYPTION to",
        ),
        (
            {"s3_kms_key_id": KEY, "s3_encryption": "AES256"},
            "TITA_S3_KMS_KEY_ID: a KMS key needs encryption by KMS",
        ),
        (
            {"s3_encryption": "aes256"},
            "TITA_S3_ENCRYPTION: input should be '', 'AES256', 'aws:kms' or 'aws:kms:dsse'; corr",
        ),
        (
            {"s3_requester_pays": "true", "s3_anonymous": "true"},
            "TITA_S3_REQUESTER_PAYS: an anonymous requester cannot pay; unset it, or TITA_S3_ANON",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    open_with: Open, values: dict[str, str], message: str
) -> None:
    with pytest.raises(TitaError) as caught:
        open_with(**values)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == ExitCode.USER


def test_a_server_that_ignores_the_encryption_is_refused(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TITA_S3_ENCRYPTION", "aws:kms:dsse")
    settings.cache_clear()
    expected = "TITA_S3_ENCRYPTION: the server ignores it and stores objects without; use a server"
    with pytest.raises(TitaError, match=expected):
        S3Store(s3_environment["TITA_STORE"]).put("x", b"1")


class RecordingProxy(BaseHTTPRequestHandler):
    """Forwards requests and records their method, path and headers."""

    protocol_version = "HTTP/1.1"
    upstream: ClassVar[str] = ""
    seen: ClassVar[list[tuple[str, str, dict[str, str]]]] = []

    def forward(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen.append((self.command, self.path, headers))
        body = self.rfile.read(int(headers.get("content-length", 0)))
        link = http.client.HTTPConnection(self.upstream)
        headers.pop("expect", None)
        link.request(self.command, self.path, body=body, headers=headers)
        got = link.getresponse()
        data = got.read()
        self.send_response_only(got.status)
        for name, value in got.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = got.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data)
        link.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def proxy(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a recording proxy before moto."""
    monkeypatch.setattr(RecordingProxy, "upstream", urlsplit(moto_url).netloc)
    monkeypatch.setattr(RecordingProxy, "seen", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), RecordingProxy)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_every_request_accepts_the_charges(
    open_with: Open, folder: Path, tmp_path: Path, proxy: str
) -> None:
    store = open_with(s3_requester_pays="true", s3_endpoint_url=proxy)
    with watched(store, "UploadPart", fail_at=2), pytest.raises(KeyboardInterrupt):
        store.push_tree(folder, "data")
    store.push_tree(folder, "data")
    manifest = store.read_manifest("data")
    assert manifest is not None
    large = next(file for file in manifest.files if file.path == "large")
    store._bucket.copy("data/large", "copy", sha256=large.sha256)
    store.pull_tree("data", into=tmp_path / "pulled")
    assert list(store.list("data/"))
    store.delete("copy")
    assert len({method for method, *_ in RecordingProxy.seen}) == 5
    assert sum("x-amz-copy-source" in headers for *_, headers in RecordingProxy.seen) == 2
    for method, path, headers in RecordingProxy.seen:
        assert headers.get("x-amz-request-payer") == "requester", (method, path)
        signed = headers["authorization"].partition("SignedHeaders=")[2].partition(",")[0]
        assert "x-amz-request-payer" in signed.split(";"), (method, path)
