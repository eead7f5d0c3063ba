"""Records and images that are read where they are, in every format that may store them."""

import base64
import csv
import json
import os
import pickle
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.data.test_embedded_images import image_bytes
from tita.data import open_dataset, read_pairs, record_table, row_cache, rows
from tita.data.image_table import image_content, image_file, image_sha256, open_picture
from tita.data.record_table import open_records, records_digest, take
from tita.errors import TitaError
from tita.records import ContextTurn, Pair, Question
from tita.settings import settings
from tita.storage import open_store
from tita.storage.cache import TreeCache
from tita.storage.sharded_push import push_in_shards

COLOURS = ("red", "green", "blue", "black", "white")
IMAGES = [image_bytes("PNG", colour=colour) for colour in COLOURS]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TITA_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    yield tmp_path / "cache"
    settings.cache_clear()


def pairs_of(images: list[Any]) -> list[dict[str, Any]]:
    return [
        {"id": f"{n}", "question": f"What is {n}?", "chosen": "a", "rejected": "b", "image": image}
        for n, image in enumerate(images)
    ]


def parquet(folder: Path, **options: Any) -> Path:
    stored = pairs_of([{"bytes": content, "path": None} for content in IMAGES])
    table = pyarrow.Table.from_pylist(stored)
    pyarrow.parquet.write_table(table, folder / "pairs.parquet", **{"row_group_size": 2} | options)
    return folder / "pairs.parquet"


def saved(folder: Path) -> Path:
    stored = pairs_of([{"bytes": content, "path": None} for content in IMAGES])
    table = datasets.Dataset.from_list(stored).cast_column("image", datasets.Image())
    table.select(range(4, -1, -1)).select(range(4, -1, -1)).save_to_disk(folder / "hf")
    return folder / "hf"


def json_lines(folder: Path) -> Path:
    coded = [f"data:image/png;base64,{base64.b64encode(content).decode()}" for content in IMAGES]
    lines = [json.dumps(row) for row in pairs_of(coded)]
    (folder / "pairs.jsonl").write_text("\n\n".join(lines))
    return folder / "pairs.jsonl"


def messages(folder: Path) -> Path:
    """Images inside of texts that hold JSON."""
    found = []
    for row, content in zip(pairs_of(IMAGES), IMAGES, strict=True):
        url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        parts.append({"type": "text", "text": row["question"]})
        prompt = json.dumps([{"role": "user", "content": parts}])
        found.append({"id": row["id"], "prompt": prompt, "chosen": "a", "rejected": "b"})
    (folder / "messages.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found))
    return folder / "messages.jsonl"


def table(folder: Path) -> Path:
    with (folder / "pairs.csv").open("w", newline="") as file:
        coded = [base64.b64encode(content).decode() for content in IMAGES]
        writer = csv.DictWriter(file, pairs_of([""])[0])
        writer.writeheader()
        writer.writerows(pairs_of(coded))
    return folder / "pairs.csv"


def one_group(folder: Path) -> Path:
    return parquet(folder, row_group_size=100)


@pytest.mark.parametrize("write", [parquet, saved, json_lines, messages, table, one_group])
def test_images_stay_in_rows_that_can_be_read_one_by_one(
    write: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if write is one_group:
        monkeypatch.setattr(rows, "MAX_GROUP_BYTES", 100)
    path = write(tmp_path)
    found = open_records(path, Pair)
    images = found.source()
    assert list(found) == list(open_dataset(path).pairs())
    # In any order, and again.
    for number in (3, 0, 4, 4, 1, 2):
        name = found[number].image
        assert image_content(images, name) == IMAGES[number]
        assert image_sha256(images, name) in name
        assert open_picture(images, name).size == (8, 8)
    is_written = write in (table, one_group)
    # `open_dataset` has written them to rows/images.
    written = list((cache / "rows").glob("*/images/*/*.png"))
    assert len(written) == (len(IMAGES) if is_written else 0)
    # Those who need a file get one.
    assert image_file(images, found[2].image).read_bytes() == IMAGES[2]


def test_threads_share_a_table(tmp_path: Path) -> None:
    found = open_records(parquet(tmp_path), Pair)
    images, names = found.source(), [pair.image for pair in found]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda name: image_content(images, name), names * 40))
    assert read == IMAGES * 40


