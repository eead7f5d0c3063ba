"""Interrupted pushes and pulls of large files are resumed and leave no parts."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tenacity import wait_none

from tita.errors import ExitCode, TitaError
from tita.storage.s3_store import S3Store

WRITES = ("PutObject", "UploadPart", "CopyObject", "UploadPartCopy", "DeleteObject")
PIECE = 1 << 20
SIZE = 10 * PIECE + 17


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 1 MiB; parts of 5 MiB, the minimum of S3."""
    monkeypatch.setattr("tita.storage.download.SLICE_BYTES", PIECE)
    monkeypatch.setattr("tita.storage.upload.MULTIPART_THRESHOLD_BYTES", 5 * PIECE)
    monkeypatch.setattr("tita.storage.upload._PART_BYTES", 5 * PIECE)
    monkeypatch.setattr("tita.storage.s3_bucket._COPY_PART_BYTES", 5 * PIECE)
    # One thread, so that requests have a fixed order.
    monkeypatch.setattr("tita.storage.transfers.WORKERS", 1)


@pytest.fixture
def store(s3_environment: dict[str, str]) -> S3Store:
    return S3Store(s3_environment["TITA_STORE"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "large").write_bytes(random.Random(1).randbytes(SIZE))
    return tmp_path / "tree"


@contextmanager
def watched(
    store: S3Store, *names: str, fail_at: int | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Record requests of these names; raise KeyboardInterrupt from the `fail_at`-th on."""
    requests: list[dict[str, Any]] = []

    def see(params: dict[str, Any], **_: Any) -> None:
        requests.append(params)
        if fail_at is not None and len(requests) >= fail_at:
            raise KeyboardInterrupt

    events = store._bucket._client.meta.events
    for name in names:
        events.register(f"before-call.s3.{name}", see)
    yield requests
    for name in names:
        events.unregister(f"before-call.s3.{name}", see)


def parts_left(store: S3Store) -> list[Any]:
    bucket = store._bucket
    page = bucket._client.list_multipart_uploads(Bucket=bucket.name, Prefix=bucket.prefix)
    return list(page.get("Uploads", ()))


def test_pull_resumes_from_finished_slices(store: S3Store, folder: Path, tmp_path: Path) -> None:
    store.push_tree(folder, "data")
    with watched(store, "GetObject", fail_at=6) as first, pytest.raises(KeyboardInterrupt):
        store.pull_tree("data", into=tmp_path / "copy")
    assert len(first) == 6
    assert not (tmp_path / "copy" / "large").exists()
    with watched(store, "GetObject") as second:
        store.pull_tree("data", into=tmp_path / "copy")
    # The manifest, and the seven missing slices.
    assert len(second) == 1 + 11 - 4
    assert (tmp_path / "copy" / "large").read_bytes() == (folder / "large").read_bytes()
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"large", ".tita-pulled.json"}


def test_slices_of_an_interrupted_pull_are_verified(
    store: S3Store, folder: Path, tmp_path: Path
) -> None:
    store.push_tree(folder, "data")
    with watched(store, "GetObject", fail_at=6), pytest.raises(KeyboardInterrupt):
        store.pull_tree("data", into=tmp_path / "copy")
    (part,) = (tmp_path / "copy").glob(".tita-*")
    with part.open("r+b") as file:
        file.write(b"spoiled")
    # The store is intact, so the file is downloaded again.
    store.pull_tree("data", into=tmp_path / "copy")
    assert (tmp_path / "copy" / "large").read_bytes() == (folder / "large").read_bytes()


def test_push_resumes_from_sent_parts_and_leaves_none(
    store: S3Store, folder: Path, tmp_path: Path
) -> None:
    with watched(store, "UploadPart", fail_at=3), pytest.raises(KeyboardInterrupt):
        store.push_tree(folder, "data")
    assert store.read_manifest("data") is None
    assert len(parts_left(store)) == 1
    with watched(store, "UploadPart") as second:
        store.push_tree(folder, "data")
    assert len(second) == 1
    assert parts_left(store) == []
    pulled = store.pull_tree("data", into=tmp_path / "copy")
    assert (pulled / "large").read_bytes() == (folder / "large").read_bytes()


def test_parts_of_other_content_are_sent_again(
    store: S3Store, folder: Path, tmp_path: Path
) -> None:
    with watched(store, "UploadPart", fail_at=3), pytest.raises(KeyboardInterrupt):
        store.push_tree(folder, "data")
    (folder / "large").write_bytes(random.Random(2).randbytes(SIZE))
    store.push_tree(folder, "data")
    assert parts_left(store) == []
    pulled = store.pull_tree("data", into=tmp_path / "copy")
    assert (pulled / "large").read_bytes() == (folder / "large").read_bytes()


@pytest.mark.parametrize("when", ["ListMultipartUploads", "UploadPart"])
@pytest.mark.parametrize("removed", [False, True])
def test_file_that_changes_during_a_push_leaves_no_parts(
    store: S3Store, folder: Path, when: str, removed: bool
) -> None:
    def change(**_: Any) -> None:
        if removed:
            (folder / "large").unlink(missing_ok=True)
        else:
            write_over(folder / "large", b"new")

    store._bucket._client.meta.events.register(f"before-call.s3.{when}", change)
    with pytest.raises(TitaError, match="changed during the push"):
        store.push_tree(folder, "data")
    assert parts_left(store) == []
    assert store.read_manifest("data") is None


@pytest.mark.parametrize("environment", ["s3_environment", "moto_environment"])
@pytest.mark.parametrize("spoil", [b"other", b""])
@pytest.mark.parametrize(
    ("part_bytes", "event"),
    [
        # Sent from memory; this listing follows after the files were hashed.
        (5 * PIECE, "before-call.s3.ListMultipartUploads"),
        # Sent from disk; changed before the request is signed, and after.
        (PIECE, "before-call.s3.PutObject"),
        (PIECE, "before-send.s3.PutObject"),
    ],
)
def test_file_that_changes_after_it_was_hashed_ends_the_push(
    request: pytest.FixtureRequest,
    monkeypatch,
    tmp_path: Path,
    environment: str,
    part_bytes: int,
    event: str,
    spoil: bytes,
) -> None:
    # SeaweedFS verifies the digest in the signature; moto does not.
    monkeypatch.setattr("tita.storage.upload._PART_BYTES", part_bytes)
    monkeypatch.setattr("tita.storage.s3_client.retry.wait", wait_none())
    request.getfixturevalue(environment)
    store = S3Store(os.environ["TITA_STORE"])
    path = tmp_path / "one" / "middling"
    path.parent.mkdir()
    path.write_bytes(bytes(3 * PIECE))
    change = partial(write_over, path, spoil)
    store._bucket._client.meta.events.register(event, change)
    with pytest.raises(TitaError, match="changed during the push") as caught:
        store.push_tree(path.parent, "data")
    assert caught.value.exit_code == ExitCode.USER
    assert not store.exists("data/middling")
    store._bucket._client.meta.events.unregister(event, change)
    store.push_tree(path.parent, "data")
    pulled = store.pull_tree("data", into=tmp_path / "copy")
    assert (pulled / "middling").read_bytes() == path.read_bytes()


def write_over(path: Path, content: bytes, **_: Any) -> None:
    """Overwrite a file's first bytes, or truncate it if no content is given."""
    with path.open("r+b") as file:
        file.write(content)
        if not content:
            file.truncate(PIECE)


@pytest.mark.parametrize("fail_at", range(1, 8))
def test_interrupted_push_over_a_tree_never_hides_it(
    store: S3Store, folder: Path, tmp_path: Path, fail_at: int
) -> None:
    (folder / "small").write_text("old")
    (folder / "gone").write_text("old")
    old = store.push_tree(folder, "data")
    contents = {old.digest: {path.name: path.read_bytes() for path in folder.iterdir()}}
    (folder / "small").write_text("new")
    (folder / "large").write_bytes(random.Random(3).randbytes(SIZE))
    (folder / "added").write_text("new")
    (folder / "gone").unlink()
    with watched(store, *WRITES, fail_at=fail_at), pytest.raises(KeyboardInterrupt):
        store.push_tree(folder, "data")
    new = {path.name: path.read_bytes() for path in folder.iterdir()}
    pulled = store.pull_tree("data", into=tmp_path / "between")
    found = {p.name: p.read_bytes() for p in pulled.iterdir() if not p.name.startswith(".tita-")}
    assert found in (contents[old.digest], new)
    store.push_tree(folder, "data")
    pulled = store.pull_tree("data", into=tmp_path / "after")
    assert {
        p.name: p.read_bytes() for p in pulled.iterdir() if not p.name.startswith(".tita-")
    } == new
    # The content of the old tree stays until it is pruned; nothing else may.
    store.prune("", older_than=timedelta(0))
    manifest = store.read_manifest("data")
    assert manifest is not None
    left = {entry.key.removeprefix("data/") for entry in store._bucket.list_objects("data/")}
    assert left == {"manifest.json", *(file.stored_at for file in manifest.files)}
    assert parts_left(store) == []
