"""Datasets of people, in whatever form, as records and a folder of images."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tita.data.fields import Place, pair_of, picture_in, question_of
from tita.data.pictures import Beside, Unpacked
from tita.data.rows import rows_of
from tita.errors import TitaError
from tita.records import Pair, Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Records in a file or folder, and the folder that their images' names start from."""

    path: Path
    images: Path
    place: Place

    def pairs(self) -> Iterator[Pair]:
        """Preference pairs, in the order of files and rows.

        Raises:
            TitaError: names file and line, or row.
        """
        return (pair_of(row, place=self.place) for row in rows_of(self.path))

    def questions(self) -> Iterator[Question]:
        """Questions, in the order of files and rows.

        Raises:
            TitaError: names file and line, or row.
        """
        return (question_of(row, place=self.place) for row in rows_of(self.path))


def open_dataset(path: Path, *, images: Path | None = None) -> Dataset:
    """A dataset in any of these forms, told by names and content.

    - JSON Lines, or a JSON array in a file `.json`; CSV or TSV; Parquet; a folder with any number
      of JSONL and Parquet files below it; a folder that `datasets.save_to_disk` wrote.
    - Pairs: `image_id` (or `image`, `file_name`), `question` (or `prompt`, `text`), `chosen`,
      `reject` (or `rejected`); or TRL's conversational columns with `images`, the prompt in a
      column of its own or implied; an `id` is optional.
    - Questions: `text` (or `question`, `prompt`), `image` (or `image_id`), and optionally
      `question_id` (or `id`), `answer` (or `answers`, `references`, `label`) and `category`; or
      LLaVA's `conversations`, of which the first question counts.

    Images that stand inside the rows are written, as they are read, to a folder in the cache of
    this node, under their digests: every node calls them the same.

    Args:
        path: a file or a folder.
        images: what image paths start from; the folder if not given.
    """
    folder = images or (path if path.is_dir() else path.parent)
    if not _images_inside(path):
        return Dataset(path=path, images=folder, place=Beside(images=folder))
    from tita.settings import settings

    into = settings().cache_dir.expanduser() / "images"
    return Dataset(path=path, images=into, place=Unpacked(into=into, images=folder))


def read_pairs(path: Path) -> Iterator[Pair]:
    """Preference pairs of a file or folder whose images lie beside it; see `open_dataset`."""
    return open_dataset(path).pairs()


def read_questions(path: Path) -> Iterator[Question]:
    """Questions of a file or folder whose images lie beside it; see `open_dataset`."""
    return open_dataset(path).questions()


def write_pairs(pairs: Iterable[Pair]) -> bytes:
    """Pairs as JSON Lines, in the spelling that existing scripts read."""
    lines = (
        json.dumps(
            {
                "id": pair.id,
                "image_id": pair.image,
                "question": pair.question,
                "chosen": pair.chosen,
                "reject": pair.rejected,
            },
            ensure_ascii=False,
        )
        for pair in pairs
    )
    return "".join(f"{line}\n" for line in lines).encode()


def _images_inside(path: Path) -> bool:
    """Whether the first row that has an image has it inside."""
    for row in rows_of(path):
        try:
            picture = picture_in(row)
        except TitaError:
            return False
        if picture is not None:
            return isinstance(picture, bytes)
    return False
