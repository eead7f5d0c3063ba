"""What is wrong with a run's input is one line and exit code 2, before anything was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow]


def broken_pairs(tmp_path: Path, data: Any) -> dict[str, object]:
    path = tmp_path / "pairs.jsonl"
    path.write_text(data.pairs.read_text() + "{\n")
    return {"pairs": str(path)}


def missing_image(tmp_path: Path, data: Any) -> dict[str, object]:
    return {"images": str(tmp_path)}


def no_model(tmp_path: Path, data: Any) -> dict[str, object]:
    return {"model": str(tmp_path)}


def torn_model(tmp_path: Path, data: Any) -> dict[str, object]:
    for name in ("config.json", "processor_config.json"):
        (tmp_path / name).write_text("{")
    return {"model": str(tmp_path)}


def no_such_file(tmp_path: Path, data: Any) -> dict[str, object]:
    return {"deepspeed": "zero9"}


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (broken_pairs, "pairs.jsonl:49: not JSON"),
        (missing_image, "no such image"),
        (no_model, "no config.json in it"),
        (torn_model, "that transformers can load"),
        (no_such_file, "no DeepSpeed configuration named 'zero9'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    start: Callable[..., Any],
    data: Any,
    tmp_path: Path,
    mistake: Callable[[Path, Any], dict[str, object]],
    words: str,
) -> None:
    store = tmp_path / "store"
    (tmp_path / "input").mkdir()
    ended = start(store, procs=1, **mistake(tmp_path / "input", data)).finish()
    assert ended.code == 2, ended.text
    assert any(words in line for line in ended.text.splitlines()), ended.text
    assert "Traceback" not in ended.text
    assert not (store / "runs").exists()
