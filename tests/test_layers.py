"""The layer table: a module imports only what stands below it, and help imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tita"

# Top to bottom; docs/architecture.md shows the same table, and a test below compares them.
LAYERS = (
    ("cli",),
    ("demo",),
    ("launch", "pairs", "train", "infer", "serve", "bench"),
    ("align", "data"),
    ("vlm", "report"),
    ("storage", "gang"),
    ("recipes",),
    ("settings", "jobspec", "records", "provenance", "terminal"),
    ("errors",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("tita.")}
    return found - {"__version__", "__init__"}


MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_what_stands_below(path: Path) -> None:
    own = room(path)
    assert own in RANK, f"tita.{own} has no row in the layer table"
    for other in imported_rooms(path) - {own}:
        assert RANK[other] > RANK[own], f"tita.{own} must not import tita.{other}"


def test_architecture_document_shows_the_same_table() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = [line.split() for line in text.split("```layers\n")[1].split("```")[0].splitlines()]
    assert [tuple(row) for row in rows] == [tuple(row) for row in LAYERS]


HEAVY = {"torch", "transformers", "boto3", "kubernetes", "httpx", "tita.recipes"}


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--version"], HEAVY | {"pydantic"}),
        (["--help"], HEAVY | {"pydantic"}),
        # Typer itself takes pydantic, where it is installed, for the options of sub-commands.
        (["launch", "--help"], HEAVY),
        (["serve", "--help"], HEAVY),
        (["demo", "--help"], HEAVY),
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str], heavy: set[str]) -> None:
    code = (
        "import sys\n"
        "from tita.cli.main import tita\n"
        "try:\n"
        f"    tita({arguments!r})\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        f"loaded = {heavy!r} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
