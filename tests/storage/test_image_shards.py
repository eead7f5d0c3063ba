"""Images in shards: found by the names that they have as files, and read by other tools."""

import json
import multiprocessing
import os
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
from tenacity import wait_none

from tita.cli.main import tita
from tita.data import dataset
from tita.data.dataset import find_image, read_pairs
from tita.errors import DamagedData, TitaError
from tita.settings import settings
from tita.storage import Store, image_shards, open_store, resolve
from tita.storage.image_shards import image_digest, image_version, is_image, read_image
from tita.storage.locate import check_exists
from tita.storage.manifest import sha256_of
from tita.storage.s3_bucket import Bucket
from tita.storage.sharded_push import push_in_shards
from tita.vlm.images import open_image

NUMBER = 40
NAMES = [f"images/{number:03}.jpg" for number in range(NUMBER)] + ["images/ü/Ä b.PNG", "top.jpg"]
SHARD_BYTES = 40_000
NOW = timedelta(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tita.storage.s3_client.retry.wait", wait_none())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs, and 42 images of about 4 kB."""
    root = tmp_path / "data"
    for number, name in enumerate(NAMES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.effect_noise((80, 60), 10 + number).save(path)
    rows = [
        {"image": name, "question": "What?", "chosen": "a", "rejected": "b"}
        for name in (*NAMES, "000", "images/001")
    ]
    (root / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return root


def push(store: Store, folder: Path, name: str = "x", **options: Any) -> Any:
    return push_in_shards(store, folder, name, shard_bytes=SHARD_BYTES, **options)


def shard_names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "shards").glob("*.tar"))


def test_images_are_found_and_read_as_files_are(store: Store, folder: Path) -> None:
    push(store, folder)
    root = resolve("x", store=store)
    assert not (root / "images").exists()
    assert len(shard_names(root)) > 3
    assert all(
        path.stat().st_size <= SHARD_BYTES + 10_240 for path in (root / "shards").glob("*.tar")
    )
    for name in NAMES:
        assert is_image(root / name)
        assert read_image(root / name) == (folder / name).read_bytes()
        assert image_digest(root / name) == sha256_of(folder / name)
        assert open_image(root / name).tobytes() == open_image(folder / name).tobytes()
    assert not is_image(root / "images/999.jpg")
    # Neither folder is there: the images are in shards.
    assert read_image(root / "images/ü/../../top.jpg") == (folder / "top.jpg").read_bytes()
    assert find_image("../top.jpg", images=root / "images") == "../top.jpg"
    assert not is_image(root / "images/../../top.jpg")
    assert not is_image(root / "images/\ud83d.jpg")
    with pytest.raises(TitaError, match="no such image"):
        open_image(root / "images/999.jpg")

    # Without the suffix, in a folder of images, and with the folder's own name.
    for wanted in ("000", "images/001", f"{folder.name}/images/002.jpg", "none", "ü/Ä b"):
        for images in (folder, folder / "images"):
            same = root / images.relative_to(folder)
            if images == folder and wanted.startswith(f"{folder.name}/"):
                continue  # the folder of a version in the store has another name
            assert find_image(wanted, images=same) == find_image(wanted, images=images), wanted
    assert list(read_pairs(root / "pairs.jsonl")) == list(read_pairs(folder / "pairs.jsonl"))
    images = resolve("x/images", store=store)
    assert read_image(images / "000.jpg") == (folder / "images/000.jpg").read_bytes()
    check_exists("x/images/ü", store=store)
    with pytest.raises(TitaError, match="neither a complete tree"):
        check_exists("x/other", store=store)
    with pytest.raises(TitaError, match="neither a complete tree"):
        resolve("x/other", store=store)


def test_other_tools_read_the_shards(store: Store, folder: Path, tmp_path: Path) -> None:
    push(store, folder)
    root = store.pull_tree("x", into=tmp_path / "copy")
    found: dict[str, bytes] = {}
    for name in shard_names(root):
        with tarfile.open(root / "shards" / name) as shard:
            for member in shard:
                opened = shard.extractfile(member)
                assert opened is not None
                found[member.name] = opened.read()
    assert found == {name: (folder / name).read_bytes() for name in NAMES}
    files = [str(root / "shards" / name) for name in shard_names(root)]
    rows = datasets.load_dataset(
        "webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "hf")
    )
    assert sorted(row["__key__"] for row in rows) == sorted(
        name.rpartition(".")[0] for name in NAMES
    )


def test_threads_and_forked_processes_read_the_same(folder: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    push(store, folder)
    root = store.pull_tree("x")
    wanted = [(folder / name).read_bytes() for name in NAMES]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read_image, [root / name for name in NAMES])) == wanted
    with multiprocessing.get_context("fork").Pool(2) as processes:
        assert processes.map(read_image, [root / name for name in NAMES]) == wanted


