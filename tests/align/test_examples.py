"""The examples in the docstrings and in docs/decoding.md run as printed."""

import doctest
import re
from pathlib import Path

import PIL.Image
import pytest

import tita.align.engine
from tita.demo.models import demo_model_path

DOCUMENT = Path(__file__).parents[2] / "docs" / "decoding.md"


def test_docstrings() -> None:
    found = doctest.testmod(tita.align.engine)
    assert found.attempted > 5
    assert not found.failed


def test_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for role in ("base", "reward"):
        (tmp_path / f"{role}-model").symlink_to(demo_model_path(role))
    PIL.Image.new("RGB", (32, 32), "red").save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert capsys.readouterr().out.strip() == getattr(names["answer"], "text", None)
