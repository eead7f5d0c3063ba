"""Rows of CSV and TSV files: the first line names the columns."""

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tita.errors import TitaError


def table_rows(
    file: Path, *, delimiter: str
) -> Iterator[tuple[int, Mapping[str, Any] | TitaError]]:
    """The rows of a table, each with the line that it ends on; what is no row is a fault.

    A cell that holds a JSON list is taken for one (`["red", "dark red"]`), an empty one for
    nothing. Where the quotes do not fit, the fault is the last of them.
    """
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                yield reader.line_num + 1, _broken(error, file=file, line=reader.line_num + 1)
                return
            if None in row or None in row.values():
                yield (
                    reader.line_num,
                    TitaError(
                        "another number of cells than the head has",
                        where=f"{file}:{reader.line_num}",
                        remedy="put cells with the delimiter in them into quotes",
                    ),
                )
                continue
            yield reader.line_num, {name: _cell(text) for name, text in row.items() if text}


def _broken(error: Exception, *, file: Path, line: int) -> TitaError:
    if isinstance(error, UnicodeDecodeError):
        # Files are decoded block by block: the line is not known.
        return TitaError("not UTF-8", where=str(file), remedy="save the file as UTF-8")
    return TitaError(f"no table ({error})", where=f"{file}:{line}", remedy="mend the quotes")


def _cell(text: str) -> Any:
    if text.startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text
