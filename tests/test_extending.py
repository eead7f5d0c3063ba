"""The guides of docs/extending.md, followed by the letter in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import GUIDES, ROOT, Block, blocks, split_line
from tita.data.dataset import write_pairs
from tita.records import Pair
from tita.storage import open_store


def guide(title: str) -> list[Block]:
    """The blocks of one guide."""
    text = GUIDES.read_text(encoding="utf-8")
    (section,) = (
        part for part in re.split(r"^## ", text, flags=re.MULTILINE) if part.startswith(title)
    )
    return blocks(section)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what a change to tita touches."""
    folder = tmp_path / "tita"
    for name in ("tita", "tests", "jobs", "docs", "charts", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


def apply(change: str, path: Path) -> None:
    """Add and remove the marked lines of a block where the others stand."""
    lines = [line for line in change.splitlines() if line]
    assert {line[0] for line in lines} <= {"+", "-", " "}, change
    before = "".join(f"{line[1:]}\n" for line in lines if line[0] in "- ")
    after = "".join(f"{line[1:]}\n" for line in lines if line[0] in "+ ")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    assert text.count(before) == 1 or not text, f"{path}: once\n{before}"
    path.write_text(text.replace(before, after) if text else after, encoding="utf-8")


def follow(title: str, copy: Path, *, only: str = "") -> None:
    """Make the changes of a guide, then run its tests.

    Args:
        title: of the guide.
        copy: a copy of the repository.
        only: the tests to run, as of `pytest -k`, where the guide's are many.
    """
    shown = guide(title)
    for block in shown:
        if block.language == "diff":
            name, change = block.text.split("\n", 1)
            apply(change, copy / name.removeprefix("+++ "))
    run(copy, "ruff", "check", "tita", "tests")
    run(copy, "ruff", "format", "--check", "tita", "tests")
    tests = [words for words in lines(shown) if words[:3] == ["python", "-m", "pytest"]]
    assert tests
    for words in tests:
        run(copy, *words, "-q", "-x", "-p", "no:cacheprovider", *(["-k", only] if only else []))


def lines(shown: list[Block]) -> list[list[str]]:
    text = "".join(block.text for block in shown if block.language == "sh")
    return [words for line in text.splitlines() for words in split_line(line)]


def run(copy: Path, program: str, *words: str, **environment: str) -> str:
    """A command of this environment, with the copy's package."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(
        [program, *words],
        cwd=copy,
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_form_of_guidance(copy: Path) -> None:
    follow("A form of guidance", copy, only="(llava and equal_the_definition) or help or schema")


@pytest.mark.slow
def test_a_model_family(copy: Path) -> None:
    follow("A model family", copy, only="vipllava and definition")


@pytest.mark.slow
def test_an_evaluation_set(copy: Path) -> None:
    follow("An evaluation set", copy, only="shelves or architecture_lists")


@pytest.mark.slow
def test_a_job(copy: Path) -> None:
    follow("A job", copy, only="answer_lengths or every_job or same_table or architecture_lists")
    pairs = [Pair(id="1", image="a.png", question="What?", chosen="A cup.", rejected="A big cup.")]
    (copy / "my-pairs").mkdir()
    (copy / "my-pairs" / "pairs.jsonl").write_bytes(write_pairs(pairs))
    open_store(str(copy / "tita-store")).push_tree(copy / "my-pairs", "pairs/my-pairs")
    for program, *words in lines(guide("A job")):
        if program == "tita":
            run(copy, "python", "-m", "tita", *words)
    means = json.loads((copy / "words" / "lengths.json").read_text())
    assert means == {"chosen": 2, "rejected": 3}
