"""The rows of a dataset: JSON Lines, a JSON array, CSV, Parquet or a Hugging Face folder."""

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita.errors import TitaError

Content = bytes | Mapping[str, Any] | TitaError

MAX_LINE_BYTES = 16 << 20
"""A longer line is taken for a file that is no JSON Lines."""

_PARQUET = (".parquet", ".pq")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_ENDINGS = (".jsonl", *_PARQUET)
# What files begin with that are often renamed to .jsonl.
_OTHER_FORMATS = {
    b"\x1f\x8b": ("compressed by gzip", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"\xff\xfe": ("UTF-16, not UTF-8", "save the file as UTF-8"),
    b"\xfe\xff": ("UTF-16, not UTF-8", "save the file as UTF-8"),
    b"PAR1": ("a Parquet file by its content", "name it .parquet"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row, not yet looked into: a bad one is told when it is read, and the next one follows."""

    where: str
    """How errors name it: `file:line`, or `file, row n` where there are no lines."""
    file: Path
    id: str
    """What tells it from all other rows of its dataset, for those without an id of their own."""
    content: Content

    def read(self) -> Mapping[str, Any]:
        """The row's object.

        Raises:
            TitaError: it is none.
        """
        if isinstance(self.content, TitaError):
            raise self.content
        if isinstance(self.content, bytes):
            return _parse(self.content, where=self.where)
        return self.content


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a file, or of all JSONL and Parquet files below a folder in order of their names.

    A file's form goes by its ending: `.parquet`; `.csv` and `.tsv`; `.json`, which may hold an
    array or JSON Lines; all else is JSON Lines. A folder that `datasets.save_to_disk` wrote is read
    as such. Rows come one by one; only a JSON array is held as a whole.

    Raises:
        TitaError: nothing there to read.
    """
    if not path.is_dir():
        yield from _rows_of_file(path, root=path.parent)
    elif _is_saved(path):
        yield from _numbered(saved_rows(path), path, root=path, word="row")
    else:
        for file in _files_below(path):
            yield from _rows_of_file(file, root=path)


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _files_below(folder: Path) -> list[Path]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in _ENDINGS
        and file.is_file()
        # `.cache/huggingface` and `.git` hold copies.
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise TitaError(
            "no .jsonl or .parquet file in it",
            where=str(folder),
            remedy="name a file or the folder of some",
        )
    return files


def _rows_of_file(file: Path, *, root: Path) -> Iterator[Row]:
    if file.suffix.lower() in _PARQUET:
        return _numbered(parquet_rows(file), file, root=root, word="row")
    fault = _fault_of_file(file)
    if fault is not None:
        return iter([Row(where=str(file), file=file, id="", content=fault)])
    delimiter = _DELIMITERS.get(file.suffix.lower())
    if delimiter:
        return _table(file, root=root, delimiter=delimiter)
    if file.suffix.lower() == ".json" and _is_array(file):
        return _numbered(_array(file), file, root=root, word="entry")
    return _lines(file, root=root)


def _fault_of_file(file: Path) -> TitaError | None:
    with file.open("rb") as opened:
        head = opened.read(4)
    for magic, (what, remedy) in _OTHER_FORMATS.items():
        if head.startswith(magic):
            return TitaError(what, where=str(file), remedy=remedy)
    if not head:
        return TitaError("an empty file", where=str(file), remedy="fill it or remove it")
    return None


def _lines(file: Path, *, root: Path) -> Iterator[Row]:
    name = file.relative_to(root).as_posix()
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_LINE_BYTES):
            number += 1
            content: Content = line
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                content = TitaError(
                    f"a line of more than {MAX_LINE_BYTES >> 20} MiB",
                    where=f"{file}:{number}",
                    remedy="write one object a line, with images beside the file",
                )
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_LINE_BYTES)
            elif not line.strip():
                continue
            yield Row(where=f"{file}:{number}", file=file, id=f"{name}:{number}", content=content)


def _table(file: Path, *, root: Path, delimiter: str) -> Iterator[Row]:
    name = file.relative_to(root).as_posix()
    for number, content in table_rows(file, delimiter=delimiter):
        yield Row(where=f"{file}:{number}", file=file, id=f"{name}:{number}", content=content)


def _numbered(contents: Iterator[Content], file: Path, *, root: Path, word: str) -> Iterator[Row]:
    name = file.relative_to(root).as_posix()
    for number, content in enumerate(contents, start=1):
        yield Row(
            where=f"{file}, {word} {number}", file=file, id=f"{name}:{number}", content=content
        )


def _is_array(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array(file: Path) -> Iterator[Content]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        yield TitaError("not UTF-8", where=str(file), remedy="save the file as UTF-8")
        return
    except (ValueError, RecursionError) as error:
        yield TitaError(f"not JSON ({error})", where=str(file), remedy="mend the file")
        return
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, dict):
            yield entry
        else:
            yield TitaError(
                "not a JSON object", where=f"{file}, entry {number}", remedy="make it one"
            )


def _parse(line: bytes, *, where: str) -> Mapping[str, Any]:
    if b"\0" in line:
        raise TitaError("holds NUL bytes", where=where, remedy="copy the file again")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise TitaError("not UTF-8", where=where, remedy="save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise TitaError(
            f"not JSON ({error.msg} at column {error.colno})", where=where, remedy="mend the line"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets without end
        raise TitaError(
            "JSON beyond all bounds", where=where, remedy="mend or drop the line"
        ) from None
    if not isinstance(row, dict):
        raise TitaError("not a JSON object", where=where, remedy="write one object a line")
    return row


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
                yield reader.line_num + 1, _table_fault(error, file=file, line=reader.line_num + 1)
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


def _table_fault(error: Exception, *, file: Path, line: int) -> TitaError:
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
