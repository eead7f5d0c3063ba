"""The records of a question file, in any form that `tita.data` reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tita.data.rows import read_rows

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file, each with where it stands; fields without a value are left out.

    Raises:
        TitaError: a line or row does not fit.
    """
    for row in read_rows(path):
        yield row.where, {name: value for name, value in row.parse().items() if value is not None}
