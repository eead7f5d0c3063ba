"""Import rules: the layer table, no circles inside a package, and no heavy imports for help."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tita"

# Top to bottom; docs/architecture.md shows the same table, and a test below compares them.
LAYERS = (
    ("cli",),
    ("selftest",),
    ("demo",),
    ("suites",),
    ("launch", "pairs", "train", "infer", "serve", "bench"),
    ("engine",),
    ("vllm_plugin",),
    ("align", "data"),
    ("vlm", "report"),
    ("gang",),
    ("storage",),
    ("recipes", "provenance"),
    ("recipe_sources",),
    ("settings",),
    ("jobspec", "records", "terminal", "dpo_losses", "proxies"),
    ("errors", "activity", "json_text", "imports"),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """Dotted names below `tita` that a module imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("tita.")}


def imported_packages(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_names(path)} - {"__version__", "__init__"}


MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_lower_layers(path: Path) -> None:
    own = package_of(path)
    assert own in RANK, f"tita.{own} has no row in the layer table"
    for other in imported_packages(path) - {own}:
        assert RANK[other] > RANK[own], f"tita.{own} must not import tita.{other}"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_import_circles() -> None:
    """No module imports itself through others; a package's `__init__` counts as a module."""
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    graph = {
        name: {
            # The imported name is either a module or a name in one.
            target if target in modules else target.rpartition(".")[0]
            for target in imported_names(path)
        }
        - {name, "tita"}  # the package root defines the version only
        for name, path in modules.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_architecture_document_shows_the_same_table() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = [line.split() for line in text.split("```layers\n")[1].split("```")[0].splitlines()]
    assert [tuple(row) for row in rows] == [tuple(row) for row in LAYERS]


HEAVY = {"torch", "transformers", "boto3", "kubernetes", "httpx", "pydantic", "tita.recipes"}


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--version"], HEAVY),
        (["--help"], HEAVY),
        (["launch", "--help"], HEAVY),
        (["jobs", "--help"], HEAVY),
        (["runs", "list", "--store", "."], {"torch", "boto3", "kubernetes"}),
        (["serve", "--help"], HEAVY),
        (["demo", "--help"], HEAVY),
        (["infer", "--help"], HEAVY),
        (["infer", "--no-such"], HEAVY),
        (["launch", "train-dpo", "--no-such"], HEAVY),
        # Typer converts values with pydantic.
        (["infer", "--base", "x", "--weight", "x"], HEAVY - {"pydantic"}),
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str], heavy: set[str]) -> None:
    is_wrong = {"--no-such", "--weight"} & {*arguments}
    code = (
        "import sys\n"
        "from tita.cli.main import tita\n"
        "try:\n"
        f"    tita({arguments!r})\n"
        "except SystemExit as stop:\n"
        f"    assert int(stop.code or 0) == {2 if is_wrong else 0}, stop.code\n"
        f"loaded = {heavy!r} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
