"""Question files: formats, column names, files in the store, and invalid questions."""

import csv
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tita.bench.questions import BenchmarkItem, image_folder, question_file, read_items, write_items
from tita.bench.sample import write_sample
from tita.bench.suites import prepare
from tita.bench.tasks import BenchmarkTask
from tita.errors import TitaError
from tita.storage import open_store


def read(tmp_path: Path, *records: Any) -> list[BenchmarkItem]:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_items(path))


def test_written_questions_are_read_back_unchanged(tmp_path: Path) -> None:
    items = [
        BenchmarkItem(id="1", text="Which?", images=("a.jpg", "b.jpg"), group="g"),
        BenchmarkItem(
            id="2", text="What?", choices=("x", "y"), metric="choice", suite="s", category="c"
        ),
    ]
    assert write_items(tmp_path / "q.jsonl", items) == 2
    assert list(read_items(tmp_path / "q.jsonl")) == items


def test_all_file_formats_give_the_same_questions(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [
        {"question_id": "1", "text": 'Is it "red",\nor not?', "image": "a.jpg", "label": "yes"},
        {
            "question_id": "2",
            "text": "Which?",
            "image": None,
            "answers": ["rot", "röd"],
            "choices": ["a", "b"],
        },
    ]
    expected = read(tmp_path, *records)
    assert expected[1].references == ("rot", "röd")
    (tmp_path / "q.json").write_text(json.dumps(records))
    (tmp_path / "pope.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    names = list(dict.fromkeys(name for record in records for name in record))
    whole = [{name: record.get(name) for name in names} for record in records]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), tmp_path / "q.parquet")
    for name, delimiter in (("q.csv", ","), ("q.tsv", "\t")):
        # Spreadsheets write a byte order mark.
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, names, delimiter=delimiter)
            table.writeheader()
            for record in records:
                cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()}
                table.writerow(cells)
    for name in ("q.json", "pope.json", "q.csv", "q.tsv", "q.parquet"):
        assert list(read_items(tmp_path / name)) == expected, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", "id,text\n1,a\n2\n", "q.csv:3: another number of cells"),
        ("q.csv", "id,text\n1,a,b\n", "q.csv:2: another number of cells"),
        ("q.tsv", 'id\ttext\n1\t"a"b\n', "q.tsv:2: no table"),
        ("q.json", '[{"id": 1, "text": "a"}, 3]', "q.json, entry 2: not a JSON object"),
        ("q.json", '[{"id": 1', "q.json: not JSON"),
        ("q.parquet", "id,text", "q.parquet: not a complete Parquet file"),
    ],
)
def test_invalid_tables_and_arrays_are_rejected(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TitaError, match=re.escape(message)):
        list(read_items(tmp_path / name))


def test_a_folder_is_no_question_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    wanted = f"{tmp_path}/out: a folder; questions are written to a file; name one, such as"
    with pytest.raises(TitaError, match=wanted):
        write_sample(tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_sample_is_not_written_next_to_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TitaError, match="no images can be written next to a device"):
        write_sample(tmp_path / "pipe", num=1)
    assert [each.name for each in tmp_path.iterdir()] == ["pipe"]


def test_question_files_are_not_written_with_the_suffix_of_a_table(tmp_path: Path) -> None:
    out = tmp_path / "new" / "q.parquet"
    with pytest.raises(TitaError, match=r"JSON Lines, not as .parquet; name it q.jsonl"):
        write_sample(out)
    assert not out.parent.exists()
    with pytest.raises(TitaError, match=r"not as .csv"):
        write_items(tmp_path / "q.csv", [BenchmarkItem(id="1", text="a")])
    assert list(tmp_path.iterdir()) == []


def in_row(kind: str, picture: bytes) -> dict[str, Any]:
    """An image column as in Hugging Face's files: a struct, a list of structs, or bytes."""
    struct = {"bytes": picture, "path": "a.jpg"}
    return {
        "struct": {"image": struct},
        "list": {"images": [struct, {"bytes": None, "path": "b/c.jpg"}]},
        "bytes": {"image": picture},
    }[kind]