def test_a_pickled_table_is_its_path(tmp_path: Path) -> None:
    """`datasets` pickles what its rows are made from, to hash it."""
    found = open_records(parquet(tmp_path), Pair)
    pickled = pickle.dumps((found, found.source()))
    assert len(pickled) < 1_000
    again, images = pickle.loads(pickled)
    assert list(again) == list(found)
    assert image_content(images, again[1].image) == IMAGES[1]


def test_a_row_that_changed_is_an_error(tmp_path: Path) -> None:
    path = parquet(tmp_path)
    found = open_records(path, Pair)
    reordered = pyarrow.parquet.read_table(path).to_pylist()[::-1]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(reordered), path, row_group_size=2)
    with pytest.raises(TitaError, match="has changed since it was read"):
        image_content(found.source(), found[0].image)


def test_a_line_that_changed_is_an_error(tmp_path: Path) -> None:
    path = json_lines(tmp_path)
    found = open_records(path, Pair)
    path.write_text(f"\n{path.read_text()}")
    with pytest.raises(TitaError, match="not the file that was read before"):
        image_content(found.source(), found[1].image)


def test_files_and_shards_and_rows_may_be_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(IMAGES[0])
    lines = pairs_of(["a", base64.b64encode(IMAGES[1]).decode()])
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    store = open_store(str(tmp_path / "store"))
    push_in_shards(store, folder, "x", shard_bytes=1 << 20)
    for root in (folder, tmp_path / "store/x"):
        found = open_records(root / "pairs.jsonl", Pair)
        assert found[0].image == "a.png"
        assert [image_content(found.source(), pair.image) for pair in found] == IMAGES[:2]
        assert open_records(root / "pairs.jsonl", Pair).facts == found.facts


def test_records_are_those_of_the_rows(tmp_path: Path) -> None:
    context = (
        ContextTurn(role="user", text="Hello", num_images=1),
        ContextTurn(role="assistant", text="Hi"),
    )
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    prompt = [{"role": turn.role, "content": turn.text} for turn in context]
    row = {**pairs_of(["a.png"])[0], "prompt": [*prompt, {"role": "user", "content": "Who?"}]}
    del row["question"]
    lines = [row, *pairs_of(["a.png"] * 1_100)[1:]]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found, wanted = open_records(path, Pair), list(read_pairs(path))
    assert wanted[0].context == context
    assert list(found) == wanted
    assert (found[-1], list(found[999:1_003])) == (wanted[-1], wanted[999:1_003])
    some = take(take(found, np.arange(0, 1_100, 3)), np.array([5, 1, 7]))
    assert list(some) == [some[n] for n in range(3)] == [wanted[n] for n in (15, 3, 21)]
    assert len({records_digest(each) for each in (found, some, take(found, np.arange(3)))}) == 3
    assert list(open_records(path, Pair, limit=2)) == wanted[:2]
    assert [question.text for question in open_records(path, Question, limit=1)] == ["Who?"]
    with pytest.raises(IndexError):
        found[1_100]


def test_rows_need_no_memory_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    peaks = []
    for number in (2_000, 4_000):
        for n in range(number):
            path = tmp_path / "images" / f"{n}.png"
            if not path.exists():
                path.hardlink_to(tmp_path / "images/0.png") if n else path.write_bytes(IMAGES[0])
        path = tmp_path / f"{number}.jsonl"
        lines = pairs_of([f"{n}.png" for n in range(number)])
        path.write_text("".join(f"{json.dumps(row)}\n" for row in lines))
        open_records(path, Pair, images=tmp_path / "images")
        before = pyarrow.total_allocated_bytes()
        tracemalloc.start()
        found = open_records(path, Pair, images=tmp_path / "images")
        some = take(found, np.arange(0, number, 2))
        assert sum(found.images.number(pair.image) == int(pair.id) for pair in some) == len(some)
        peaks.append(tracemalloc.get_traced_memory()[1] + pyarrow.total_allocated_bytes() - before)
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 2_000 < 50


def release(cache: Path) -> None:
    """As if this process had ended."""
    for path in [path for path in row_cache._held if path.is_relative_to(cache)]:
        os.close(row_cache._held.pop(path))


