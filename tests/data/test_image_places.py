"""Images at their places inside a text, for every command that reads rows."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tita.bench.questions import BenchmarkItem, read_items
from tita.bench.request_body import request_body
from tita.data import open_dataset
from tita.errors import TitaError
from tita.records import ContextTurn
from tita.vlm.prompts import to_turns


def read(folder: Path, row: dict[str, Any]) -> BenchmarkItem:
    for name in ("0.png", "1.png"):
        PIL.Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "q.jsonl").write_text(json.dumps(row) + "\n")
    (item,) = read_items(folder / "q.jsonl")
    return item


@pytest.mark.parametrize(
    "question",
    [
        "Is <image> darker than <image>?",
        "Is <ImageHere> darker than <|vision_start|><|image_pad|><|vision_end|>?",
        "Is <image 1> darker than <image 2>?",
    ],
)
def test_images_between_words(question: str, tmp_path: Path) -> None:
    item = read(tmp_path, {"text": question, "images": ["0.png", "1.png"], "answer": "no"})
    assert item.text == "Is <image> darker than <image>?"
    body = request_body(item, model_id="m", images=tmp_path, fields={})
    parts = body["messages"][0]["content"]
    kinds = [part.get("text", part["type"]) for part in parts]
    assert kinds == ["Is ", "image_url", " darker than ", "image_url", "?"]
    first, second = (PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    (turn,) = to_turns((), item.text, (first, second))
    assert turn.parts == ("Is ", first, " darker than ", second, "?")


def test_content_parts_keep_their_order(tmp_path: Path) -> None:
    content = [
        {"type": "text", "text": "First"}, {"type": "image"}, {"type": "text", "text": "then"},
        {"type": "image"}, {"type": "text", "text": "which is it?"},
    ]  # fmt: skip
    row = {"messages": [{"role": "user", "content": content}], "images": ["0.png", "1.png"]}
    item = read(tmp_path, row)
    (turn,) = to_turns((), item.text, ("A", "B"))  # type: ignore[arg-type]
    assert [part.strip() for part in turn.parts] == ["First", "A", "then", "B", "which is it?"]


@pytest.mark.parametrize("text", ["<image>\nWhat is it?", "What is it?<image>", "What is it?"])
def test_a_single_image_comes_before_the_text(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, {"text": text, "image": "0.png"}).text == "What is it?"


def test_marks_and_images_must_agree(tmp_path: Path) -> None:
    with pytest.raises(TitaError, match="mark every image once, in the order of the images"):
        read(tmp_path, {"text": "<image 2> or <image 1>?", "images": ["0.png", "1.png"]})
    turn = ContextTurn(role="user", text="<image> or <image>?", num_images=1)
    with pytest.raises(TitaError, match="mark every image once, or none"):
        turn.parts(["A"])


def test_a_dataset_inside_one_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vqa.json").write_text(json.dumps({"questions": [{"question": "What?"}]}))
    with pytest.raises(TitaError, match="its rows are in 'questions'"):
        list(open_dataset(tmp_path / "vqa.json").questions())


def test_missing_values_of_pandas_are_no_values(tmp_path: Path) -> None:
    row = {"text": "What is it?", "image": "0.png", "hint": float("nan"), "history": "[]"}
    assert read(tmp_path, row).text == "What is it?"