@pytest.mark.parametrize("kind", ["struct", "list", "bytes"])
def test_embedded_images_are_rejected_with_a_remedy_that_works(tmp_path: Path, kind: str) -> None:
    import pyarrow
    import pyarrow.parquet

    data = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(data, "JPEG")
    row = {"question_id": "1", "text": "Is it red?", "label": "yes"}
    table = pyarrow.Table.from_pylist([row | in_row(kind, data.getvalue())])
    source = tmp_path / "source" / "test-0.parquet"
    source.parent.mkdir()
    pyarrow.parquet.write_table(table, source)
    task = BenchmarkTask(questions=source, images=source.parent, out=tmp_path / "out.jsonl")
    with pytest.raises(TitaError, match="row 1: the image is embedded in the row") as refused:
        task.items()
    assert len(str(refused.value)) < 400
    assert "tita-bench prepare unpack" in str(refused.value)

    out = tmp_path / "q" / "questions.jsonl"
    for place in (source, source.parent):
        assert prepare("unpack", source=place, out=out) == 1
        (item,) = read_items(out)
        assert (out.parent / item.images[0]).read_bytes() == data.getvalue()
        assert item.images[1:] == (("b/c.jpg",) if kind == "list" else ())
        assert (item.text, item.references) == ("Is it red?", ("yes",))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"question_id": 7, "image": "a.jpg", "text": "Q", "category": "conv"},
            BenchmarkItem(id="7", text="Q", images=("a.jpg",), category="conv"),
        ),
        (
            {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"},
            BenchmarkItem(
                id="1", text="Is it?", images=("a.jpg",), references=("yes",), metric="yes-no"
            ),
        ),
        (
            {"id": "x", "question": "Q", "answers": ["a", "b"], "image_id": "d/a.png"},
            BenchmarkItem(id="x", text="Q", images=("d/a.png",), references=("a", "b")),
        ),
        (
            {"id": "x", "question": "Q", "answers": [{"answer": "a"}, None], "image_id": 3},
            BenchmarkItem(id="x", text="Q", images=("3",), references=("a",)),
        ),
        (
            {"text": "no id", "answers": ["a", None]},
            BenchmarkItem(id="questions.jsonl:1", text="no id", references=("a",)),
        ),
    ],
)
def test_common_column_names(tmp_path: Path, record: Any, expected: BenchmarkItem) -> None:
    assert read(tmp_path, record) == [expected]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"id": "no text"}], ":1: no field 'question'"),
        ([{"id": 1, "text": " "}], ":1: 'text' is empty or not a string"),
        ([{"id": 1, "text": "a"}, {"id": "1", "text": "b"}], ":2: duplicate question id '1'"),
        ([{"id": 1, "text": "a", "image": "../../etc/passwd"}], "leaves its folder"),
        ([{"id": 1, "text": "a", "image": "/etc/passwd"}], "leaves its folder"),
        ([{"id": 1, "text": "a", "image": "iVBORw0KGgo" * 99}], "not complete base64"),
        ([["no object"]], ":1: not a JSON object"),
        ([], "an empty file; fill it or remove it"),
    ],
)
def test_invalid_questions_are_rejected(tmp_path: Path, records: list[Any], message: str) -> None:
    with pytest.raises(TitaError, match=message):
        read(tmp_path, *records)


def test_questions_in_the_store_by_file_or_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TITA_STORE", str(tmp_path / "store"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "questions.jsonl").write_text('{"id": 1, "text": "a"}\n')
    (folder / "a.jpg").write_bytes(b"x")
    open_store().push_tree(folder, "data/vqa")
    for where in ("data/vqa", "data/vqa/questions.jsonl"):
        found = question_file(where)
        assert next(read_items(found)).id == "1"
        assert (image_folder(None, questions=found) / "a.jpg").is_file()
    assert (image_folder("data/vqa", questions=found) / "a.jpg").is_file()
    with pytest.raises(TitaError, match="neither a complete tree in the store"):
        question_file("data/nothing")
    (folder / "more.jsonl").write_text("")
    with pytest.raises(
        TitaError,
        match=r"expected exactly one .jsonl file in the folder, found more.jsonl, questions.jsonl",
    ):
        question_file(str(folder))
