"""Guarantees of both kinds of store; S3 on two servers."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError
from tenacity import wait_none

from tita.errors import DamagedData, StoreUnavailable, TitaError
from tita.settings import settings
from tita.storage import Store, open_store, resolve
from tita.storage.directory import DirectoryStore
from tita.storage.manifest import FilesInParts, Manifest, ManifestFile, ManifestPart
from tita.storage.s3_bucket import Bucket
from tita.storage.s3_store import S3Store
from tita.storage.store import list_trees


@pytest.fixture(params=["directory", "s3_environment", "moto_environment"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "directory":
        return open_store(str(tmp_path / "store"))
    request.getfixturevalue(request.param)
    return open_store()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tita.storage.s3_client.retry.wait", wait_none())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name, size in (("a.bin", 3_000_000), ("deep/er/b.txt", 5), ("empty", 0), ("ü ~.txt", 1)):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    return root


def content(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and path.name != "manifest.json"
        and ".tita-" not in str(path.relative_to(root))
    }


def test_trees_are_found_without_listing_their_files(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["data/a", "data/ab", "deep/er/still", "top", "runs/x/checkpoints/2/node-0", "runs/x"]
    for name in names:
        store.push_tree(folder, name)
    store.put("data/b/loose.txt", b"1")
    kind = type(store)
    monkeypatch.setattr(kind, "list", None)
    if kind is S3Store:
        monkeypatch.setattr(Bucket, "list_objects", None)
    assert [name for name, _ in list_trees(store)] == sorted(names)
    for prefix in ("data", "data/", "data/a", "runs/x", "deep/er/still/", "nothing", "top/deep"):
        expected = [name for name in sorted(names) if f"{name}/".startswith(prefix)]
        assert [name for name, _ in list_trees(store, prefix)] == expected, prefix
    assert store.folders("data/") == ["data/a", "data/ab", "data/b"]
    assert store.folders("data/a") == ["data/a", "data/ab"]


def test_objects_round_trip(store: Store) -> None:
    assert store.put("a/b.txt", b"one")
    assert store.put("a/b.txt", b"two")
    assert store.get("a/b.txt") == b"two"
    assert store.exists("a/b.txt")
    assert not store.exists("a/c.txt")
    assert [(info.key, info.size_bytes) for info in store.list("a/")] == [("a/b.txt", 3)]
    store.delete("a/b.txt")
    store.delete("a/b.txt")
    assert not store.exists("a/b.txt")


def test_objects_are_listed_by_key(store: Store) -> None:
    keys = ["x/b", "x/a/b/c", "x/á", "x/a.txt", "x-y", "x/a-b"]
    for key in keys:
        store.put(key, b"")
    assert [info.key for info in store.list("x")] == sorted(keys)
    assert [info.key for info in store.list("x/a")] == ["x/a-b", "x/a.txt", "x/a/b/c"]
    for number in range(3):
        store.put(f"y/{number}", b"")
    assert [info.key for info in store.list("y/", start_at="y/1")] == ["y/1", "y/2"]


def test_missing_object_is_named(store: Store) -> None:
    with pytest.raises(TitaError, match=r"nothing/here: no such object"):
        store.get("nothing/here")


@pytest.mark.parametrize("key", ["../x", "/x", "a/../../x", ""])
def test_keys_outside_the_store_are_refused(store: Store, key: str) -> None:
    with pytest.raises(TitaError, match="leaves the store"):
        store.put(key, b"")


def test_one_of_many_writers_wins(store: Store) -> None:
    won: list[int] = []

    def write(number: int) -> None:
        if store.put("lock", str(number).encode(), if_absent=True):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("lock") == str(won[0]).encode()


def test_trees_round_trip(store: Store, folder: Path, tmp_path: Path) -> None:
    manifest = store.push_tree(folder, "data/x", meta={"from": "here"})
    read = store.read_manifest("data/x")
    assert read is not None
    assert (read.files, read.digest, read.meta) == (
        manifest.files,
        manifest.digest,
        {"from": "here"},
    )
    assert content(store.pull_tree("data/x")) == content(folder)
    assert content(store.pull_tree("data/x", into=tmp_path / "copy")) == content(folder)


def test_second_push_replaces_the_tree(store: Store, folder: Path, tmp_path: Path) -> None:
    store.push_tree(folder, "data")
    (folder / "empty").unlink()
    (folder / "new").write_text("new")
    store.push_tree(folder, "data")
    assert content(store.pull_tree("data", into=tmp_path / "copy")) == content(folder)


def test_without_a_manifest_there_is_no_tree(store: Store, folder: Path) -> None:
    store.push_tree(folder, "data")
    store.delete("data/manifest.json")
    assert store.read_manifest("data") is None
    with pytest.raises(TitaError, match="no complete tree"):
        store.pull_tree("data")


def test_truncated_manifest_is_refused(store: Store, folder: Path) -> None:
    store.push_tree(folder, "data")
    data = store.get("data/manifest.json")
    store.put("data/manifest.json", data[: len(data) // 2])
    with pytest.raises(TitaError, match="invalid manifest"):
        store.pull_tree("data")


def test_manifest_cannot_write_outside_the_tree(store: Store, folder: Path) -> None:
    store.push_tree(folder, "data")
    body = json.loads(store.get("data/manifest.json"))
    body["files"][0]["path"] = "../../escaped"
    store.put("data/manifest.json", json.dumps(body).encode())
    with pytest.raises(TitaError):
        store.pull_tree("data")


@pytest.mark.parametrize("field", ["file", "part", "tree"])
def test_manifest_cannot_name_files_of_the_cache(
    store: Store, folder: Path, tmp_path: Path, field: str
) -> None:
    """The cache names files and folders by digests: what is no digest may be a path out of it."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    file = ManifestFile(path="a", size_bytes=3, sha256=str(victim) if field == "file" else "0" * 64)
    body = Manifest(files=(file,)).to_json()
    if field != "file":
        other = "0" * 64
        files = FilesInParts(
            parts=(
                ManifestPart(
                    key=".tita-0/files.jsonl.gz", num_files=1, first="a", last="a",
                    sha256=str(victim) if field == "part" else other,
                ),
            ),
            digest=str(victim) if field == "tree" else other,
            size_bytes=3, read=lambda part: b"", where="",
        )  # fmt: skip
        body = Manifest(files=files).to_json()
        store.put("data/.tita-0/files.jsonl.gz", b"evil")
    store.put("data/manifest.json", body)
    store.put("data/a", b"evil")
    with pytest.raises(DamagedData, match="victim' is not a SHA-256; push the tree again"):
        store.pull_tree("data")
    assert victim.read_text() == "precious"
    store.push_tree(folder, "data")
    assert content(store.pull_tree("data", into=tmp_path / "copy")) == content(folder)


