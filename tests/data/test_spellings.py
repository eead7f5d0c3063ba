"""Column names of questions and pairs; errors name file and line."""

import json
from pathlib import Path

import pytest

from tita.data import read_pairs, read_questions, write_pairs
from tita.errors import TitaError
from tita.records import Pair, Question

PAIR = {"image_id": "a/1.png", "question": "What?", "chosen": "seven", "reject": "two"}


def write(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"question_id": 7, "text": "What?", "image": "1.png", "answer": "seven"},
        {"id": "7", "question": "What?", "image_id": "1.png", "references": ["seven"]},
        {"question_id": "7", "prompt": "What?", "image": "1.png", "answers": ["seven"]},
        {"question_id": 7, "text": "What?", "image": "1.png", "label": "seven"},
    ],
)
def test_column_names_of_questions(tmp_path: Path, row: dict[str, object]) -> None:
    path = write(tmp_path / "q.jsonl", row)
    wanted = Question(id="7", text="What?", image="1.png", references=("seven",))
    assert list(read_questions(path)) == [wanted]


@pytest.mark.parametrize("rejected", ["reject", "rejected"])
@pytest.mark.parametrize("image", ["image", "image_id"])
def test_column_names_of_pairs(tmp_path: Path, rejected: str, image: str) -> None:
    row = {"id": "x", image: "a/1.png", "question": "What?", "chosen": "7", rejected: "2"}
    path = write(tmp_path / "p.jsonl", row)
    wanted = Pair(id="x", image="a/1.png", question="What?", chosen="7", rejected="2")
    assert list(read_pairs(path)) == [wanted]


def test_written_pairs_are_read_unchanged(tmp_path: Path) -> None:
    pairs = [
        Pair(id=str(i), image="ü/1.png", question="Qué?\n", chosen="sí", rejected="no “x”")
        for i in range(3)
    ]
    path = tmp_path / "p.jsonl"
    path.write_bytes(write_pairs(pairs))
    assert list(read_pairs(path)) == pairs


def test_folders_are_read_file_by_file_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "p.jsonl", PAIR | {"id": name})
    assert [pair.id for pair in read_pairs(tmp_path)] == ["a", "b"]


def test_blank_lines_and_a_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f"\ufeff{json.dumps(PAIR)}\n\n", encoding="utf-8")
    assert len(list(read_pairs(path))) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({**PAIR, "chosen": ""}, "'chosen' is empty"),
        ({**PAIR, "chosen": 3}, "'chosen' is empty or not a string"),
        ({**PAIR, "reject": "seven"}, "chosen and rejected are the same"),
        ({k: v for k, v in PAIR.items() if k != "question"}, "no field 'question'"),
        ({k: v for k, v in PAIR.items() if k != "image_id"}, "no field 'image_id'"),
        ({**PAIR, "image_id": "../1.png"}, "leaves its folder"),
        ({**PAIR, "image_id": "/etc/1.png"}, "leaves its folder"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, row: object, words: str) -> None:
    path = write(tmp_path / "p.jsonl", PAIR, row)
    with pytest.raises(TitaError) as caught:
        list(read_pairs(path))
    assert words in str(caught.value)
    assert f"{path}:2" in str(caught.value)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TitaError, match=r"no \.jsonl or \.parquet file"):
        list(read_pairs(tmp_path))


def test_other_encodings_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('{"id": "ü"}\n'.encode("latin-1"))
    with pytest.raises(TitaError, match="not UTF-8"):
        list(read_pairs(path))
