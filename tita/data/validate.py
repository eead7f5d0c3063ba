"""Validates datasets: finds every error of the rows and their images before a job reads them."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tita.data.convert import to_record
from tita.data.dataset import find_image, image_name
from tita.data.digest_set import DigestSet
from tita.data.layout_counts import LayoutCounts
from tita.data.layouts import Example, read_examples
from tita.data.row_values import ImageValue
from tita.data.rows import RawRow, read_rows, unread_files
from tita.data.shortcuts import PairSample
from tita.errors import TitaError
from tita.records import Pair
from tita.storage.image_shards import is_image, name_in_other_case, read_image
from tita.terminal import Advance
from tita.vlm.images import open_image, read_size

if TYPE_CHECKING:  # it loads transformers, which only `--model` needs
    from tita.data.lengths import LengthLimit

_MAX_CASE_LOOKUPS = 20
"""Searching for a name in another case lists a whole folder."""


@dataclass(slots=True, kw_only=True)
class ValidationSummary:
    """Counts of a validation in progress."""

    num_questions: int = 0
    num_pairs: int = 0
    num_images: int = 0
    longest: int = 0
    """Tokens of the longest row; 0 without a model."""
    errors: Counter[str] = field(default_factory=Counter)
    """Number of errors by kind."""
    layouts: dict[Path, LayoutCounts] = field(default_factory=dict)
    """What was read in each layout, by file."""
    pairs: PairSample[Pair] = field(default_factory=PairSample)
    """A sample of the pairs, to measure their shortcuts."""
    unread: list[Path] = field(default_factory=list)
    """Tables and JSON files of a folder, of which only JSON Lines and Parquet are read."""

    @property
    def num_errors(self) -> int:
        return self.errors.total()

    def add(self, error: TitaError) -> None:
        """Count an error by its message without names and numbers."""
        self.errors[re.sub(r"'[^']*'|\"[^\"]*\"|[\d,]*\d", "…", error.what)[:80]] += 1


def validate_dataset(
    path: str | Path,
    *,
    images: str | Path,
    summary: ValidationSummary,
    limit: "LengthLimit | None" = None,
    ignore: Iterable[str] = (),
    advance: Advance | None = None,
) -> Iterator[TitaError]:
    """Yield the first error of every invalid row, in the order of the rows.

    Each image is decoded once; with `limit`, its header is read again for further rows. Memory
    grows by 9 bytes per row with an id and 9 bytes per image.

    Args:
        path: a dataset file or folder; see `open_dataset`.
        images: the folder that image paths are relative to.
        summary: counts, updated with each row.
        limit: also checks the length of rows.
        ignore: columns that are treated as absent.
        advance: called once per row.
    """
    path = Path(path)
    validator = _Validator(
        images=Path(images), summary=summary, limit=limit, ignore=frozenset(ignore)
    )
    summary.unread += unread_files(path)
    for row in read_rows(path):
        try:
            validator.check(row)
        except TitaError as error:
            summary.add(error)
            yield error
        if advance is not None:
            advance()


@dataclass(slots=True, kw_only=True)
class _Validator:
    images: Path
    summary: ValidationSummary
    limit: "LengthLimit | None"
    ignore: frozenset[str]
    ids: DigestSet = field(default_factory=DigestSet)
    checked_images: DigestSet = field(default_factory=DigestSet)
    num_case_lookups: int = 0
    images_of_row: dict[str, ImageValue] = field(default_factory=dict)
    """The images of the current row by name, as the row has them."""

    def check(self, row: RawRow) -> None:
        """Count one row; raise its first error."""
        for example in read_examples(row, ignore=self.ignore):
            self._check_example(example, row)

    def _check_example(self, example: Example, row: RawRow) -> None:
        self.images_of_row = {}
        record = to_record(example, row, resolve_image=self._resolve_image)
        self.summary.layouts.setdefault(row.file, LayoutCounts()).add(example)
        if isinstance(record, Pair):
            self.summary.num_pairs += 1
            self.summary.pairs.add(record)
            question, answers = record.question, [record.chosen, record.rejected]
        else:
            self.summary.num_questions += 1
            question, answers = record.text, []
        if record.id != row.id and not self.ids.add(f"{row.file} {record.id}"):
            raise TitaError(
                f"id {record.id!r} is used by a previous row of the file",
                where=row.where,
                remedy="give each row its own id",
            )
        size = self._check_image(record.image, where=row.where) if record.image else None
        if isinstance(record, Pair) and record.rejected_image is not None:
            self._check_image(record.rejected_image, where=row.where)
        if self.limit is None:
            return
        length = self.limit.count(question, answers, size=size, context=record.context)
        self.summary.longest = max(self.summary.longest, length)
        if length > self.limit.max_tokens:
            raise TitaError(
                f"{length} tokens with its image, the limit is {self.limit.max_tokens}",
                where=row.where,
                remedy="shorten or delete the row, or train with --set too_long=drop",
            )

    def _resolve_image(self, image: ImageValue, row: RawRow) -> str:
        if isinstance(image, bytes):
            name = image_name(image)
        else:
            name = find_image(image, images=self.images, beside=row.file.parent) or image
        self.images_of_row[name] = image
        return name

    def _check_image(self, name: str, *, where: str) -> tuple[int, int] | None:
        """Decode an image that was not checked before; return its size if lengths are checked."""
        value = self.images_of_row[name]
        source = value if isinstance(value, bytes) else self.images / name
        if not self.checked_images.add(name):
            return None if self.limit is None else _read_size(source)
        if isinstance(source, Path):
            self._check_file(source, name, where=where)
        try:
            with open_image(source) as image:
                self.summary.num_images += 1
                return image.size
        except TitaError as error:
            what = error.what if isinstance(source, bytes) else f"{name!r}: {error.what}"
            raise TitaError(f"image {what}", where=where, remedy=error.remedy) from None

    def _check_file(self, path: Path, name: str, *, where: str) -> None:
        what, remedy = "", "copy the file instead"
        try:
            # From Python 3.13 on, `resolve` leaves a loop of links as it is.
            if path.is_symlink() and not path.exists():
                what = f"image {name!r} is a link to no file"
            elif not path.resolve().is_relative_to(self.images.resolve()):
                what = f"image {name!r} is a link that leaves its folder"
        except (OSError, RuntimeError):  # a loop of folders, before Python 3.13
            what = f"image {name!r} is a link to no file"
        if not what and path.is_dir():
            what, remedy = f"image {name!r} is a folder", "name a file"
        elif not what and not is_image(path) and self.num_case_lookups < _MAX_CASE_LOOKUPS:
            self.num_case_lookups += 1
            similar = name_in_other_case(path)
            if similar:
                what = f"no such image: {name!r}, but there is {similar!r}"
                remedy = "write the name in the case of the file"
        if what:
            raise TitaError(what, where=where, remedy=remedy)


def _read_size(source: Path | bytes) -> tuple[int, int] | None:
    """The size of an image from its header; None if the image is invalid, as reported before."""
    try:
        data = source if isinstance(source, bytes) else read_image(source)
        return read_size(data, where="")
    except (OSError, TitaError):
        return None
