"""The records of a question file, whatever its form: JSONL, a JSON array, CSV, TSV or Parquet."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tita.errors import TitaError

Records = Iterator[tuple[str, dict[str, Any]]]
"""Each record with where it stands, for errors."""


ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_records(path: Path) -> Records:
    """The records of a file, by its ending; what is none of the others is JSONL.

    In a table, a cell that holds a JSON list is taken for one (`["red", "dark red"]`), and an empty
    one for nothing.

    Raises:
        TitaError: a line or row does not fit.
    """
    match path.suffix.lower():
        case ".csv":
            return _table(path, delimiter=",")
        case ".tsv":
            return _table(path, delimiter="\t")
        case ".parquet":
            return _parquet(path)
        case ".json" if _is_array(path):
            return _array(path)
        case _:  # published sets have JSONL in files that end in .json
            return read_lines(path)


def read_lines(path: Path) -> Records:
    """The records of a JSONL file."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise TitaError(f"not JSON ({error.msg})", where=where) from None
            yield where, _object(record, where=where)


def _is_array(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(512).lstrip().startswith("[")


def _array(path: Path) -> Records:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TitaError(f"not JSON ({error})", where=str(path)) from None
    for number, record in enumerate(records, start=1):
        where = f"{path}, entry {number}"
        yield where, _object(record, where=where)


def _table(path: Path, *, delimiter: str) -> Records:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as table:
        reader = csv.DictReader(table, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise TitaError("another number of cells than the head has", where=where)
                yield where, {name: _cell(text) for name, text in row.items() if text}
        except csv.Error as error:
            where = f"{path}:{reader.line_num + 1}"
            raise TitaError(f"no table ({error})", where=where) from None


def _cell(text: str) -> Any:
    if text.startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    return text


def _parquet(path: Path) -> Records:
    try:
        import pyarrow as arrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError:
        raise TitaError(
            "no reader of Parquet here", where=str(path), remedy="pip install 'tita[ml]'"
        ) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", {k: v for k, v in row.items() if v is not None}
    except arrow.ArrowException as error:
        raise TitaError(f"no Parquet file ({error})", where=str(path)) from None


def _object(record: Any, *, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise TitaError("not a JSON object", where=where)
    return record
