"""The documents in docs/: their commands are commands, and their links lead somewhere."""

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tita.cli.commands import app
from tita.jobspec import job_names
from tita.recipes import load_recipe, read_overrides

DOCS = Path(__file__).parents[1] / "docs"
DOCUMENTS = sorted(DOCS.glob("*.md"))


def commands(document: Path) -> list[list[str]]:
    """The words of every `tita` command in a block of shell."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", document.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("tita ")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_are_commands(document: Path) -> None:
    for _, *words in commands(document):
        command: Any = get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert given <= options, words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_launches_have_recipes_that_are_taken(document: Path) -> None:
    for _, name, *words in commands(document):
        if name == "launch":
            assert words[0] in job_names()
            pairs = [b for a, b in pairwise(words) if a == "--set"]
            load_recipe(words[0], laid_over=read_overrides(file=None, overrides=pairs))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
        assert (DOCS / target).exists(), target


def test_commands_are_found() -> None:
    assert len(commands(DOCS / "launching.md")) == 11
