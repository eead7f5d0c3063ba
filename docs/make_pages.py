"""Collects the pages of the documentation's site: `python docs/make_pages.py FOLDER`.

The pages of `docs/`, README, changelog and the chart's README are taken as they are, with links
that fit. The reference of the commands is made by typer from `--help`; that of the Python modules
is written by mkdocstrings from docstrings when the site is built.
"""

import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHOWN = {
    "README.md": "index.md",
    "README.zh-CN.md": "index.zh-CN.md",
    "charts/tita/README.md": "chart.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
}
"""Files of the repository outside `docs/`, and the pages that show them."""
COMMANDS = {"tita": "tita.cli.commands", "tita-bench": "tita.cli.bench"}
PUBLIC = ("tita.align", "tita.data", "tita.storage", "tita.serve")
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def make_pages(folder: Path) -> None:
    """Write all pages; the folder is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = SHOWN | {f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")}
    texts = {
        page: with_links((ROOT / source).read_text(encoding="utf-8"), source=source, pages=pages)
        for source, page in pages.items()
    }
    for command, module in COMMANDS.items():
        texts[f"reference/{command}.md"] = command_reference(command, module)
    texts["reference/recipes.md"] = (
        "# Recipes\n\n::: tita.recipes\n    options:\n      show_if_no_docstring: true\n"
    )
    texts["reference/python.md"] = "# Python\n\n" + "\n".join(f"::: {each}\n" for each in PUBLIC)
    for page, text in texts.items():
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "pictures", folder / "pictures")


def with_links(text: str, *, source: str, pages: dict[str, str]) -> str:
    """The text of a file, with links to pages of the site; those to other files become plain text.

    Args:
        source: the file, relative to the repository.
        pages: the pages by the files that they show.
    """

    def follow(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in pages:
            return f"[{text}]({pages[path]}{anchor or ''})"
        # The site's builder refuses a link to a file that does not exist.
        return text if (ROOT / path).exists() else link[0]

    return _LINK.sub(follow, text).replace('"docs/pictures/', '"pictures/')


def command_reference(command: str, module: str) -> str:
    """Every subcommand with its options, as `--help` shows them."""
    made = subprocess.run(
        [sys.executable, "-m", "typer", module, "utils", "docs", "--name", command],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return made.stdout


if __name__ == "__main__":
    make_pages(Path(sys.argv[1]))
