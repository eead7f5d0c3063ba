"""Lengths of rows from image headers equal the processor's, and are measured once."""

import io
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.families import FAMILIES, built
from tita.data.image_table import ImageSource, ImageTable, ImageTableWriter
from tita.data.lengths import LengthLimit
from tita.data.rows import RawRow
from tita.errors import TitaError
from tita.records import ContextTurn, Pair, Question
from tita.storage import open_store
from tita.storage.manifest import sha256_of
from tita.train import measures
from tita.train.measures import RowMeasures, measure_rows, to_fields
from tita.train.training_data import RowFormatter, RowLength, count_tokens
from tita.vlm.images import open_image, read_size

SIZES = (40, 40), (90, 50), (50, 90), (300, 40)


@pytest.fixture
def records(tmp_path: Path) -> list[Pair | Question]:
    images = tmp_path / "images"
    images.mkdir()
    for number, size in enumerate(SIZES):
        Image.effect_noise(size, 50).convert("RGB").save(images / f"{number}.png")
    turned = Image.effect_noise((90, 50), 50).convert("RGB")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(images / "turned.jpg", exif=exif)
    names = [*(f"{number}.png" for number in range(len(SIZES))), "turned.jpg"]
    context = (
        ContextTurn(role="user", text="Hello"),
        ContextTurn(role="assistant", text="What do you want to know?"),
    )
    found: list[Pair | Question] = []
    for number, name in enumerate(names):
        pair = Pair(
            id=f"{number}",
            image=name,
            question="What is it?" + " Tell me." * number,
            chosen="A dog" * (number + 1),
            rejected="A cat and a dog",
            rejected_image=names[number - 1] if number % 2 else None,
        )
        found += [pair, replace(pair, context=context)]
    found.append(Question(id="q", text="Which?", image=names[1], references=("This one", "No")))
    return found


def images_of(records: list[Pair | Question], tmp_path: Path) -> ImageSource:
    folder = tmp_path / "images"
    table = tmp_path / f"table-{uuid.uuid4().hex}"
    table.mkdir()
    writer = ImageTableWriter(table, folder=folder)
    row = RawRow(where="row", file=folder / "rows", id="row", content={})
    for record in records:
        writer.resolve(str(record.image), row)
        if isinstance(record, Pair) and record.rejected_image is not None:
            writer.resolve(record.rejected_image, row)
    writer.close()
    return ImageSource(tables=(ImageTable(table),), folder=folder)


def lengths_of(found: RowMeasures) -> list[RowLength]:
    return [
        RowLength(total=total, image=image, other_image=None if other < 0 else other)
        for total, image, other in found.lengths[0].tolist()
    ]


def measure(records: list[Pair | Question], tmp_path: Path, processor: Any) -> RowMeasures:
    return measure_rows(
        [records],
        images=images_of(records, tmp_path),
        aspect="keep",
        model="some/model",
        processor=processor,
        store=open_store(str(tmp_path / "store")),
    )


def counted(records: list[Pair | Question], tmp_path: Path, processor: Any) -> list[RowLength]:
    rows = RowFormatter(images=tmp_path / "images", processor=processor, image_aspect="keep")
    formatted = (rows.format_row(to_fields(record)) for record in records)
    return list(count_tokens(formatted, processor=processor))


@pytest.mark.parametrize("family", [*sorted(FAMILIES), "ovis2"])
def test_lengths_and_digests_are_those_of_the_processor_and_the_files(
    records: list[Pair | Question],
    family: str,
    tmp_path: Path,
    lone_rank: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, processor = built(family)
    found = measure(records, tmp_path, processor)
    assert lengths_of(found) == counted(records, tmp_path, processor)
    assert found.digests == {path.name: sha256_of(path) for path in (tmp_path / "images").iterdir()}
    assert "counting all" not in capsys.readouterr().err
    # The second start opens no image, and counts no token.
    with monkeypatch.context() as patch:
        patch.setattr(measures, "read_size", None)
        patch.setattr(measures, "LengthLimit", None)
        again = measure(records, tmp_path, processor)
    assert (lengths_of(again), again.digests) == (lengths_of(found), found.digests)
    assert "read from the store" in capsys.readouterr().err


def test_what_changes_is_measured_again(
    records: list[Pair | Question],
    tmp_path: Path,
    lone_rank: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, processor = built(sorted(FAMILIES)[0])
    # A processor that gives other tokens to an image than its size tells is counted in full.
    with monkeypatch.context() as patch:
        patch.setattr(LengthLimit, "count_image", lambda *_: 1)
        found = measure(records, tmp_path, processor)
    assert lengths_of(found) == counted(records, tmp_path, processor)
    assert "counting all" in capsys.readouterr().err
    Image.effect_noise((200, 100), 50).convert("RGB").save(tmp_path / "images/0.png")
    found = measure(records, tmp_path, processor)
    assert lengths_of(found) == counted(records, tmp_path, processor)
    assert found.digests["0.png"] == sha256_of(tmp_path / "images/0.png")
    longer = [replace(records[0], question="What is it then?"), *records[1:]]
    assert lengths_of(measure(longer, tmp_path, processor)) == counted(longer, tmp_path, processor)
    assert "read from the store" not in capsys.readouterr().err
    (stored, *_) = (tmp_path / "store/cache/lengths").iterdir()
    for one in (tmp_path / "store/cache/lengths").iterdir():
        one.write_bytes(stored.read_bytes()[:100])
    with pytest.raises(TitaError, match="delete it"):
        measure(records, tmp_path, processor)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_sizes_are_those_of_the_decoded_image(kind: str) -> None:
    image = Image.effect_noise((90, 50), 50).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = 8
    for options in ({}, {"exif": exif}):
        if options and kind in ("GIF", "BMP"):
            continue
        file = io.BytesIO()
        image.save(file, kind, **options)
        data = file.getvalue()
        expected = (50, 90) if options else (90, 50)
        assert read_size(data, where="x") == open_image(data).size == expected
        for cut in (data[:-40], data[: len(data) // 2]):
            try:
                size = open_image(cut).size
            except TitaError as error:
                with pytest.raises(TitaError, match=error.what):
                    read_size(cut, where="x")
            else:
                assert read_size(cut, where="x") == size
