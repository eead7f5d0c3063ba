"""Training on Parquet with images, and on rows that are mapped into memory."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoProcessor

from tests.train.comparing import largest_difference
from tests.train.test_preflight import check, recipe_of
from tita.data import read_pairs
from tita.settings import settings
from tita.train.collators import PairCollator
from tita.train.training_data import TrainInputs, make_dataset

Start = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TITA_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    yield tmp_path / "cache"
    settings.cache_clear()


def write_parquet(data: Any, path: Path, **options: Any) -> Path:
    rows = [json.loads(line) for line in data.pairs.read_text().splitlines()]
    for row in rows:
        content = (data.images / row.pop("image_id")).read_bytes()
        row["image"] = {"bytes": content, "path": None}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def batches_of(inputs: TrainInputs) -> list[dict[str, Any]]:
    processor = AutoProcessor.from_pretrained(inputs.model)
    rows = make_dataset(
        inputs.pairs,
        images=inputs.images,
        processor=processor,
        image_aspect=inputs.image_aspect,
        negatives=inputs.negatives,
    )
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    collate = PairCollator(processor, image_token=4)
    return [collate([rows[i] for i in order[n : n + 4]]) for n in range(0, len(order), 4)]


@pytest.mark.parametrize("negative", [None, "other", "crop"])
def test_batches_of_parquet_are_those_of_files(
    data: Any, tmp_path: Path, lone_rank: None, own_cache: Path, negative: str | None
) -> None:
    terms = {"image_preference": {"weight": 1.0, "negative": negative}} if negative else {}
    by_files = check(recipe_of(data, batch_size=4, **terms), tmp_path)
    stored = write_parquet(data, tmp_path / "pairs.parquet", row_group_size=7)
    by_rows = check(
        recipe_of(data, pairs=str(stored), images=None, batch_size=4, **terms), tmp_path
    )
    assert not (own_cache / "rows" / "images").exists(), "images were unpacked"
    assert {*by_rows.image_digests.values()} == {*by_files.image_digests.values()}
    for found, wanted in zip(batches_of(by_rows), batches_of(by_files), strict=True):
        assert found.keys() == wanted.keys()
        # Which negative image a pair has depends on the images' names, which differ.
        for name in ("input_ids",) if negative else wanted:
            assert torch.equal(found[name], wanted[name]), name


@pytest.mark.slow
def test_a_run_on_parquet_ends_with_the_same_weights(
    start: Start, undisturbed: Path, data: Any, tmp_path: Path
) -> None:
    stored = write_parquet(data, tmp_path / "pairs.parquet", row_group_size=7)
    cache = tmp_path / "workers-cache"
    ended = start(
        tmp_path, pairs=str(stored), images=None, env={"TITA_CACHE_DIR": str(cache)}
    ).finish()
    assert ended.code == 0, ended.text
    assert [path.name for path in cache.iterdir()] == ["rows"]
    assert largest_difference(undisturbed / "runs/a/model", tmp_path / "runs/a/model") <= 1e-6


@pytest.mark.parametrize("num_rows", [100, pytest.param(5_000, marks=pytest.mark.soak)])
def test_a_start_on_parquet_writes_less_than_a_hundredth(
    data: Any, tmp_path: Path, lone_rank: None, own_cache: Path, num_rows: int
) -> None:
    noise = np.random.default_rng(0)
    with pyarrow.parquet.ParquetWriter(tmp_path / "pairs.parquet", schema()) as writer:
        for first in range(0, num_rows, 50):
            rows = [
                {
                    "id": f"{number}",
                    "question": f"What is at {number}?",
                    "chosen": "A man walks a dog along the beach.",
                    "rejected": "A man rides a horse.",
                    "image": {"bytes": jpeg(noise), "path": None},
                }
                for number in range(first, first + 50)
            ]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema()))
    before = written()
    recipe = recipe_of(data, pairs=str(tmp_path / "pairs.parquet"), images=None, batch_size=4)
    inputs = check(recipe, tmp_path)
    rows = make_dataset(
        inputs.pairs,
        images=inputs.images,
        processor=AutoProcessor.from_pretrained(inputs.model),
        image_aspect=inputs.image_aspect,
    )
    assert rows[num_rows - 1]["pictures"][0].size == (320, 320)
    data_bytes = (tmp_path / "pairs.parquet").stat().st_size
    assert data_bytes > 48_000 * num_rows
    assert size_of(own_cache) + size_of(tmp_path / "store") < 0.01 * data_bytes
    # Also what was deleted again.
    assert written() - before < 0.01 * data_bytes + 50_000


def schema() -> pyarrow.Schema:
    text = pyarrow.string()
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])
    names = ("id", "question", "chosen", "rejected")
    return pyarrow.schema([*((name, text) for name in names), ("image", image)])


def jpeg(noise: np.random.Generator) -> bytes:
    file = io.BytesIO()
    pixels = noise.integers(0, 256, (320, 320, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=60)
    return file.getvalue()


def written() -> int:
    """Bytes that this process has passed to `write`."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["wchar"])


def test_rows_are_read_again_when_anything_has_changed(
    data: Any, tmp_path: Path, lone_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    shutil.copytree(data.images, images)
    pairs = tmp_path / "pairs.jsonl"
    shutil.copy(data.pairs, pairs)
    recipe = recipe_of(data, pairs=str(pairs), images=str(images), batch_size=4)
    first = check(recipe, tmp_path)
    assert list(first.pairs) == list(read_pairs(pairs))
    with monkeypatch.context() as patch:
        patch.setattr("tita.data.record_table.read_rows", None)
        assert list(check(recipe, tmp_path).pairs) == list(first.pairs)
    # A row, and an image that is found before the one of another name.
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[0]["question"] = "And what is this?"
    pairs.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    changed = check(recipe, tmp_path)
    assert changed.pairs[0].question == "And what is this?"
    assert list(changed.pairs)[1:] == list(first.pairs)[1:]
    gone = images / changed.pairs[3].image
    gone.rename(gone.with_suffix(".jpg"))
    with pytest.raises(Exception, match=f"{gone.name}: no such image"):
        check(recipe, tmp_path)