def test_changed_content_is_detected(store: Store, folder: Path, tmp_path: Path) -> None:
    store.push_tree(folder, "data")
    store.put("data/a.bin", b"short")
    with pytest.raises((TitaError, StoreUnavailable), match="does not match its manifest"):
        store.pull_tree("data", into=tmp_path / "copy")
    assert not (tmp_path / "copy" / "a.bin").exists()


def test_link_out_of_the_folder_is_refused(store: Store, folder: Path) -> None:
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(TitaError, match="a link out of the folder"):
        store.push_tree(folder, "data")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("deep"), "odd: a link to a folder; use the folder itself"),
        (lambda path: path.symlink_to("nothing"), "odd: neither a file nor a folder"),
        (os.mkfifo, "odd: neither a file nor a folder"),
        (
            lambda path: Path(os.fsdecode(bytes(path) + b"\xff")).touch(),
            r"odd\\xff: the name is not UTF-8; rename it",
        ),
    ],
)
def test_entries_that_cannot_be_restored_are_refused(
    folder: Path, tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(folder / "odd")
    with pytest.raises(TitaError, match=message):
        open_store(str(tmp_path / "store")).push_tree(folder, "data")


def test_names_resolve_to_trees_files_and_paths(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.push_tree(folder, "data/x")
    assert content(resolve("data/x", store=store)) == content(folder)
    assert resolve("data/x/deep/er/b.txt", store=store).read_bytes() == b"x" * 5
    assert content(resolve("data/x/deep", store=store)) == {"er/b.txt": b"x" * 5}
    assert resolve(str(folder), store=store) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve("tree", store=store) == Path("tree")
    assert resolve("./tree", store=store) == Path("./tree")


def test_tree_is_not_pulled_for_a_file_that_it_does_not_have(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.push_tree(folder, "data/x")

    def pull(*_: object, **__: object) -> None:
        raise AssertionError("pulled")

    monkeypatch.setattr(type(store), "pull_tree", pull)
    with pytest.raises(TitaError, match="neither a complete tree"):
        resolve("data/x/deep/typo.jsonl", store=store)


def test_error_of_resolve_names_store_and_path(store: Store) -> None:
    with pytest.raises(TitaError) as caught:
        resolve("no/such/thing", store=store)
    assert store.uri in str(caught.value)
    assert "nor a path" in str(caught.value)


def test_second_pull_downloads_nothing(
    s3_environment: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.push_tree(folder, "data")
    first = store.pull_tree("data")
    monkeypatch.setattr(
        "tita.storage.s3_bucket.Bucket.read_range", lambda *_, **__: pytest.fail("again")
    )
    assert content(store.pull_tree("data")) == content(folder)
    assert store.pull_tree("data") == first


def test_progress_is_shown_for_each_phase(
    s3_environment: dict[str, str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: dict[str, list[float]] = {}

    @contextmanager
    def watch(what: str, *, total: float, unit: str) -> Iterator[Callable[[float], None]]:
        shown[what] = done = []
        yield done.append
        assert sum(done) == total, what

    monkeypatch.setattr("tita.storage.transfers.progress", watch)
    store = open_store()
    store.push_tree(folder, "data")
    assert list(shown) == ["look up", "push data"]
    (folder / "a.bin").write_bytes(b"other")
    store.push_tree(folder, "data")
    assert shown["push data"] == [5]
    store.pull_tree("data", into=tmp_path / "copy")
    assert list(shown)[-2:] == ["check data", "pull data"]


def test_wrong_secret_is_not_repeated(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-is-wrong")
    settings.cache_clear()
    with pytest.raises(TitaError) as caught:
        open_store().get("x")
    assert "hunter2" not in str(caught.value)


def test_empty_name_is_not_the_working_folder() -> None:
    with pytest.raises(TitaError, match="the store has no name"):
        open_store("")


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(TitaError, match="store: a file, not a store; name a directory"):
        open_store(str(tmp_path / "store"))


def test_an_address_of_s3_with_one_slash_is_no_folder() -> None:
    with pytest.raises(TitaError, match="no store for 's3:/bucket'; write s3://bucket/prefix"):
        open_store("s3:/bucket")


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(TitaError, match="write s3://bucket/prefix"):
        open_store("gs://bucket")


def test_interrupted_push_sends_only_missing_files(
    s3_environment: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.cache_clear()
    store = S3Store(s3_environment["TITA_STORE"])
    store.push_tree(folder, "data")
    store.delete("data/manifest.json")
    sent: list[str] = []
    put = store._bucket.put
    monkeypatch.setattr(
        store._bucket, "put", lambda key, data, **rest: sent.append(key) or put(key, data, **rest)
    )
    (folder / "empty").write_bytes(b"now it is not")
    store.push_tree(folder, "data")
    # The name has other content, which stays.
    (key,) = sent
    assert key.endswith("/empty")
    assert key != "data/empty"


def test_removed_files_stay_until_they_are_pruned_and_other_objects_stay(
    store: Store, folder: Path
) -> None:
    store.push_tree(folder, "data")
    store.put("data-other/empty", b"")
    (folder / "empty").unlink()
    store.push_tree(folder, "data")
    assert store.exists("data/empty")
    assert [one.state for one in store.prune("data", older_than=timedelta(days=1))] == ["recent"]
    assert store.exists("data/empty")
    (one,) = store.prune("data", older_than=timedelta(0))
    # In a directory, unchanged files are links to the same content.
    number = 4 if isinstance(store, DirectoryStore) else 1
    assert (one.tree, one.num_objects, one.size_bytes, one.state) == ("data", number, 0, "removed")
    assert not store.exists("data/empty")
    assert store.exists("data-other/empty")
    assert content(store.pull_tree("data")) == content(folder)


def test_pull_keeps_other_files(store: Store, folder: Path, tmp_path: Path) -> None:
    store.push_tree(folder, "data")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "own").write_text("mine")
    assert (store.pull_tree("data", into=tmp_path / "copy") / "own").read_text() == "mine"


@pytest.mark.parametrize("threshold_bytes", [8 << 20, 32 << 20])
def test_large_files_round_trip_with_and_without_parts(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold_bytes: int
) -> None:
    monkeypatch.setattr("tita.storage.upload.MULTIPART_THRESHOLD_BYTES", threshold_bytes)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "large").write_bytes(bytes(range(251)) * 70_000)
    store.push_tree(tmp_path / "tree", "data")
    assert content(store.pull_tree("data", into=tmp_path / "copy")) == content(tmp_path / "tree")


@pytest.mark.parametrize("uri", ["s3://key:hunter2@bucket/x", "s3://hunter2@bucket"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(TitaError, match="credentials") as caught:
        open_store(uri)
    assert "hunter2" not in str(caught.value)


def test_write_whose_response_was_lost_still_wins(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.cache_clear()
    store = S3Store(s3_environment["TITA_STORE"])
    assert store.put("first", b"", if_absent=True)
    client = store._bucket._client
    lost = [True]

    def lose_one(**_: object) -> None:
        if lost and lost.pop():
            raise EndpointConnectionError(endpoint_url="http://lost")

    client.meta.events.register("after-call.s3.PutObject", lose_one)
    assert store.put("lock", b"mine", if_absent=True)
    assert not lost
    assert not store.put("lock", b"mine", if_absent=True)
