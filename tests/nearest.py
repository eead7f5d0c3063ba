"""Prints the test files nearest to what changed since a commit: `python tests/nearest.py [main]`.

These are changed test files, those that import a changed module, and of larger changes the first
`MAX_FILES`: those that import most of the changed modules. Files outside of the package, such as
the chart, stand for the tests of their folder.
"""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_FILES = 12
ALWAYS = ["tests/test_layers.py"]
FOLDERS = {"charts/": "tests/chart", "jobs/": "tests/chart", "docs/": "tests/test_docs.py"}


def changed_files(since: str) -> list[str]:
    """Paths that differ from where this branch left `since`, and those that git does not know."""
    commands = (
        ["git", "diff", "--name-only", "--merge-base", since],
        ["git", "ls-files", "--others", "--exclude-standard"],
    )
    outputs = (
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for command in commands
    )
    return sorted({line for output in outputs for line in output.splitlines()})


def nearest(changed: Iterable[str]) -> list[str]:
    """Test files and folders for changed paths."""
    found: dict[str, int] = {}
    modules = [
        re.sub(r"/__init__$", "", path.removesuffix(".py")).replace("/", ".")
        for path in changed
        if path.startswith("tita/") and path.endswith(".py")
    ]
    imports = [re.compile(rf"\b{re.escape(name)}\b(?!\.)") for name in modules]
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        text, path = file.read_text(encoding="utf-8"), str(file.relative_to(ROOT))
        matches = sum(bool(each.search(text)) for each in imports)
        if path in changed:
            matches += len(modules) + 1
        if matches:
            found[path] = matches
    chosen = sorted(found, key=lambda path: -found[path])[:MAX_FILES]
    folders = {
        test for start, test in FOLDERS.items() for path in changed if path.startswith(start)
    }
    return [*ALWAYS, *sorted({*chosen, *folders} - {*ALWAYS})]


if __name__ == "__main__":
    print(*nearest(changed_files(sys.argv[1] if len(sys.argv) > 1 else "main")))
