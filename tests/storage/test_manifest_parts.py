"""Manifests of large trees, which are in parts, and of small ones, which are as they were."""

import gzip
import json
import os
import re
import shutil
import tracemalloc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from tenacity import wait_none

from tita.errors import DamagedData, TitaError
from tita.storage import Store, manifest, open_store, resolve
from tita.storage.locate import check_exists, find_tree
from tita.storage.manifest import FilesInParts, Manifest, ManifestFile
from tita.storage.s3_bucket import Bucket
from tita.storage.s3_store import S3Store
from tita.storage.store import list_trees, read_file

NOW = timedelta(0)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PART_FILES", 10)
    monkeypatch.setattr("tita.storage.s3_client.retry.wait", wait_none())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """35 files in two folders, and one above."""
    root = tmp_path / "tree"
    for number in range(34):
        path = root / ("a" if number < 20 else "b") / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content {number}")
    (root / "rows.jsonl").write_text("{}\n")
    return root


def content(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".tita-" not in path.as_posix() and path.name != "manifest.json"
    }


def parts_of(store: Store, tree: str) -> list[str]:
    body = json.loads(store.get(f"{tree}/manifest.json"))
    assert body["version"] == 3
    return [part["key"] for part in body["parts"]]


def test_large_tree_is_read_as_a_small_one_is(store: Store, folder: Path, tmp_path: Path) -> None:
    pushed = store.push_tree(folder, "data/x", meta={"of": "me"})
    keys = parts_of(store, "data/x")
    lines = [gzip.decompress(store.get(f"data/x/{key}")).splitlines() for key in keys]
    assert [len(some) for some in lines] == [10, 10, 10, 5]
    assert json.loads(lines[0][3])["path"] == "a/03.txt"

    read = store.read_manifest("data/x")
    assert read is not None
    assert isinstance(read.files, FilesInParts)
    assert read == pushed
    assert (len(read.files), read.meta) == (35, {"of": "me"})
    in_memory = Manifest(files=tuple(read.files))
    assert (read.digest, read.size_bytes) == (in_memory.digest, in_memory.size_bytes)
    assert [name for name, _ in list_trees(store)] == ["data/x"]

    assert content(store.pull_tree("data/x", into=tmp_path / "all")) == content(folder)
    assert content(store.pull_tree("data/x", into=tmp_path / "b", folder="b")) == content(
        folder / "b"
    )
    assert resolve("data/x/b/20.txt", store=store).read_text() == "content 20"
    assert find_tree(store, "data/x/b") == ("data/x", "b")
    assert read_file(store, "data/x", "b/33.txt", manifest=read) == b"content 33"
    assert read_file(store, "data/x", "b/99.txt", manifest=read) is None
    check_exists("data/x/rows.jsonl", store=store)
    with pytest.raises(TitaError, match="neither a complete tree"):
        check_exists("data/x/c", store=store)