def test_same_images_give_the_same_tree(folder: Path, tmp_path: Path) -> None:
    one, two = (open_store(str(tmp_path / name)) for name in ("one", "two"))
    first = push(one, folder)
    for name in NAMES:
        os.utime(folder / name, (1, 1))
    assert push(two, folder).digest == first.digest


def test_new_image_changes_few_shards(folder: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    before = {file.sha256 for file in push(store, folder).files}
    PIL.Image.effect_noise((80, 60), 99).save(folder / "images" / "0005.jpg")
    after = [file.sha256 for file in push(store, folder).files if file.path.endswith(".tar")]
    assert len(after) > 3
    assert len(set(after) - before) <= 2


def test_files_beside_shards_come_first(folder: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    push(store, folder)
    root = store.pull_tree("x", into=tmp_path / "copy")
    (root / "images").mkdir()
    (root / NAMES[0]).write_bytes(b"new")
    assert read_image(root / NAMES[0]) == b"new"
    assert read_image(root / NAMES[1]) == (folder / NAMES[1]).read_bytes()


def test_damaged_shard_is_refused_by_name_and_digest(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path / "store"))
    push(store, folder)
    root = store.pull_tree("x", into=tmp_path / "copy")
    found = image_shards.find_shards(root)
    assert found is not None
    image = found.find(root / NAMES[3])
    assert image is not None
    shard = root / "shards" / image.shard
    digest, content = sha256_of(shard), bytearray(shard.read_bytes())
    content[image.position + 100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedData, match=f"{image.shard}' with SHA-256 {digest} is damaged"):
        open_image(root / NAMES[3])
    with pytest.raises(SystemExit) as ended:
        tita(["data", "validate", str(root)])
    assert ended.value.code == 2
    assert f"the shard '{image.shard}' with SHA-256 {digest} is damaged" in capsys.readouterr().out
    # A pull replaces it, and a pull from a store that has such a shard refuses it.
    store.pull_tree("x", into=root)
    assert read_image(root / NAMES[3]) == (folder / NAMES[3]).read_bytes()
    stored = store.pull_tree("x") / "shards" / image.shard
    stored.write_bytes(content)
    with pytest.raises(DamagedData, match=image.shard):
        store.pull_tree("x", into=tmp_path / "other")
    shard.unlink()
    with pytest.raises(DamagedData, match="is missing"):
        open_image(root / NAMES[3])


def test_stray_index_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with image_shards.sqlite3.connect(tmp_path / "shards" / "index.sqlite") as other:
        other.execute("CREATE TABLE images (path TEXT)")
    assert not is_image(tmp_path / "a.jpg")


def run(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tita(words)
    assert not ended.value.code


def test_validate_pull_ls_and_prune(
    store: Store, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["data", "push", str(folder), "x", "--shard", "--shard-mib", "1"])
    assert f"files with {len(NAMES)} images in shards" in capsys.readouterr().err
    run(["data", "pull", "x", str(tmp_path / "copy")])
    run(["data", "validate", str(tmp_path / "copy")])
    assert f"{len(NAMES)} images, 0 errors" in capsys.readouterr().err
    run(["data", "ls", "-o", "json"])
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["tree"], listed["files"]) == ("x", 3)
    for name in NAMES[:3]:
        (folder / name).unlink()
    run(["data", "push", str(folder), "x", "--shard", "--shard-mib", "1"])
    store.prune("x", older_than=NOW)
    assert not is_image(store.pull_tree("x", into=tmp_path / "copy") / NAMES[0])
    assert read_image(tmp_path / "copy" / NAMES[3]) == (folder / NAMES[3]).read_bytes()
    assert store.find_unused("x", older_than=NOW) == []


def test_pulled_shards_are_pushed_as_they_are(store: Store, folder: Path, tmp_path: Path) -> None:
    meta = push(store, folder).meta
    store.pull_tree("x", into=tmp_path / "copy")
    run(["data", "push", str(tmp_path / "copy"), "y"])
    pushed = store.read_manifest("y")
    assert pushed is not None
    assert pushed.meta == meta
    check_exists("y/images", store=store)
    store.push_tree(tmp_path / "copy", "z")  # as a job does
    check_exists("z/images", store=store)
    assert read_image(resolve("z/images", store=store) / "000.jpg")
    with pytest.raises(TitaError, match="neither a complete tree"):
        resolve("z/other", store=store)
    assert image_shards.describe_folder(tmp_path / "copy" / "shards") == {}


def test_name_in_other_case_is_reported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path / "store"))
    push(store, folder)
    root = store.pull_tree("x", into=tmp_path / "copy")
    row = {"image": "images/000.JPG", "question": "?", "chosen": "a", "rejected": "b"}
    (root / "pairs.jsonl").write_text(f"{json.dumps(row)}\n")
    with pytest.raises(SystemExit):
        tita(["data", "validate", str(root / "pairs.jsonl")])
    assert "no such image: 'images/000.JPG', but there is '000.jpg'" in capsys.readouterr().out


