"""Questions from a file, from standard input, or one question about every image of a folder."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita.data.jsonl import lines_of, parse_line, question_of
from tita.errors import TitaError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One question and its image."""

    id: Any
    """As it stands in the file, number or text: scripts that read the answers look it up."""
    text: str
    image: Path | None


def questions_of(source: str, *, images: Path | None) -> list[Asked]:
    """The questions of a JSONL file (LLaVA's question files, dataset records), or of `-`.

    Args:
        source: a file, a folder of such files, or `-` for standard input.
        images: the folder that image names are relative to; the file's own if not given.

    Raises:
        TitaError: no such file, a line that is no question (file and line), the same id twice.
    """
    if source == "-":
        folder = images or Path()
        lines: Iterable[tuple[str, bytes]] = _standard_input()
    else:
        path = Path(source)
        folder = images or (path if path.is_dir() else path.parent)
        lines = lines_of(path)
    asked, seen = [], dict[str, str]()
    for where, line in lines:
        row = parse_line(line, where=where)
        question = question_of(row, where=where)
        if question.id in seen:
            raise TitaError(
                f"question {question.id} stands in {seen[question.id]} already",
                where=where,
                remedy="give every question an id of its own",
            )
        seen[question.id] = where
        asked.append(
            Asked(
                id=next(v for k in ("id", "question_id") if (v := row.get(k)) is not None),
                text=question.text,
                image=None if question.image is None else folder / question.image,
            )
        )
    if not asked:
        raise TitaError("no questions in it", where=source, remedy="write one object a line")
    return asked


def images_in(folder: Path, *, question: str) -> list[Asked]:
    """The same question about every image below a folder, by name; the name is its id.

    Raises:
        TitaError: there is no image.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise TitaError("no images in it", where=str(folder), remedy="name a folder of images")
    return [
        Asked(id=path.relative_to(folder).as_posix(), text=question, image=path) for path in paths
    ]


def _standard_input() -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        if line.strip():
            yield f"standard input:{number}", line
