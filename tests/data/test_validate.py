"""`tita data validate` names every fault in one go, each with its file and line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tita.cli.commands import app
from tita.cli.main import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "images" / "a.png")
    whole = (tmp_path / "images" / "a.png").read_bytes()
    (tmp_path / "images" / "torn.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images" / "text.png").write_text("no image")
    outside = tmp_path.parent / f"{tmp_path.name}-outside.png"
    outside.write_bytes(whole)
    os.symlink(outside, tmp_path / "images" / "link.png")
    return tmp_path


def question(number: object, **changes: Any) -> dict[str, Any]:
    return {"question_id": number, "text": "What?", "image": "images/a.png", **changes}


def pair(**changes: Any) -> dict[str, Any]:
    row = {"image_id": "images/a.png", "question": "What?", "chosen": "a", "reject": "b"}
    return {key: value for key, value in (row | changes).items() if value is not None}


def validate(
    folder: Path, *rows: object, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[str], str]:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    code = run(app, ["data", "validate", str(folder)], name="tita")
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def test_a_sound_dataset_has_no_faults(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, faults, summary = validate(folder, question(1), question(2), pair(), capsys=capsys)
    assert (code, faults) == (0, [])
    assert "2 questions, 1 pairs, 1 images, 0 faults" in summary


FAULTS = [
    ("{", "not JSON"),
    ("3", "not a JSON object"),
    (question(5, text=""), "'text' is empty"),
    (question(5, text=["x"]), "'text' is empty or no text"),
    (question(0), "id '0' stands in the file before"),
    (question(5, image="images/none.png"), "no such image"),
    (question(5, image="images/torn.png"), "truncated"),
    (question(5, image="images/text.png"), "not a readable image"),
    (question(5, image="images/link.png"), "a link that leaves its folder"),
    (question(5, image="../a.png"), "leaves its folder"),
    (question(5, image="/etc/passwd"), "leaves its folder"),
    (pair(chosen="b"), "chosen and rejected are the same"),
    (pair(chosen=" "), "'chosen' is empty"),
    (pair(reject=None), "no field 'rejected'"),
    (pair(question=None), "no field 'question'"),
    (pair(image_id=None), "no field 'image_id'"),
]


@pytest.mark.parametrize(("row", "words"), FAULTS, ids=[words for _, words in FAULTS])
def test_each_fault_is_named_with_its_line(
    folder: Path, row: object, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, faults, summary = validate(folder, question(0), row, question(9), capsys=capsys)
    assert code == 2
    assert len(faults) == 1
    assert words in faults[0]
    assert f"{folder / 'data.jsonl'}:2" in faults[0]
    assert "1 faults" in summary


def test_all_faults_come_in_one_go(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [question(0), *(row for row, _ in FAULTS)]
    code, faults, summary = validate(folder, *rows, capsys=capsys)
    assert code == 2
    assert len(faults) == len(FAULTS)
    assert f"{len(FAULTS)} faults" in summary


def test_a_missing_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["data", "validate", str(tmp_path / "none")], name="tita") == 2
    assert "no such file or folder" in capsys.readouterr().err
