"""Reads single values of a row: ids, texts, references, choices and images.

Every value is read completely or refused: an object never becomes its text form, and an image cell
is never ignored.
"""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Any

from tita.data import column_names as names
from tita.data.cells import (
    is_blank,
    is_empty,
    is_missing,
    is_visible,
    looks_like_list,
    number_text,
    parse_structure,
)
from tita.data.embedded_images import decode_base64, embedded_content
from tita.data.rows import RawRow
from tita.errors import TitaError
from tita.storage.manifest import is_inside
from tita.vlm.prompts import strip_ends

ImageValue = str | bytes
"""An image in a row: a path relative to the image folder, or the content of an image file."""


class ImageURL(str):
    """An image in a row as an http(s) URL, for readers that fetch images."""

    __slots__ = ()


_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_NAME_BYTES = 255
_URL = re.compile(r"(?i)\s*([a-z][a-z0-9+.-]*://)")
_MISSING_TEXT = "nan"
_NO_IMAGE = "null"
"""Text in the image cell of a table row that has no image."""


@dataclass(slots=True, kw_only=True)
class RowValues:
    """The columns of one row that have a value, and which of them were read."""

    row: RawRow
    values: Mapping[str, Any]
    urls: bool = False
    """Whether an image may be an http(s) URL; otherwise such a row is refused."""
    used: set[str] = field(default_factory=set)
    inline_images: list[ImageValue] = field(default_factory=list)
    """Images that stand inside messages."""

    @classmethod
    def parse(cls, row: RawRow, *, ignore: frozenset[str], urls: bool = False) -> "RowValues":
        """Parse a row without the columns in `ignore`."""
        values = {n: v for n, v in row.parse().items() if n not in ignore}
        return cls(row=row, values=values, urls=urls)

    def error(self, what: str, remedy: str) -> TitaError:
        return TitaError(what, where=self.row.where, remedy=remedy)

    def has(self, *columns: str) -> bool:
        """Whether one of the columns has a value; blank texts and empty lists are none."""
        return any(not is_empty(self.values.get(column)) for column in columns)

    def find(self, columns: Sequence[str]) -> str | None:
        """The first of the columns that has a value."""
        return next((column for column in columns if self.has(column)), None)

    def take(self, *columns: str, what: str) -> tuple[str, Any]:
        """The only one of the columns that has a value, and the value.

        Raises:
            TitaError: none has one, or several have different ones.
        """
        found = [column for column in columns if self.has(column)]
        if not found:
            blank = next((c for c in columns if isinstance(self.values.get(c), str)), None)
            if blank is not None:
                raise self.error(f"{blank!r} is empty or not a string", "fix the line")
            present = ", ".join(map(_plain_name, filter(self.has, self.values)))
            raise self.error(
                f"no field {columns[0]!r}", f"add the {what}; the row has {present or 'no values'}"
            )
        self.used.update(found)
        first = found[0]
        for other in found[1:]:
            if self.values[other] != self.values[first]:
                raise self.error(
                    f"{first!r} and {other!r} are both the {what}, and differ",
                    f"keep one of them, or give --ignore-column {other}",
                )
        return first, self.values[first]

    def id(self) -> tuple[str, str | int | None]:
        """The id, and the id with its JSON type; None if the row has none."""
        self.used.update(names.ID)
        column = self.find(names.ID)
        if column is None:
            return self.row.id, None
        value = self.values[column]
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.error(f"id {value!r} is neither a string nor an integer", "fix the line")
        return self.text(str(value), column), value

    def text(self, value: Any, column: str) -> str:
        """A text with a visible character."""
        if isinstance(value, list) and len(value) > 1:
            what = f"{column!r} is a list of {len(value)} values, not a text"
            raise self.error(what, "write a row for each")
        if not isinstance(value, str) or not any(map(is_visible, value)):
            raise self.error(f"{column!r} is empty or not a string", "fix the line")
        self._check_characters(value, column)
        return value

    def _check_characters(self, text: str, column: str) -> None:
        if _SURROGATE.search(text):
            what = f"{column!r} contains a lone surrogate (half a character)"
            raise self.error(what, "fix the line")

    def label(self, column: str) -> str | None:
        """A name, such as a category; None without one."""
        self.used.add(column)
        value = self.values.get(column)
        if is_empty(value):
            return None
        if isinstance(value, list | Mapping | bytes):
            raise self.error(f"{column!r} is not a text", "write a text")
        text = number_text(value) if isinstance(value, float) else str(value)
        self._check_characters(text, column)
        return text

    def references(
        self, extra: Any = None, *, columns: Sequence[str] = names.REFERENCES
    ) -> tuple[str, ...]:
        """Reference answers; further reference columns may only repeat some of them.

        An empty text is the answer of an annotator who wrote none; there are others beside it.

        Args:
            extra: an answer that stands in another place, such as at the end of a conversation.
            columns: the columns that may hold them.
        """
        found = [column for column in columns if self.has(column)]
        self.used.update(columns)
        read = [(column, self.texts(self.values[column], column)) for column in found]
        if extra is not None:
            read.insert(0, ("the last message", (extra,)))
        if not read:
            return ()
        first, references = max(read, key=lambda each: len(each[1]))
        for column, texts in read:
            if not set(texts) <= set(references):
                raise self.error(
                    f"{first!r} and {column!r} are different answers",
                    f"keep one of them, or give --ignore-column {column}",
                )
        return tuple(text and self.text(strip_ends(text), first) for text in references)

    def texts(self, value: Any, column: str) -> tuple[str, ...]:
        """One value or a list as texts, none if all are empty; objects have an `answer`.

        Nulls are left out. Empty texts are not: metrics count annotators.
        """
        parts = [part for part in self.list_of(value, column) if not is_missing(part)]
        texts = tuple("" if _is_no_answer(part) else self.text_of(part, column) for part in parts)
        return texts if any(texts) else ()

    def text_of(self, part: Any, column: str) -> str:
        """A text, or a number or boolean as one; 3.0 is 3, which pandas makes of integers."""
        if isinstance(part, Mapping):
            part = part.get("answer")
        if isinstance(part, bool):
            return str(part).lower()
        if not isinstance(part, str | int | float) or part in (math.inf, -math.inf):
            what = f"{column!r} contains a value that is not a text"
            raise self.error(what, "write texts, or objects with an `answer`")
        text = self.text(number_text(part) if isinstance(part, float) else str(part), column)
        if text.strip() == _MISSING_TEXT:
            what = f"{column!r} contains {text!r}, which pandas writes for a missing value"
            raise self.error(what, "leave the cell empty")
        if not isinstance(parse_structure(text), str):
            what = f"{column!r} contains a list or an object as text"
            raise self.error(what, "write a list of texts")
        return text

    def list_of(self, value: Any, column: str) -> list[Any]:
        """One value, a list, or a list as text, as a list."""
        parsed = parse_structure(value)
        if parsed is value and isinstance(value, str) and looks_like_list(value):
            raise self.error(
                f"{column!r} is a list in a text that cannot be read",
                'write a JSON list of texts, such as ["a", "b"]',
            )
        return list(parsed) if isinstance(parsed, list | tuple) else [parsed]

    def images(self) -> tuple[ImageValue, ...]:
        """The images of the row, in order; empty if the row says that it has none.

        Raises:
            TitaError: an image cell is blank or of another type, or columns name different images.
        """
        numbered = sorted(
            (c for c in self.values if names.NUMBERED_IMAGE.fullmatch(c)),
            key=lambda c: int(re.sub(r"\D", "", c)),
        )
        groups = [[column] for column in (*names.IMAGE, *names.IMAGE_ID)] + [numbered]
        self.used.update(*groups)
        found: list[tuple[str, tuple[ImageValue, ...]]] = []
        for columns in groups:
            cells = [image for column in columns for image in self._image_cells(column)]
            if cells:
                found.append((columns[0], tuple(cells)))
        if not found:
            blank = next(
                (c for group in groups for c in group if is_blank(self.values.get(c))), None
            )
            if blank is not None:
                what = f"image {blank!r} is blank"
                raise self.error(what, "write the path of the image, or null if there is none")
        if self.inline_images:
            if found:
                what = f"images in {found[0][0]!r} and in the messages"
                raise self.error(what, "keep one of them")
            return tuple(self.inline_images)
        return self._one_source(found)

    def rejected_image(self) -> ImageValue | None:
        """The image under which the chosen answer is a worse one; None without one."""
        if not self.has(*names.REJECTED_IMAGE):
            return None
        column, _ = self.take(*names.REJECTED_IMAGE, what="image of the worse context")
        images = self._image_cells(column)
        if len(images) > 1:
            raise self.error(f"{len(images)} images in {column!r}", "keep one: a row has one image")
        if not images:
            raise self.error(f"{column!r} is blank", "write the path of the image, or null")
        return images[0]

    def _one_source(
        self, found: list[tuple[str, tuple[ImageValue, ...]]]
    ) -> tuple[ImageValue, ...]:
        """The images of the best column, if the others are other names of them."""
        if not found:
            return ()
        stored = [each for each in found if isinstance(each[1][0], bytes)]
        column, images = (stored or found)[0]
        if len(stored) > 1:
            what = f"images in {stored[0][0]!r} and {stored[1][0]!r}"
            raise self.error(what, f"give --ignore-column {stored[1][0]}")
        for other, cells in found:
            if other == column or other in names.IMAGE_ID:
                continue
            same_number = len(cells) == len(images)
            if not same_number or (not stored and not _same_files(images, cells)):
                raise self.error(
                    f"{column!r} and {other!r} are different images",
                    f"keep one of them, or give --ignore-column {other}",
                )
        return images

    def _image_cells(self, column: str) -> list[ImageValue]:
        value = self.values.get(column)
        value = parse_structure(value) if isinstance(value, str) else value
        cells = value if isinstance(value, list | tuple) else [value]
        if isinstance(value, list | tuple) and any(map(is_blank, cells)):
            raise self.error(
                f"{column!r} contains a blank image", "write its path, or leave it out"
            )
        images = (self.image_cell(cell) for cell in cells)
        return [image for image in images if image is not None]

    def image_cell(self, cell: Any) -> ImageValue | None:
        """One image; None for null and blank texts.

        A `data:` URL, or an image in base64, becomes the content of the file.
        """
        if isinstance(cell, Mapping):  # the `datasets.Image` feature
            if not cell.keys() & {"bytes", "path"} or cell.keys() - {"bytes", "path"}:
                what = f"an image is an object with {', '.join(map(str, cell)) or 'no keys'}"
                raise self.error(what, "write the path of the image")
            cell = cell.get("bytes") or cell.get("path")
        if cell is None or isinstance(cell, bytes):
            return cell or None
        if isinstance(cell, bool) or not isinstance(cell, str | int):
            what = f"an image of type {type(cell).__name__}"
            raise self.error(what, "write the path of the image")
        text = str(cell)
        if not text.strip() or text == _NO_IMAGE:
            return None
        embedded = embedded_content(text)
        return self._image_path(text) if embedded is None else self._decode(embedded)

    def _decode(self, base64: str) -> bytes:
        content = decode_base64(base64)
        if content is None:
            what = f"the image {base64[:20]!r}... is not complete base64"
            remedy = "write the whole file, or its path; Excel cuts cells at 32,767 characters"
            raise self.error(what, remedy)
        return content

    def _image_path(self, path: str) -> str:
        """Check a path; one that leaves the folder could send any local file to an endpoint."""
        if scheme := _URL.match(path):
            if self.urls and scheme[1].lower() in ("http://", "https://"):
                return ImageURL(path.strip())
            what = f"image {path[:60]!r} is a URL, not a file"
            raise self.error(what, "download it and write its path")
        if path.startswith("data:"):
            what = f"image {path[:60]!r} is no image in base64"
            raise self.error(what, "write data:image/...;base64,..., or the path of a file")
        if not is_inside(path) or PureWindowsPath(path).drive:
            raise self.error(f"image path {path[:60]!r} leaves its folder", "write a relative path")
        if "\\" in path:
            raise self.error(f"image path {path!r} has backslashes", "write forward slashes")
        if any(len(part.encode("utf-8", "replace")) > _MAX_NAME_BYTES for part in path.split("/")):
            what = f"image path {path[:40]!r}... is longer than a file name can be"
            raise self.error(what, "write the path of a file, or data:image/...;base64,...")
        if not path.isprintable():
            raise self.error(f"image path {path!r} has control characters", "rename the image")
        return path

    def check_all_used(self, layout: str, *, has_images: bool) -> None:
        """Check that no column with a value is left over.

        Args:
            layout: name of the row's layout, for errors.
            has_images: if not, columns that may name an image are no mere metadata.

        Raises:
            TitaError: columns are left over, which are named.
        """
        known = self.used | names.METADATA
        if not has_images:
            known -= names.IMAGE_SOURCES - self.used
        left = [
            column
            for column, value in self.values.items()
            if not (is_empty(value) or value == _MISSING_TEXT)
            and (column not in known or self._hides_content(column, has_images=has_images))
            and not (column == "" and str(value).isdecimal())  # the index of a pandas table
        ]
        if left:
            columns = ", ".join(map(repr, left[:5]))
            options = " ".join(f"--ignore-column {shlex.quote(column)}" for column in left[:5])
            raise self.error(
                f"not used in the {layout} layout: {columns}",
                f"rename what is meant, or give {options}",
            )

    def _hides_content(self, column: str, *, has_images: bool) -> bool:
        """Whether metadata is an object with an image or a system prompt that the row lacks."""
        value = parse_structure(self.values[column])
        if column in self.used or not isinstance(value, Mapping):
            return False
        content = {*names.SYSTEM, "history", *(() if has_images else names.IMAGE)}
        return any(not is_empty(value[key]) for key in content & value.keys())


def _is_no_answer(part: Any) -> bool:
    return (part.get("answer") if isinstance(part, Mapping) else part) == ""


def _plain_name(column: str) -> str:
    """A column's name for a message, with quotes if blanks would not be seen."""
    return column if column == column.strip() and column else repr(column)


def _same_files(images: Sequence[ImageValue], others: Sequence[ImageValue]) -> bool:
    def names_of(cells: Sequence[ImageValue]) -> list[str]:
        return [str(cell).rpartition("/")[2] for cell in cells]

    return names_of(images) == names_of(others)
