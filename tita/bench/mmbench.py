"""Reads MMBench (arXiv 2307.06281): a table with images in base64, asked with rotated options."""

import base64
import binascii
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import PIL.Image

from tita.bench.choice_answers import LETTERS
from tita.bench.llava_prompts import with_options
from tita.bench.published_files import find_file, read_table
from tita.bench.questions import BenchmarkItem
from tita.errors import TitaError
from tita.records import IMAGE_FORMATS

_ROTATED = 1_000_000
"""Tables from 20231003 on include the rotations, with index + 1,000,000."""
_MAX_INDEX_DIGITS = 12


def read_mmbench(source: Path, *, images: Path) -> Iterator[BenchmarkItem]:
    """MMBench: a table such as `mmbench_dev_20230712.tsv`.

    Every question is asked once per option, with the options rotated by one each time
    (CircularEval). The image of a row is base64, or the index of the row that has it. Images are
    written to `images`. The test splits have no answers.

    Raises:
        TitaError: a row has another format, an image or an option is missing, or the answer is no
            option.
    """
    path = find_file(source, "mmbench_dev_*.tsv", "*mmbench*.tsv", "*MMBench*.tsv", "*.tsv")
    owners, missing = _survey(path)
    needed = {owner for index, owner in owners.items() if int(index) < _ROTATED}
    written = set()
    rows = read_table(path)
    for line, row in rows:
        index = row["index"].strip()
        if index in needed and owners[index] == index:
            _write_image(row["image"], images / _name(index), where=f"{path}:{line}")
            written.add(index)
        if int(index) < _ROTATED:
            yield from _rotations(
                row, image=_name(owners[index]), missing=missing, where=f"{path}:{line}"
            )
    assert written == needed, "the survey has checked that every owner has a row"


def _name(index: str) -> str:
    return f"mmbench_{index}.jpg"


def _survey(path: Path) -> tuple[Mapping[str, str], frozenset[str]]:
    """The index of the row that has each row's image, and the texts of absent options.

    A table writes absent options as empty cells or `nan`. "None" is an option like any other,
    unless rows end in several of it.
    """
    refers: dict[str, str] = {}
    lines: dict[str, int] = {}
    missing = {"", "nan"}
    for line, row in read_table(path):
        index = row["index"].strip()
        if not index.isdecimal():
            raise TitaError(
                f"the index {index[:20]!r} is not a number",
                where=f"{path}:{line}",
                remedy="give the published table",
            )
        image = row["image"].strip()
        is_index = image.isdecimal() and len(image) <= _MAX_INDEX_DIGITS
        refers[index], lines[index] = (image if is_index else index), line
        cells = [row[letter].strip().lower() for letter in LETTERS if letter in row]
        present = [cell for cell in cells if cell not in ("", "nan")]
        if present[-2:] == ["none", "none"]:
            missing.add("none")
    return {index: _owner(index, refers, path, lines) for index in refers}, frozenset(missing)


def _owner(index: str, refers: Mapping[str, str], path: Path, lines: Mapping[str, int]) -> str:
    """Follow the indices in image cells to the row that has the image."""
    owner, seen = index, {index}
    while refers.get(owner, "") != owner:
        owner = refers[owner]
        if owner in seen or owner not in refers:
            why = "that row refers back to it" if owner in seen else "there is no such row"
            raise TitaError(
                f"the image of row {index} is that of row {owner}, and {why}",
                where=f"{path}:{lines[index]}",
                remedy="give the published table",
            )
        seen.add(owner)
    return owner


def _write_image(text: str, path: Path, *, where: str) -> None:
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
        with PIL.Image.open(io.BytesIO(content), formats=IMAGE_FORMATS):
            path.write_bytes(content)
    except (binascii.Error, PIL.UnidentifiedImageError):
        raise TitaError(
            f"the image {text[:20]!r} is not an image in base64",
            where=where,
            remedy="give the published table",
        ) from None


def _rotations(
    row: Mapping[str, str], *, image: str, missing: frozenset[str], where: str
) -> Iterator[BenchmarkItem]:
    options = _options(row, missing=missing, where=where)
    hint = "" if _is_blank(row.get("hint", "")) else f"{row['hint']}\n"
    right = _right_option(row.get("answer", "").strip(), options, where=where)
    index = row["index"].strip()
    for turn in range(len(options)):
        choices = tuple(options[turn:] + options[:turn])
        answer = () if right is None else (LETTERS[(right - turn) % len(options)],)
        yield BenchmarkItem(
            id=f"{index}-{turn}",
            text=with_options(f"{hint}{row['question']}", choices),
            images=(image,),
            references=answer,
            choices=choices,
            metric="circular",
            suite="mmbench",
            category=row.get("category", ""),
            group=index,
        )


def _options(row: Mapping[str, str], *, missing: frozenset[str], where: str) -> list[str]:
    """The options in the columns A, B, ... without absent ones at the end."""
    cells = [row[letter] for letter in LETTERS if letter in row]
    while cells and cells[-1].strip().lower() in missing:
        cells.pop()
    for letter, cell in zip(LETTERS, cells, strict=False):
        if cell.strip().lower() in ("", "nan"):
            raise TitaError(
                f"option {letter} is empty, and a later one is not",
                where=where,
                remedy="give the published table",
            )
    if len(cells) < 2:
        raise TitaError(
            f"{len(cells)} options", where=where, remedy="give two or more in columns A, B, ..."
        )
    return cells


def _right_option(answer: str, options: list[str], *, where: str) -> int | None:
    """Index of the right option; None for a question without an answer."""
    if _is_blank(answer):
        return None
    if len(answer) != 1 or answer not in LETTERS[: len(options)]:
        raise TitaError(
            f"the answer {answer[:20]!r} is none of the options A to {LETTERS[len(options) - 1]}",
            where=where,
            remedy="give the published table",
        )
    return LETTERS.index(answer)


def _is_blank(value: str) -> bool:
    return value.strip().lower() in ("", "nan", "none")