def test_later_push_shares_parts_and_prune_removes_the_others(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    store.push_tree(folder, "x")
    before = parts_of(store, "x")
    assert store.find_unused("x", older_than=NOW) == []
    (folder / "rows.jsonl").write_text("{}\n{}\n")
    store.push_tree(folder, "x")
    after = parts_of(store, "x")
    if store.uri.startswith("s3:"):
        # In a directory all files move to the folder of the new version.
        assert (before[:3], before[3] != after[3]) == (after[:3], True)
    store.prune("x", older_than=NOW)
    for key in set(before) - set(after):
        with pytest.raises(TitaError, match="no such object"):
            store.get(f"x/{key}")
    assert content(store.pull_tree("x", into=tmp_path / "copy")) == content(folder)
    assert store.find_unused("x", older_than=NOW) == []


def test_pull_into_a_copy_of_a_tree(folder: Path, tmp_path: Path) -> None:
    """Its manifest is taken for the record of an earlier pull, whose parts cannot be read."""
    store = open_store(str(tmp_path / "store"))
    store.push_tree(folder, "x")
    shutil.copytree(tmp_path / "store" / "x", tmp_path / "copy")
    assert content(store.pull_tree("x", into=tmp_path / "copy")) == content(folder)


def test_same_content_is_pushed_once(store: Store, folder: Path) -> None:
    one, two = (store.push_tree(folder, "x") for _ in range(2))
    assert one.digest == two.digest
    assert store.find_unused("x", older_than=NOW) == []


def test_hashing_many_files_takes_little_memory_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that waits for a thread takes more than its entry in the manifest."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(manifest, "sha256_of", lambda path: f"{hash(path):064x}")
    tracemalloc.start()
    try:
        built = manifest.build_manifest(tmp_path, paths=["file"] * 6000)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(built.files) == 6000
    assert peak_bytes / 6000 < 1000


@pytest.mark.parametrize("damage", ["missing", "damaged", "header"])
def test_damage_is_named_and_the_next_push_heals_it(
    store: Store, folder: Path, tmp_path: Path, damage: str
) -> None:
    store.push_tree(folder, "x")
    key = parts_of(store, "x")[1]
    if damage == "missing":
        store.delete(f"x/{key}")
    elif damage == "damaged":
        store.put(f"x/{key}", store.get(f"x/{parts_of(store, 'x')[0]}"))
    else:
        key = "manifest.json"
        header = store.get(f"x/{key}").replace(b'"num_files": 10', b'"num_files": 11', 1)
        store.put(f"x/{key}", header)
    with pytest.raises(DamagedData, match="manifest") as error:
        store.pull_tree("x", into=tmp_path / "copy")
    assert damage == "header" or key in str(error.value)
    store.push_tree(folder, "x")
    assert content(store.pull_tree("x", into=tmp_path / "copy")) == content(folder)


def test_prune_keeps_all_of_a_damaged_tree_and_goes_on(
    store: Store, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    trees = {"runs/x": small, "runs/x/checkpoints/1/node-0": folder, "runs/y": small}
    trees |= {"runs/x/checkpoints/2/node-0": small}
    for name, source in trees.items():
        for text in ("old", "new"):
            (source / "changed").write_text(text)
            store.push_tree(source, name)
    first, second = (f"runs/x/checkpoints/{number}/node-0" for number in (1, 2))
    store.delete(f"{first}/{parts_of(store, first)[-1]}")
    store.put(f"{second}/manifest.json", b"{")
    found = store.prune("runs", older_than=NOW)
    assert [one.tree for one in found] == ["runs/x", "runs/y"]
    said = capsys.readouterr().err
    for name, what in ((first, "is missing"), (second, "invalid manifest")):
        assert re.search(rf"skipped \S*{name}/manifest.json: .*{what}", said)
    if isinstance(store, S3Store):
        keys = [entry.key for entry in store._bucket.list_objects("runs/")]
        left = {key: store.get(key) for key in keys}
    else:
        files = [path for path in Path(store.uri).rglob("*") if path.is_file()]
        left = {path.relative_to(store.uri).as_posix(): path.read_bytes() for path in files}
    for name, number in ((first, 2), (second, 2), ("runs/x", 1), ("runs/y", 1)):
        inside = rf"{name}/(\.tita-\w+/)?changed"
        assert sum(bool(re.fullmatch(inside, key)) for key in left) == number, name


def test_push_that_fails_after_its_parts_leaves_nothing_after_a_prune(
    s3_environment: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(os.environ["TITA_STORE"])
    store.push_tree(folder, "x")
    (folder / "a" / "00.txt").write_text("other")
    unchanged = Bucket.put_if_unchanged

    def fail(bucket: Bucket, key: str, data: bytes, *, etag: str | None) -> bool:
        if key == "x/manifest.json" and monkeypatch_is_on:
            raise TitaError("killed")
        return unchanged(bucket, key, data, etag=etag)

    monkeypatch_is_on = True
    monkeypatch.setattr(Bucket, "put_if_unchanged", fail)
    with pytest.raises(TitaError, match="killed"):
        store.push_tree(folder, "x")
    monkeypatch_is_on = False
    (unused,) = store.find_unused("x", older_than=NOW)
    assert unused.num_objects == 2  # the file and the part that lists it
    store.prune("x", older_than=NOW)
    assert store.find_unused("x", older_than=NOW) == []
    assert len(list(require(store).files)) == 35


def require(store: Store) -> Manifest:
    found = store.read_manifest("x")
    assert found is not None
    return found


@pytest.fixture
def part_requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    keys: list[str] = []
    get: Callable[[Bucket, str], bytes] = Bucket.get

    def counted(bucket: Bucket, key: str) -> bytes:
        keys.append(key)
        return get(bucket, key)

    monkeypatch.setattr(Bucket, "get", counted)
    return keys


def test_node_requests_each_part_once(
    s3_environment: None, folder: Path, tmp_path: Path, part_requests: list[str]
) -> None:
    store = open_store(os.environ["TITA_STORE"])
    store.push_tree(folder, "x")
    part_requests.clear()
    for number in range(2):
        assert len(list(require(store).files)) == 35
        store.pull_tree("x", into=tmp_path / f"{number}")
        assert len(content(store.pull_tree("x"))) == 35
    wanted = [key for key in part_requests if key.endswith(".jsonl.gz")]
    assert sorted(wanted) == sorted(f"x/{key}" for key in parts_of(store, "x"))


def test_folder_reads_only_the_parts_that_have_it(
    s3_environment: None, folder: Path, part_requests: list[str]
) -> None:
    store = open_store(os.environ["TITA_STORE"])
    store.push_tree(folder, "x")
    part_requests.clear()
    assert len(require(store).below("b").files) == 14
    assert require(store).find("a/15.txt") is not None
    wanted = [key for key in part_requests if key.endswith(".jsonl.gz")]
    assert sorted(wanted) == sorted(f"x/{key}" for key in parts_of(store, "x")[1:])


FILES = (
    ManifestFile(path="a.txt", size_bytes=1, sha256="0" * 64),
    ManifestFile(path="b", size_bytes=2, sha256="1" * 64, key=".tita-0/b", etag='"e"'),
)
SMALL = """{
 "version": 2,
 "push": "p",
 "digest": "c38c157b6ef8c016d54e7b01618570b7747210394b2a64cf7fb19ba1a093296e",
 "files": [
  {
   "path": "a.txt",
   "size_bytes": 1,
   "sha256": "0000000000000000000000000000000000000000000000000000000000000000"
  },
  {
   "path": "b",
   "size_bytes": 2,
   "sha256": "1111111111111111111111111111111111111111111111111111111111111111",
   "key": ".tita-0/b",
   "etag": "\\"e\\""
  }
 ],
 "meta": {
  "of": "me"
 }
}"""


def test_small_manifest_has_the_bytes_that_it_had() -> None:
    small = Manifest(files=FILES, meta={"of": "me"}, push="p")
    assert small.to_json().decode() == SMALL
    assert Manifest.from_json(SMALL.encode(), where="") == small


def test_large_manifest_of_an_earlier_version_is_read(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "PART_FILES", 100)
    store.push_tree(folder, "x")
    monkeypatch.setattr(manifest, "PART_FILES", 10)
    assert isinstance(require(store).files, tuple)
    assert content(store.pull_tree("x", into=tmp_path / "copy")) == content(folder)
    (folder / "a" / "00.txt").write_text("other")
    store.push_tree(folder, "x")
    assert len(parts_of(store, "x")) == 4
    assert content(store.pull_tree("x", into=tmp_path / "copy")) == content(folder)
