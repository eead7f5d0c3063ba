"""Tables as plain text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every name that a row has, in the order of first use."""
    return list(dict.fromkeys(name for row in rows for name in row))


def text_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table with aligned columns; None is a dash, floats have three digits."""
    names = columns_of(rows)
    cells = [names, *([_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(names))]
    return [
        "  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    ]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
