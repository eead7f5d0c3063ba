"""Finds and parses the files of published evaluation suites; errors name file and line."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tita.data.rows import NOT_UTF8, read_rows
from tita.errors import TitaError


def find_file(source: Path, *patterns: str) -> Path:
    """The file in `source` that matches the first pattern with a match.

    Raises:
        TitaError: no file matches, or several match the same pattern.
    """
    for pattern in patterns:
        found = sorted(source.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise TitaError(
                f"several files match {pattern} ({names})",
                where=str(source),
                remedy="keep one of them",
            )
        if found:
            return found[0]
    raise TitaError(
        f"no {' or '.join(patterns)} in the folder",
        where=str(source),
        remedy="give the folder of the published files",
    )


def read_utf8(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        TitaError: the file has another encoding.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, line=content[: error.start].count(b"\n") + 1) from None


def _not_utf8(path: Path, *, line: int) -> TitaError:
    what, remedy = NOT_UTF8
    return TitaError(what, where=f"{path}:{line}", remedy=remedy)


def load_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        TitaError: the file is not valid JSON in UTF-8.
    """
    try:
        return json.loads(read_utf8(path))
    except (ValueError, RecursionError) as error:
        raise TitaError(f"not valid JSON ({error})", where=str(path)) from None


def load_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, without null values.

    Raises:
        TitaError: a line is not a JSON object.
    """
    for row in read_rows(path):
        yield {name: value for name, value in row.parse().items() if value is not None}


def read_table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a tab-separated table with their line numbers; absent cells are empty.

    Raises:
        TitaError: the table is not in UTF-8, or a row has more cells than the header.
    """
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, delimiter="\t", restval="")
        try:
            for row in table:
                if None in row:
                    raise TitaError("more cells than the header", where=f"{path}:{table.line_num}")
                yield table.line_num, row
        except UnicodeDecodeError:
            raise _not_utf8(path, line=table.line_num + 1) from None
        except csv.Error as error:
            raise TitaError(f"no table ({error})", where=f"{path}:{table.line_num}") from None
