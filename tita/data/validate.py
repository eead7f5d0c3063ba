"""Looking for every fault of a dataset in one go, before any job meets the first of them."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita.data.jsonl import lines_of, pair_of, parse_line, question_of
from tita.errors import TitaError
from tita.vlm import open_image


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was found so far."""

    num_questions: int = 0
    num_pairs: int = 0
    num_images: int = 0
    num_faults: int = 0


def find_faults(path: Path, *, images: Path, tally: Tally) -> Iterator[TitaError]:
    """Every fault of the question and pair files at `path`, in the order of their lines.

    An object with `chosen` is a pair, any other a question. Each image is opened once. Memory grows
    by eight bytes of digest a line and an image, in sets.

    Args:
        path: a JSONL file, or a folder with some.
        images: what image paths start from.
        tally: counts, kept up to date.
    """
    seen: set[bytes] = set()
    opened: set[bytes] = set()
    for where, line in lines_of(path):
        try:
            name = _check(parse_line(line, where=where), where=where, seen=seen, tally=tally)
            if name is not None and _is_new(name, opened):
                _check_image(images, name, where=where)
                tally.num_images += 1
        except TitaError as error:
            tally.num_faults += 1
            yield error


def _check(row: Mapping[str, Any], *, where: str, seen: set[bytes], tally: Tally) -> str | None:
    """Count one record and look for its id among those before; the name of its image."""
    file = where.rpartition(":")[0]
    if "chosen" in row:
        pair = pair_of(row, where=where)
        tally.num_pairs += 1
        unique = "id" not in row or _is_new(f"{file} {pair.id}", seen)
        identifier, image = pair.id, pair.image
    else:
        question = question_of(row, where=where)
        tally.num_questions += 1
        unique = _is_new(f"{file} {question.id}", seen)
        identifier, image = question.id, question.image or ""
    if not unique:
        raise TitaError(
            f"id {identifier!r} stands in the file before", where=where, remedy="rename"
        )
    return image or None


def _check_image(images: Path, name: str, *, where: str) -> None:
    path = images / name
    if not path.resolve().is_relative_to(images.resolve()):
        raise TitaError(f"image {name!r} is a link that leaves its folder", where=where)
    try:
        open_image(path).close()
    except TitaError as error:
        raise TitaError(f"image {error}", where=where) from None


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    if digest in seen:
        return False
    seen.add(digest)
    return True