def test_the_cache_counts_and_evicts_rows(tmp_path: Path, cache: Path) -> None:
    path = parquet(tmp_path)
    open_records(path, Pair)
    (entry,) = TreeCache(cache).trees()
    assert (entry.origin, entry.in_use) == (f"rows of {path}", True)
    assert 0 < entry.size_bytes == TreeCache(cache).size_bytes()
    assert TreeCache(cache).prune(1 << 30) == 0
    release(cache)
    assert TreeCache(cache).prune(1 << 30) == entry.size_bytes
    assert not list((cache / "rows").iterdir())
    assert len(open_records(path, Pair)) == len(IMAGES)


def in_json(folder: Path) -> Path:
    coded = [f"data:image/png;base64,{base64.b64encode(content).decode()}" for content in IMAGES]
    lines = (json.dumps({"question": "What?", "image": image}) for image in coded)
    (folder / "q.jsonl").write_text("\n".join(lines))
    return folder / "q.jsonl"


def test_the_cache_counts_and_evicts_images_that_are_not_in_use(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(in_json(tmp_path))
    names = [str(question.image) for question in dataset.questions()]
    size = sum(map(len, IMAGES))
    (entry,) = TreeCache(cache).trees()
    assert (entry.origin, entry.in_use, entry.size_bytes) == ("images in rows", True, size)
    assert TreeCache(cache).size_bytes() == size
    assert TreeCache(cache).prune(1 << 30) == 0
    release(cache)
    monkeypatch.setenv("TITA_CACHE_MAX_GIB", str(2 * size / 2**30))
    settings.cache_clear()
    assert row_cache.hold_images() == dataset.images
    assert (dataset.images / names[0]).is_file()
    release(cache)
    monkeypatch.setenv("TITA_CACHE_MAX_GIB", str(size / 2 / 2**30))
    settings.cache_clear()
    assert not list(row_cache.hold_images().iterdir())
    assert [str(each.image) for each in open_dataset(tmp_path / "q.jsonl").questions()] == names
    assert (dataset.images / names[0]).is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to run as somebody without rights")
def test_images_of_a_read_only_cache_are_in_a_temporary_folder() -> None:
    code = (
        "import os; from tita.data.dataset import write_image\n"
        "from tita.data.row_cache import hold_images\n"
        "os.setuid(65534)\n"
        "print(hold_images() / write_image(b'image', into=hold_images()))\n"
    )
    # pytest's own folders are closed to other users.
    with tempfile.TemporaryDirectory() as name:
        cache, scratch = Path(name, "cache"), Path(name, "scratch")
        for folder, mode in ((Path(name), 0o755), (cache, 0o755), (scratch, 0o777)):
            folder.mkdir(exist_ok=True)
            folder.chmod(mode)
        folders = {"TITA_CACHE_DIR": str(cache), "TITA_SCRATCH_DIR": str(scratch)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | folders,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        written = Path(done.stdout.strip())
        assert written.is_relative_to(scratch / "tita-rows-65534"), done.stderr
        assert written.read_bytes() == b"image"


def test_a_prune_leaves_rows_that_are_being_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = record_table.read_rows

    def prune_meanwhile(path: Path) -> Iterator[rows.RawRow]:
        for row in read(path):
            TreeCache(cache).prune(1 << 30)
            yield row

    monkeypatch.setattr(record_table, "read_rows", prune_meanwhile)
    assert len(open_records(table(tmp_path), Pair)) == len(IMAGES)
    assert not list((cache / "rows").glob(".*"))


@pytest.mark.parametrize("name", ["facts.json", "images.json", "order.npy", "records.arrow"])
@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_a_damaged_entry_is_written_again(
    tmp_path: Path, cache: Path, name: str, content: bytes | None
) -> None:
    """As after a loss of power, or where a user has removed files."""
    path = parquet(tmp_path)
    wanted = list(open_records(path, Pair))
    (file,) = (cache / "rows").rglob(name)
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert list(open_records(path, Pair)) == wanted


def test_another_release_reads_the_rows_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path)
    open_records(path, Pair)
    monkeypatch.setattr(record_table, "_reader_digest", lambda: "another")
    monkeypatch.setattr(record_table, "read_rows", lambda _: iter(()))
    assert len(open_records(path, Pair)) == 0