def test_push_that_would_remove_most_images_is_refused(store: Store, folder: Path) -> None:
    store.push_tree(folder, "x")
    push(store, folder, max_removed=0.5)
    for name in NAMES[:30]:
        (folder / name).unlink()
    with pytest.raises(TitaError, match="the push would remove 30 of 43 files"):
        push(store, folder, max_removed=0.5)
    push(store, folder)


def test_what_cannot_be_packed_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TitaError, match="no images to pack"):
        push(store, tmp_path / "empty")
    push(store, folder)
    with pytest.raises(TitaError, match="the store is inside the folder"):
        push(open_store(str(folder / "store")), folder)
    copy = store.pull_tree("x", into=tmp_path / "copy")
    PIL.Image.new("RGB", (8, 8)).save(copy / "new.png")
    with pytest.raises(TitaError, match="there is a folder 'shards' already"):
        push(store, copy)
    with pytest.raises(TitaError, match="of this folder are in shards of their tree; pull 'x'"):
        tita_find(store, "x/images")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(TitaError, match=r"GiB, and 0\.0 are free"):
        push(store, folder)


def tita_find(store: Store, name: str) -> object:
    from tita.storage.locate import find_tree

    return find_tree(store, name)


def test_interrupted_push_sends_only_what_is_missing(
    s3_environment: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.cache_clear()
    store = open_store(os.environ["TITA_STORE"])
    sent: list[str] = []
    put, counting, limit = Bucket.put, threading.Lock(), 3

    def counted(bucket: Bucket, key: str, data: bytes, **options: Any) -> None:
        if key.startswith("x/shards/"):
            # Several threads send.
            with counting:
                if len(sent) == limit:
                    raise TitaError("killed")
                sent.append(key)
        put(bucket, key, data, **options)

    monkeypatch.setattr(Bucket, "put", counted)
    with pytest.raises(TitaError, match="killed"):
        push(store, folder)
    first = list(sent)
    assert len(first) == limit
    sent.clear()
    limit = sys.maxsize
    push(store, folder)
    assert sent
    assert not set(first) & set(sent)
    assert not any((settings().cache_dir / "packing").iterdir())


def test_pull_requests_shards_and_not_images(
    s3_environment: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.cache_clear()
    store = open_store(os.environ["TITA_STORE"])
    push(store, folder)
    keys: list[str] = []
    read_range = Bucket.read_range

    def counted(bucket: Bucket, key: str, **options: Any) -> Any:
        keys.append(key)
        return read_range(bucket, key, **options)

    monkeypatch.setattr(Bucket, "read_range", counted)
    root = store.pull_tree("x")
    assert all(is_image(root / name) for name in NAMES)
    # The shards, their index, and the pairs.
    assert len(keys) == len(shard_names(root)) + 2


def test_version_changes_with_the_content_only(folder: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    push(store, folder)
    root = store.pull_tree("x")
    before = image_version(root / NAMES[0]), image_version(root / NAMES[1])
    PIL.Image.effect_noise((80, 60), 99).save(folder / NAMES[0])
    push(store, folder)
    root = store.pull_tree("x")
    after = image_version(root / NAMES[0]), image_version(root / NAMES[1])
    assert (before[0] != after[0], before[1] == after[1]) == (True, True)
    with pytest.raises(OSError, match="No such file"):
        image_version(root / "none.jpg")


def test_every_suffix_of_an_image_name_is_packed() -> None:
    assert {suffix.lower() for suffix in dataset._IMAGE_SUFFIXES} <= image_shards.PACKED_SUFFIXES
