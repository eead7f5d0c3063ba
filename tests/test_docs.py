"""docs/: commands parse, links resolve, and the modules that are named exist."""

import ast
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tita.cli.commands import app
from tita.jobspec import job_names
from tita.recipe_sources import parse_overrides
from tita.recipes import RECIPES, load_recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = sorted(DOCS.glob("*.md"))
READMES = [ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")]


def commands(document: Path) -> list[list[str]]:
    """The words of every `tita` command in shell blocks."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", document.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("tita ")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_parse(document: Path) -> None:
    for _, *words in commands(document):
        command: Any = get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert given <= options, words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_launch_recipes_are_valid(document: Path) -> None:
    for _, name, *words in commands(document):
        if name == "launch":
            assert words[0] in job_names()
            pairs = [b for a, b in pairwise(words) if a == "--set"]
            load_recipe(RECIPES[words[0]], parse_overrides(pairs))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
        assert (DOCS / target).exists(), target


def test_commands_are_found() -> None:
    assert len(commands(DOCS / "launching.md")) == 11


def exists(name: str) -> bool:
    """Whether a dotted name is a module or package of tita, or is defined at the top of one."""
    parts = name.split(".")
    for number in range(len(parts), 0, -1):
        module = ROOT.joinpath(*parts[:number])
        for path in (module.with_suffix(".py"), module / "__init__.py"):
            if path.is_file():
                return number == len(parts) or parts[number] in defined(path)
    return False


def defined(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


@pytest.mark.parametrize("document", [*DOCUMENTS, *READMES], ids=lambda path: path.stem)
def test_modules_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    names = set(re.findall(r"\btita\.[a-z_]+(?:\.[A-Za-z_]+)*", text))
    names -= {"tita.judges"}  # a group of entry points
    assert not {name for name in names if not exists(name)}
    paths = set(
        re.findall(r"\b(?:tita|tests|jobs|benchmarks|charts)/[a-z0-9_/]+\.(?:py|yaml|json)", text)
    )
    assert not {path for path in paths if not (ROOT / path).exists()}


def test_architecture_lists_every_module() -> None:
    """One line per module: its path and the first line of its docstring."""
    text = (DOCS / "architecture.md").read_text()
    listed = text.split("```modules\n")[1].split("```")[0].splitlines()
    expected = []
    for path in sorted((ROOT / "tita").rglob("*.py")):
        summary = ast.get_docstring(ast.parse(path.read_text())) or ""
        if path.name != "__init__.py" and "demo/weights" not in str(path):
            name = str(path.relative_to(ROOT / "tita"))
            expected.append(f"{name:32} {summary.splitlines()[0]}")
    assert listed == expected, "expected:\n" + "\n".join(expected)
