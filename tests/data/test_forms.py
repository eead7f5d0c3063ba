"""Dataset formats: all are read as the same records."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tita.data import open_dataset, read_pairs, read_questions
from tita.errors import TitaError
from tita.records import ContextTurn, Pair, Question
from tita.vlm.images import open_image

COLOURS = ("red", "blue")


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def user(text: str, *, image: bool = True) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "text": None}] if image else []
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


FLAT = {"question": "What colour?", "chosen": "red", "rejected": "green"}
EXPLICIT = {
    "prompt": [user("What colour?")],
    "chosen": [assistant("red")],
    "rejected": [assistant("green")],
}
IMPLICIT = {
    "chosen": [user("What colour?"), assistant("red")],
    "rejected": [user("What colour?"), assistant("green")],
}
PLAIN_CONTENT = {
    "prompt": [{"role": "user", "content": "<image>\nWhat colour?"}],
    "chosen": [{"role": "assistant", "content": "red"}],
    "rejected": [{"role": "assistant", "content": "green"}],
}
SHARE_GPT = {
    "conversations": [{"from": "human", "value": "<image>\nWhat colour?"}],
    "chosen": {"from": "gpt", "value": "red"},
    "rejected": {"from": "gpt", "value": "green"},
}
FORMS = {
    "flat": FLAT,
    "explicit prompt": EXPLICIT,
    "implicit prompt": IMPLICIT,
    "content as text": PLAIN_CONTENT,
    "ShareGPT": SHARE_GPT,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITA_CACHE_DIR", str(tmp_path / "cache"))


def save_jsonl(rows: list[dict[str, Any]], folder: Path) -> Path:
    for number, row in enumerate(rows):
        (folder / f"{number}.png").write_bytes(row.pop("images")[0]["bytes"])
        row["images"] = [f"{number}.png"]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_parquet(rows: list[dict[str, Any]], folder: Path) -> Path:
    path = folder / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def save_to_disk(rows: list[dict[str, Any]], folder: Path) -> Path:
    table = datasets.Dataset.from_list(rows)
    table = table.cast_column("images", datasets.List(datasets.Image()))
    # A selection is stored as indices.
    datasets.DatasetDict({"train": table.select([1, 0]).select([1, 0])}).save_to_disk(folder / "hf")
    return folder / "hf"


@pytest.mark.parametrize("save", [save_jsonl, save_parquet, save_to_disk])
@pytest.mark.parametrize("form", FORMS)
def test_all_formats_give_the_same_pairs(tmp_path: Path, form: str, save: Any) -> None:
    rows = [{**FORMS[form], "images": [{"bytes": png(c), "path": None}]} for c in COLOURS]
    found = open_dataset(save(rows, tmp_path))
    pairs = list(found.pairs())
    assert [(p.question, p.chosen, p.rejected) for p in pairs] == [
        ("What colour?", "red", "green")
    ] * 2
    assert len({pair.id for pair in pairs}) == 2
    for pair, colour in zip(pairs, COLOURS, strict=True):
        image = open_image(found.images / pair.image)
        assert image.mode == "RGB"
        assert image.tobytes() == Image.new("RGB", (6, 4), colour).tobytes()


def test_embedded_images_have_the_same_names_on_every_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tita.settings import settings

    rows = [{**FLAT, "image": {"bytes": png("red"), "path": "x.png"}}]
    path = save_parquet(rows, tmp_path)
    here = [pair.image for pair in open_dataset(path).pairs()]
    monkeypatch.setenv("TITA_CACHE_DIR", str(tmp_path / "elsewhere"))
    settings.cache_clear()
    there = open_dataset(path)
    assert [pair.image for pair in there.pairs()] == here
    assert (there.images / here[0]).read_bytes() == png("red")


def test_hugging_face_image_folders_are_read(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.png").write_bytes(png("red"))
    row = {"file_name": "1.png", "text": "What colour?", "label": "red"}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(row))
    wanted = Question(
        id="train/metadata.jsonl:1",
        text="What colour?",
        image="train/1.png",
        references=("red",),
    )
    assert list(read_questions(tmp_path)) == [wanted]


def test_sevas_files_are_read(tmp_path: Path) -> None:
    """A JSON array of pairs, and questions as JSON Lines in a `.json` file."""
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{**FLAT, "image_id": "1.jpg"}]))
    assert [pair.image for pair in read_pairs(pairs)] == ["1.jpg"]
    questions = tmp_path / "list.json"
    questions.write_text(
        '{"image": "1.jpg", "text": "What?"}\n{"image": "1.jpg", "text": "Why?"}\n'
    )
    assert [question.text for question in read_questions(questions)] == ["What?", "Why?"]


@pytest.mark.parametrize(("name", "delimiter"), [("q.csv", ","), ("q.tsv", "\t")])
def test_tables_are_questions_or_pairs(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = [
        ["question_id", "question", "image", "answers"],
        ["7", "What colour?", "1.jpg", '["red", "dark red"]'],
        ["8", "Why?", "null", ""],
    ]
    with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    assert list(read_questions(tmp_path / name)) == [
        Question(id="7", text="What colour?", image="1.jpg", references=("red", "dark red")),
        Question(id="8", text="Why?"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,id\na\n", "q.csv:2: another number of cells"),
        (b'text\n"a"b\n', "q.csv:2: no table"),
        (b"text\n\xfc\n", "q.csv:2: not UTF-8"),
        (b"text,id\n,1\n", "q.csv:2: 'text' is empty"),
        (b"text,image\na,\n", "q.csv:2: image 'image' is blank; .* null if there is none"),
    ],
)
def test_an_invalid_table_is_reported_with_its_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "q.csv").write_bytes(content)
    with pytest.raises(TitaError, match=message):
        list(read_questions(tmp_path / "q.csv"))


def test_llavas_conversations_are_questions(tmp_path: Path) -> None:
    row = {
        "id": "7",
        "image": "1.jpg",
        "conversations": [
            {"from": "human", "value": "What colour?\n<image>"},
            {"from": "gpt", "value": "Red."},
            {"from": "human", "value": "Are you sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    (tmp_path / "llava.json").write_text(json.dumps([row]))
    first = Question(id="7#1", text="What colour?", image="1.jpg", references=("Red.",))
    context = (
        ContextTurn(role="user", text="What colour?", num_images=1),
        ContextTurn(role="assistant", text="Red."),
    )
    second = Question(
        id="7#2", text="Are you sure?", image="1.jpg", references=("Yes.",), context=context
    )
    assert list(read_questions(tmp_path / "llava.json")) == [first, second]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("data/texvqa/train_images/ab12.jpg", "texvqa/train_images/ab12.jpg"),
        ("data/texvqa/train_images/ab12.jpg", "train_images/ab12.jpg"),
        ("data/texvqa/train_images/ab12.jpg", "data/texvqa/train_images/ab12.jpg"),
        ("data/texvqa/train_images/ab12.jpg", "ab12"),
        ("data/texvqa/images/ab12.png", "ab12.png"),
        ("data/texvqa/images/ab12.JPG", "ab12"),
        ("data/texvqa/images/v1.5.jpg", "v1.5"),
        ("data/texvqa/images/COCO_val2014_000000000042.jpg", 42),
        ("data/texvqa/images/COCO_train2014_000000000042.jpg", "42"),
        ("data/000000000042.jpg", 42),
    ],
)
def test_images_are_found_by_common_names(tmp_path: Path, file: str, name: str | int) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_bytes(png("red"))
    rows = tmp_path / "data" / "texvqa" / "pairs.jsonl"
    rows.parent.mkdir(exist_ok=True)
    rows.write_text(json.dumps({**FLAT, "image_id": name}))
    for path, images in ((rows, tmp_path / "data"), (tmp_path / "data", None)):
        (pair,) = open_dataset(path, images=images).pairs()
        assert pair.image == file.removeprefix("data/")


def test_an_image_is_found_beside_its_file_by_any_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/own").mkdir(parents=True)
    (tmp_path / "data/own/a.png").write_bytes(png("red"))
    path = tmp_path / "data/own/q.jsonl"
    path.write_text(json.dumps({"question": "What?", "image": "a.png"}) + "\n")
    monkeypatch.chdir(tmp_path)
    for file in (path, path.relative_to(tmp_path)):
        for images in (tmp_path / "data", Path("data")):
            (found,) = open_dataset(file, images=images).questions()
            assert found.image == "own/a.png"


def test_an_exact_path_has_precedence(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for path in ("42.jpg", "images/42.jpg", "images/42.jpg.jpg"):
        (tmp_path / path).write_bytes(png("red"))
    (tmp_path / "p.jsonl").write_text(json.dumps({**FLAT, "image_id": "42.jpg"}))
    (pair,) = read_pairs(tmp_path / "p.jsonl")
    assert pair == Pair(
        id="p.jsonl:1", image="42.jpg", question="What colour?", chosen="red", rejected="green"
    )


def test_several_splits_are_not_mixed(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([FLAT])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "hf")
    with pytest.raises(TitaError, match=r"has the splits train, test; name one of .*hf/train"):
        list(read_pairs(tmp_path / "hf"))
