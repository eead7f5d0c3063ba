"""`tita data`: push, pull, ls, and user errors."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tita.cli.commands import app
from tita.cli.main import run
from tita.data import read_pairs


def tita(*arguments: object) -> int:
    return run(app, ["data", *map(str, arguments)], name="tita")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "1.png").write_bytes(b"png")
    (tmp_path / "mine" / "pairs.jsonl").write_text("{}\n")
    return tmp_path / "mine"


def test_a_pushed_folder_is_listed_and_pulled(
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


UPSTREAM = {
    "data/texvqa/train_images/0054c91397f2fe05.jpg": "textvqa/first.jsonl",
    "data/textvqa/train_images/005635e119b9f32f.jpg": "textvqa/second.jsonl",
    "data/ocrvqa/images/0002153831.jpg": "ocrvqa/pairs.jsonl",
    "data/ocrvqa/images/0007127831.jpg": "merged.jsonl",
}
"""The layout of existing training scripts: images, and the pairs file that names them."""


@pytest.mark.parametrize("ending", ["", ".jpg"])
def test_the_layout_of_existing_scripts_is_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    data = tmp_path / "data"
    for image, pairs in UPSTREAM.items():
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((30, 20), 50).convert("RGB").save(tmp_path / image)
        (data / pairs).parent.mkdir(parents=True, exist_ok=True)
        row = {"image_id": f"{Path(image).stem}{ending}", "question": "What?"}
        (data / pairs).write_text(json.dumps(row | {"chosen": "a", "reject": "b"}) + "\n")
    assert tita("validate", data) == 0
    assert "4 pairs, 4 images, 0 errors" in capsys.readouterr().err
    store = ("--store", tmp_path / "store")
    assert tita("push", data, "data", *store, "-o", "yaml") == 0
    pushed = yaml.safe_load(capsys.readouterr().out)
    assert tita("pull", "data", tmp_path / "there", *store, "-o", "json") == 0
    pulled = json.loads(capsys.readouterr().out)
    assert pulled == {"path": str(tmp_path / "there"), **pushed}
    assert tita("ls", *store, "-o", "yaml") == 0
    assert yaml.safe_load(capsys.readouterr().out) == [pushed]
    found = {f"data/{pair.image}" for pair in read_pairs(tmp_path / "there")}
    assert found == UPSTREAM.keys()


def test_the_summary_counts_one_of_a_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    row = {"image": "1.png", "question": "What?", "chosen": "a", "rejected": "b"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n{\n")
    assert tita("validate", tmp_path / "one.jsonl") == 2
    assert capsys.readouterr().err.endswith("0 questions, 1 pair, 1 image, 1 error\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("push", "./nowhere", "data"), "nowhere: no such folder; check the path"),
        (("pull", "data/none", "./copy"), "data/none: no complete tree; push it"),
        (("pull", "../out", "./copy"), "leaves the store"),
        (("pull", "/", "./copy"), "the name of the tree is empty"),
    ],
)
def test_user_errors_are_one_line_with_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    assert tita(*arguments, "--store", tmp_path / "store") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
