"""The column `rejected_image` of pairs: read, validated, written, and refused if unused."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tita.data import read_pairs, read_questions, write_pairs
from tita.data.validate import ValidationSummary, validate_dataset
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.recipes import TrainRecipe
from tita.storage import open_store
from tita.train.training_data import read_inputs

ROW = {"id": "1", "image": "a.png", "question": "What is it?", "chosen": "a cat", "rejected": "no"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text(json.dumps(ROW | changes) + "\n")
    return path


def faults(path: Path) -> list[str]:
    found = validate_dataset(path, images=path.parent, summary=ValidationSummary())
    return [str(error) for error in found]


def test_it_is_read_and_written(folder: Path) -> None:
    path = write(folder, rejected_image="b")
    (pair,) = read_pairs(path)
    assert pair.rejected_image == "b.png"
    assert faults(path) == []
    path.write_bytes(write_pairs([pair]))
    assert list(read_pairs(path)) == [pair]
    (pair,) = read_pairs(write(folder, rejected_image=None))
    assert pair.rejected_image is None


def test_a_missing_or_wrong_image_is_an_error(folder: Path) -> None:
    (fault,) = faults(write(folder, rejected_image="c.png"))
    assert "c.png" in fault
    assert "pairs.jsonl:1" in fault
    (folder / "broken.png").write_text("no image")
    (fault,) = faults(write(folder, rejected_image="broken.png"))
    assert "broken.png" in fault
    (fault,) = faults(write(folder, rejected_image=["a.png", "b.png"]))
    assert "2 images in 'rejected_image'" in fault
    (fault,) = faults(write(folder, rejected_image="../b.png"))
    assert "leaves its folder" in fault


def test_a_question_has_none(folder: Path) -> None:
    path = folder / "questions.jsonl"
    row = {"id": "1", "image": "a.png", "question": "What is it?", "rejected_image": "b.png"}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(TitaError, match="not used in the question layout: 'rejected_image'"):
        list(read_questions(path))


def test_training_refuses_images_that_it_would_not_use(folder: Path) -> None:
    path, store = write(folder, rejected_image="b.png"), open_store(str(folder / "store"))

    def read(**changes: Any) -> Any:
        recipe = TrainRecipe(model=str(demo_model_path("reward")), pairs=str(path), **changes)
        return read_inputs(recipe, store=store)

    for changes in ({}, {"image_preference": {"negative": "other"}}):
        with pytest.raises(TitaError, match="1 of 1 pairs have a `rejected_image`"):
            read(**changes)
    assert read(ignore_columns=("rejected_image",)).pairs[0].rejected_image is None
    inputs = read(image_preference={"negative": "rejected_image"})
    assert [name for table in inputs.images.tables for name in table.names()] == ["a.png", "b.png"]
