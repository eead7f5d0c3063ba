"""The documents of the repository: their code blocks, and the commands in these."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*.md")),
    ROOT / "charts" / "tita" / "README.md",
]
GUIDES = ROOT / "docs" / "extending.md"
"""Its examples exist only in the copies that tests/test_extending.py makes."""
_BLOCK = re.compile(r"^( *)```([^\n`]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


class Block(NamedTuple):
    """A fenced block, without the indentation of its list."""

    language: str
    """Empty for a block that is no code; what else the line of the fence has follows."""
    text: str


def blocks(document: Path | str) -> list[Block]:
    """The blocks of a document, or of a part of its text."""
    text = document if isinstance(document, str) else document.read_text(encoding="utf-8")
    return [
        Block(language.strip(), re.sub(rf"^{indent}", "", text, flags=re.MULTILINE))
        for indent, language, text in _BLOCK.findall(text)
    ]


def code(document: Path, language: str) -> list[str]:
    """The blocks of one language."""
    return [block.text for block in blocks(document) if block.language == language]


def prose(document: Path) -> str:
    """What is outside of fenced blocks."""
    return _BLOCK.sub("", document.read_text(encoding="utf-8"))


def commands(document: Path) -> list[list[str]]:
    """The words of each command in shell blocks."""
    text = "".join(code(document, "sh")).replace("\\\n", " ")
    return [words for line in text.splitlines() for words in split_line(line)]


def split_line(line: str) -> list[list[str]]:
    """The commands of one line: `a && b`, `a | b > file`, `export X=$(a | b)`."""
    parts = re.split(r" && | \| |=\$\(", line)
    found = (shlex.split(re.sub(r" > \S+| &$", "", part), comments=True) for part in parts)
    return [words for words in found if words]
