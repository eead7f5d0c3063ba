"""Rows of Parquet files and of folders that `datasets.save_to_disk` wrote, a few at a time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tita.errors import TitaError

# Rows may carry images of megabytes.
_ROWS_AT_ONCE = 32


def parquet_rows(file: Path) -> Iterator[Mapping[str, Any] | TitaError]:
    """The rows of a Parquet file; where it cannot be read on, the fault is the last of them."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise _missing(file) from None
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            if not opened.metadata.num_rows:
                yield TitaError("no rows in it", where=str(file), remedy="fill it or remove it")
            for batch in opened.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        yield _broken(file, "a whole Parquet file", error)


def saved_rows(folder: Path) -> Iterator[Mapping[str, Any] | TitaError]:
    """The rows of a saved `datasets.Dataset`, images as they were stored: bytes or a path.

    A saved `DatasetDict` must have one split; else the split's folder is to be named.
    """
    try:
        import datasets
    except ImportError:
        raise _missing(folder) from None
    try:
        # Memory-mapped; and as Arrow tables, which decode no image.
        rows = datasets.load_from_disk(str(_only_split(folder))).with_format("arrow")
        for table in rows.iter(batch_size=_ROWS_AT_ONCE):
            yield from table.to_pylist()
    except TitaError as error:
        yield error
    except Exception as error:
        # A torn state.json, feature types of another version, a missing part: of any type.
        yield _broken(folder, "a whole folder of `datasets.save_to_disk`", error)


def _only_split(folder: Path) -> Path:
    if not (folder / "dataset_dict.json").is_file():
        return folder
    splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if len(splits) != 1:
        raise TitaError(
            f"holds the splits {', '.join(splits)}",
            where=str(folder),
            remedy=f"name one, as {folder / str((splits or ['train'])[0])}",
        )
    return folder / str(splits[0])


def _broken(path: Path, what: str, error: Exception) -> TitaError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return TitaError(f"not {what} ({first})", where=str(path), remedy="write it again")


def _missing(path: Path) -> TitaError:
    return TitaError("no reader of Parquet here", where=str(path), remedy="pip install 'tita[ml]'")
