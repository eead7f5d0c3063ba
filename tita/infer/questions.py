"""Questions from a file, from standard input, or one question about every image of a folder."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita.data import open_dataset
from tita.data.convert import Place, question_of
from tita.data.dataset import Beside
from tita.data.rows import Row, rows_of
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
    """The questions of a dataset (LLaVA's question files among them), or of `-`, JSON Lines.

    Args:
        source: a file, a folder of such files, or `-` for standard input.
        images: the folder that image names are relative to; the file's own if not given.

    Raises:
        TitaError: no such file, a line that is no question (file and line), the same id twice.
    """
    folder, place, rows = _source(source, images=images)
    asked, seen = [], dict[str, str]()
    for row in rows:
        question = question_of(row, place=place)
        if question.id in seen:
            raise TitaError(
                f"question {question.id} stands in {seen[question.id]} already",
                where=row.where,
                remedy="give every question an id of its own",
            )
        seen[question.id] = row.where
        named = (row.read().get(key) for key in ("id", "question_id"))
        asked.append(
            Asked(
                id=next((name for name in named if name is not None), question.id),
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


def _source(source: str, *, images: Path | None) -> tuple[Path, Place, Iterable[Row]]:
    """Where images' names start from, how they are found, and the rows."""
    if source == "-":
        folder = images or Path()
        return folder, Beside(images=folder), _standard_input()
    dataset = open_dataset(Path(source), images=images)
    return dataset.images, dataset.place, rows_of(dataset.path)


def _standard_input() -> Iterator[Row]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        if line.strip():
            where = f"standard input:{number}"
            yield Row(where=where, file=Path("-"), id=where, content=line)
