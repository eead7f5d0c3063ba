"""`tita data`: what goes into the store comes out, and mistakes are told in one line."""

import json
from pathlib import Path

import pytest

from tita.cli.commands import app
from tita.cli.main import run


def tita(*arguments: object) -> int:
    return run(app, ["data", *map(str, arguments)], name="tita")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "1.png").write_bytes(b"png")
    (tmp_path / "mine" / "pairs.jsonl").write_text("{}\n")
    return tmp_path / "mine"


def test_a_pushed_folder_is_listed_and_comes_back(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ("--store", tmp_path / "store")
    assert tita("push", folder, "data/x/", *store) == 0
    digest = capsys.readouterr().out.strip()
    assert tita("ls", "data", "-o", "json", *store) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"tree": "data/x", "files": 2, "size_bytes": 6, "digest": digest}
    ]
    assert tita("ls", "other", "-o", "json", *store) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert tita("pull", "data/x", tmp_path / "copy", *store) == 0
    assert (tmp_path / "copy" / "images" / "1.png").read_bytes() == b"png"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("push", "./nowhere", "data"), "nowhere: no such folder; check the path"),
        (("pull", "data/none", "./copy"), "data/none: no complete tree; push it"),
        (("pull", "../out", "./copy"), "leaves the store"),
        (("pull", "/", "./copy"), "no name for the tree"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    assert tita(*arguments, "--store", tmp_path / "store") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
