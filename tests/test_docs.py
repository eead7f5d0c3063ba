"""The documents: commands parse, links resolve, and the modules that are named exist."""

import ast
import json
import re
import shlex
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tests.documents import DOCUMENTS, GUIDES, ROOT, blocks, code, commands, name_of, prose
from tita.cli.bench import app as bench
from tita.cli.commands import app
from tita.jobspec import job_names
from tita.recipe_sources import parse_overrides
from tita.recipes import RECIPES, load_recipe

DOCS = ROOT / "docs"
COMMANDS = [(name_of(document), words) for document in DOCUMENTS for words in commands(document)]
OURS = {"tita": app, "tita-bench": bench}
TESTED_BY_CHART = {"helm", "kubectl"}
"""By tests/chart/test_docs.py."""
OTHERS = {".", "aws", "base64", "bash", "do", "done", "export", "for", "kind", "python"}


def of(program: str) -> list[tuple[str, list[str]]]:
    """The commands of a program in all documents, each with its document."""
    return [(document, words) for document, words in COMMANDS if words[0] == program]


def test_each_block_with_commands_is_marked_as_shell() -> None:
    """Else the tests below would not see them."""
    programs = rf"^ *(?:\$ )?(?:{'|'.join([*OURS, *TESTED_BY_CHART, 'make'])}) "
    for document in DOCUMENTS:
        for block in blocks(document):
            if block.language.split(" ")[0] not in ("sh", "python", "yaml", "diff", "modules"):
                assert not re.search(programs, block.text, re.MULTILINE), (document.name, block)
        indented = re.sub(r"^(?! {4}).*$", "", prose(document), flags=re.MULTILINE)
        assert not re.search(programs, indented, re.MULTILINE), document.name
    assert {words[0] for _, words in COMMANDS} <= {*OURS, *TESTED_BY_CHART, *OTHERS, "make"}


def test_commands_parse() -> None:
    """By typer itself: names, options, numbers of arguments, types and choices."""
    for document, (program, *words) in [*of("tita"), *of("tita-bench")]:
        command: Any = get_command(OURS[program])
        names = [program]
        while hasattr(command, "commands"):
            names.append(words.pop(0))
            assert names[-1] in command.commands, (document, names)
            command = command.commands[names[-1]]
        try:
            command.make_context(" ".join(names), words)
        except Exception as error:
            raise AssertionError(f"{document}: {' '.join(names)} {words}: {error}") from error


def test_launch_recipes_are_valid() -> None:
    for document, (_, name, *words) in of("tita"):
        if name == "launch" and document != name_of(GUIDES):
            assert words[0] in job_names(), document
            pairs = [b.replace("$beta", "0.1") for a, b in pairwise(words) if a == "--set"]
            load_recipe(RECIPES[words[0]], parse_overrides(pairs))


def test_targets_and_variables_of_make_exist() -> None:
    spans = [
        (name_of(document), shlex.split(span))
        for document in DOCUMENTS
        for span in re.findall(r"`(make [a-z][^`]*)`", prose(document))
    ]
    makefiles = (ROOT / "Makefile").read_text() + (ROOT / "charts" / "chart.mk").read_text()
    variables = set(re.findall(r"^(\w+) *[:?]?=", makefiles, re.MULTILINE))
    seen = 0
    for document, (_, *words) in [*of("make"), *spans]:
        given = {word.partition("=")[0] for word in words if "=" in word}
        assert given <= variables, (document, words)
        for target in (word for word in words if "=" not in word):
            assert re.search(rf"^{target}:.*##", makefiles, re.MULTILINE), (document, target)
            seen += 1
    assert seen > 20


def test_python_compiles_and_what_it_imports_exists() -> None:
    for document in DOCUMENTS:
        for block in code(document, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tita"):
                    for alias in node.names:
                        exported = getattr(import_module(node.module), "__all__", ())
                        known = alias.name in exported or exists(f"{node.module}.{alias.name}")
                        assert known, (document.name, alias.name)


def test_json_parses() -> None:
    for document in DOCUMENTS:
        for block in code(document, "json"):
            json.loads(block)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_commands_are_found() -> None:
    assert len(commands(DOCS / "launching.md")) == 11
    assert len(of("tita")) > 70
    assert len(of("tita-bench")) > 15


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


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d != GUIDES], ids=name_of)
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
