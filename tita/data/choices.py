"""Reads the options of a multiple-choice question: a list, an object, or a column per option."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from tita.data import column_names as names
from tita.data.cells import is_missing, parse_structure
from tita.data.row_values import RowValues

_LETTERS = string.ascii_uppercase
_LABEL = re.compile(r"[(\[]?([A-Z])[)\].:]\s+(?=\S)")


def read_choices(row: RowValues) -> tuple[str, ...]:
    """The options in the order of their letters, without letters in front of them.

    Raises:
        TitaError: options have gaps, their labels are not A, B, ..., or a value is no text.
    """
    column = row.find(names.CHOICES)
    row.used.update(names.CHOICES)
    if column is not None:
        return _without_labels(row, _listed(row, column), column)
    for columns in names.LETTERED_CHOICES:
        cells = [row.values.get(column) for column in columns]
        while cells and _is_absent(cells[-1]):
            cells.pop()
        if cells:
            row.used.update(columns)
            return _without_labels(row, _texts(row, cells, columns[0]), columns[0])
    return ()


def _listed(row: RowValues, column: str) -> tuple[str, ...]:
    value = parse_structure(row.values[column])
    if isinstance(value, Mapping):
        if value.keys() == {"text", "label"}:
            letters, value = list(value["label"] or ()), list(value["text"] or ())
        else:
            letters = sorted(value)
            value = [value[letter] for letter in letters]
        if letters != list(_LETTERS[: len(value)]):
            what = f"{column!r} has the labels {', '.join(map(str, letters))[:60]}"
            raise row.error(what, "label the options A, B, ... in this order, or write a list")
    cells = row.list_of(value, column)
    while cells and _is_absent(cells[-1]):
        cells.pop()
    return _texts(row, cells, column)


def _texts(row: RowValues, cells: Sequence[Any], column: str) -> tuple[str, ...]:
    absent = [letter for letter, cell in zip(_LETTERS, cells, strict=False) if _is_absent(cell)]
    if absent:
        what = f"the options in {column!r} have gaps: {', '.join(absent)} is empty"
        raise row.error(what, "give the options without gaps")
    return tuple(row.text_of(cell, column) for cell in cells)


def _is_absent(cell: Any) -> bool:
    """Whether an option is not there: MMBench's tables also write `nan`."""
    return is_missing(cell) or (isinstance(cell, str) and cell.strip() in ("", "nan"))


def _without_labels(row: RowValues, texts: tuple[str, ...], column: str) -> tuple[str, ...]:
    """The texts without their letters ("A. cat"), if each has one."""
    labels = [_LABEL.match(text) for text in texts]
    if len(texts) < 2 or not all(labels):
        return texts
    letters = [label[1] for label in labels if label]
    if letters != list(_LETTERS[: len(texts)]):
        what = f"the options in {column!r} begin with {', '.join(letters)}"
        raise row.error(what, "put them in the order of their letters")
    return tuple(text[label.end() :] for text, label in zip(texts, labels, strict=True) if label)
