"""Reads dataset files row by row: JSONL, JSON arrays, CSV, TSV, Parquet, saved HF datasets.

A broken row does not end the iteration: its error is raised when that row is parsed.
"""

import csv
import itertools
import json
import sys
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita.data.embedded_images import file_may_embed_images, may_embed_images
from tita.errors import TitaError

MAX_LINE_BYTES = 16 << 20
"""A file with a longer line is not JSON Lines."""

NOT_UTF8 = ("not UTF-8; it may be Windows-1252 or GB18030", "save the file as UTF-8")
_Content = bytes | Mapping[str, Any] | TitaError
_Numbered = tuple[int, int | None, _Content]
"""Number, position as in `RawRow`, and content of a row."""
_PARQUET_SUFFIXES = (".parquet", ".pq")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_DATASET_SUFFIXES = (".jsonl", *_PARQUET_SUFFIXES)
# First bytes of other formats that files named .jsonl often have.
_ARROW = ("an Arrow file", "write it as Parquet, or as a folder with `datasets.save_to_disk`")
_OTHER_FORMATS = {
    b"\x1f\x8b": ("compressed by gzip", "decompress it"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "decompress it"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"\xff\xfe": ("UTF-16, not UTF-8", "save the file as UTF-8"),
    b"\xfe\xff": ("UTF-16, not UTF-8", "save the file as UTF-8"),
    b"PAR1": ("a Parquet file by its content", "rename it to .parquet"),
    b"ARRO": _ARROW,  # ARROW1, of Arrow and Feather files
    b"\xff\xff\xff\xff": _ARROW,  # Arrow streams, as in the cache of `datasets`
}
# Small, because rows may hold images of several megabytes.
_BATCH_ROWS = 32
MAX_GROUP_BYTES = 64 << 20
"""Single rows are not read from larger row groups of Parquet, which can only be read as a whole."""


@dataclass(slots=True, kw_only=True)
class RawRow:
    """One row of a dataset file, which is parsed when it is first needed."""

    where: str
    """Position for error messages: `file:line`, or `file, row n` for formats without lines."""
    file: Path
    id: str
    """`file:number` relative to the dataset, the id of records that have none."""
    content: _Content
    position: int | None = None
    """Where `RowFinder` finds the row again in its file: its index, or the offset of its line; None
    if it can only be found by reading the file from the start."""

    def parse(self) -> Mapping[str, Any]:
        """Return the row's object.

        Raises:
            TitaError: the row is not a JSON object, or the file could not be read at this point.
        """
        if isinstance(self.content, TitaError):
            raise self.content
        if isinstance(self.content, bytes):
            self.content = _parse_json(self.content, where=self.where)
        return self.content


def read_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a file, or of all JSONL and Parquet files below a folder in name order.

    The file suffix selects the format: `.parquet` and `.pq`; `.csv`; `.tsv`; `.json`, a JSON array
    or JSON Lines; JSON Lines for all others. A folder written by `datasets.save_to_disk` is one
    dataset. Rows are streamed, except those of a JSON array.

    Raises:
        TitaError: the folder has no dataset file.
    """
    if not path.is_dir():
        yield from _read_file(path, root=path.parent)
    elif _is_saved_dataset(path):
        contents = _with_index(_read_saved_dataset(path))
        yield from _to_rows(contents, path, root=path, unit="row")
    else:
        for file in _find_files(path):
            yield from _read_file(file, root=path)


def dataset_files(path: Path) -> list[Path]:
    """The files that `read_rows` reads, and the settings of a saved dataset."""
    if not path.is_dir():
        return [path]
    if _is_saved_dataset(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    return _find_files(path)


def unread_files(path: Path) -> list[Path]:
    """Files of a folder that could be datasets but are only read when they are named alone."""
    if not path.is_dir() or _is_saved_dataset(path):
        return []
    return _files_with_suffix(path, (".json", *_DELIMITERS))


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _files_with_suffix(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in suffixes
        and file.is_file()
        # `.cache/huggingface` and `.git` hold copies.
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _find_files(folder: Path) -> list[Path]:
    files = _files_with_suffix(folder, _DATASET_SUFFIXES)
    if not files:
        raise TitaError(
            "no .jsonl or .parquet file in it",
            where=str(folder),
            remedy="name a dataset file or a folder that has some",
        )
    return files


def _read_file(file: Path, *, root: Path) -> Iterator[RawRow]:
    suffix = file.suffix.lower()
    if suffix in _PARQUET_SUFFIXES:
        return _to_rows(_read_parquet(file), file, root=root, unit="row")
    error = _check_format(file)
    if error is not None:
        return iter([RawRow(where=str(file), file=file, id="", content=error)])
    if suffix in _DELIMITERS:
        return _to_rows(_read_table(file, delimiter=_DELIMITERS[suffix]), file, root=root)
    if suffix == ".json" and _is_one_value(file):
        entries = ((n, None, entry) for n, entry in enumerate(_read_entries(file), start=1))
        return _to_rows(entries, file, root=root, unit="entry")
    return _to_rows(_read_lines(file), file, root=root)


def _with_index(contents: Iterable[_Content]) -> Iterator[_Numbered]:
    return ((index + 1, index, content) for index, content in enumerate(contents))


def _to_rows(
    contents: Iterable[_Numbered], file: Path, *, root: Path, unit: str = ""
) -> Iterator[RawRow]:
    """Add positions to numbered contents: lines, or another `unit`; none at all are an error."""
    name = file.relative_to(root).as_posix()
    is_empty = True
    for number, position, content in contents:
        is_empty = False
        where = f"{file}, {unit} {number}" if unit else f"{file}:{number}"
        identity = f"{name}:{number}"
        yield RawRow(where=where, file=file, id=identity, content=content, position=position)
    if is_empty:
        error = TitaError("no rows in it", where=str(file), remedy="fill it or remove it")
        yield RawRow(where=str(file), file=file, id="", content=error)


def _check_format(file: Path) -> TitaError | None:
    with file.open("rb") as opened:
        head = opened.read(4)
    for magic, (what, remedy) in _OTHER_FORMATS.items():
        if head.startswith(magic):
            return TitaError(what, where=str(file), remedy=remedy)
    # ASCII in UTF-16 without a mark at the start.
    if len(head) == 4 and (head[::2] == b"\0\0") != (head[1::2] == b"\0\0"):
        what, remedy = _OTHER_FORMATS[b"\xff\xfe"]
        return TitaError(what, where=str(file), remedy=remedy)
    if not head:
        return TitaError("an empty file", where=str(file), remedy="fill it or remove it")
    return None


def _read_lines(file: Path) -> Iterator[_Numbered]:
    with file.open("rb") as lines:
        number = end = 0
        while line := lines.readline(MAX_LINE_BYTES):
            number += 1
            start, end = end, end + len(line)
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                what = f"a line of more than {MAX_LINE_BYTES >> 20} MiB"
                remedy = "write one object per line and store images as files"
                yield number, None, TitaError(what, where=f"{file}:{number}", remedy=remedy)
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_LINE_BYTES)
                    end += len(line)
            elif line.strip():
                yield number, start, line


def _parse_json(line: bytes, *, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_to_object)
        if isinstance(row, dict):
            return row
        what, remedy = "not a JSON object", "write one object per line"
    except UnicodeDecodeError:
        what, remedy = NOT_UTF8
    except _DuplicateKey as error:
        what, remedy = str(error), "keep one of them"
    except json.JSONDecodeError as error:
        what, remedy = f"not JSON ({error.msg} at column {error.colno})", "fix the line"
    except (ValueError, RecursionError):
        what = "JSON with too many digits in a number or too many nested brackets"
        remedy = "fix or delete the line"
    if b"\0" in line:
        what, remedy = "contains NUL bytes", "copy the file again"
    raise TitaError(what, where=where, remedy=remedy)


class _DuplicateKey(ValueError):
    """An object has a key twice; JSON parsers silently take the last value."""


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    key = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
    raise _DuplicateKey(f"the key {key!r} twice in one object")


def _is_one_value(file: Path) -> bool:
    """Whether a JSON file is an array, or an object of several lines, and not JSON Lines."""
    with file.open("rb") as opened:
        start = opened.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
    first_line = start.partition(b"\n")[0].rstrip()
    is_cut = first_line.startswith(b"{") and b"\n" in start and not first_line.endswith(b"}")
    return start.startswith(b"[") or is_cut


def _read_entries(file: Path) -> Iterator[_Content]:
    """Yield the entries of an array; an object is the only entry."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        entries = json.loads(text, object_pairs_hook=_to_object)
    except UnicodeDecodeError:
        what, remedy = NOT_UTF8
        yield TitaError(what, where=str(file), remedy=remedy)
        return
    except _DuplicateKey as error:
        yield TitaError(str(error), where=str(file), remedy="keep one of them")
        return
    except (ValueError, RecursionError) as error:
        yield TitaError(f"not JSON ({error})", where=str(file), remedy="fix the file")
        return
    if isinstance(entries, dict):
        entries = [entries]
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, dict):
            yield entry
        else:
            where = f"{file}, entry {number}"
            yield TitaError("not a JSON object", where=where, remedy="replace it by an object")


def _read_table(file: Path, *, delimiter: str) -> Iterator[_Numbered]:
    """Yield the rows of a CSV or TSV file, each with the number of its last line.

    The first line names the columns. All cells are texts. The rest of the file after a quoting
    error cannot be read.
    """
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            columns = reader.fieldnames or ()
            error = _check_header(columns, file, delimiter=delimiter)
            if error is not None:
                yield 1, None, error
                return
            # A table of pandas has one column without a name; of several, all values are read.
            reader.fieldnames = [
                name or (f"column {number}" if "" in columns[: number - 1] else "")
                for number, name in enumerate(columns, start=1)
            ]
            for row in reader:
                if None in row or None in row.values():
                    what = "another number of cells than the header has"
                    where, remedy = f"{file}:{reader.line_num}", "quote cells with the delimiter"
                    yield reader.line_num, None, TitaError(what, where=where, remedy=remedy)
                else:
                    yield reader.line_num, None, dict(row)
        except csv.Error as error:
            number, what = reader.line_num + 1, f"no table ({error})"
            yield number, None, TitaError(what, where=f"{file}:{number}", remedy="fix the quotes")
        except UnicodeDecodeError:
            # The file is decoded in blocks, so the exception does not know the line.
            number, (what, remedy) = _undecodable_line(file), NOT_UTF8
            yield number, None, TitaError(what, where=f"{file}:{number}", remedy=remedy)


def _check_header(columns: Sequence[str], file: Path, *, delimiter: str) -> TitaError | None:
    """The error of a table's first line: not the names of its columns, or one of them twice."""
    twice = [name for name, number in Counter(columns).items() if name and number > 1]
    others = [mark for mark in (",", ";", "\t", "|") if mark != delimiter]
    if columns and columns[0].lower().startswith("sep="):
        what, remedy = "not the names of the columns, but Excel's separator", "delete the line"
    elif twice:
        what, remedy = f"two columns have the name {twice[0]!r}", "rename or delete one of them"
    elif len(columns) == 1 and (found := next((m for m in others if m in columns[0]), None)):
        what, remedy = f"the columns are separated by {found!r}", f"separate them by {delimiter!r}"
    else:
        return None
    return TitaError(what, where=f"{file}:1", remedy=remedy)


def _undecodable_line(file: Path) -> int:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _read_parquet(file: Path) -> Iterator[_Numbered]:
    number = 0
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise _missing_extra(file) from None
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            is_found_again = largest_group(opened) <= MAX_GROUP_BYTES
            for batch in opened.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, number - 1 if is_found_again else None, row
    except (pyarrow.ArrowException, OSError) as error:
        yield number + 1, None, _damaged(file, "a complete Parquet file", error)


def largest_group(opened: Any) -> int:
    """Bytes of the largest row group of a `ParquetFile`, as they are read."""
    groups = map(opened.metadata.row_group, range(opened.num_row_groups))
    return max((group.total_byte_size for group in groups), default=0)


def _read_saved_dataset(folder: Path) -> Iterator[_Content]:
    """Yield the rows of a saved `datasets.Dataset`, or of a `DatasetDict` with one split.

    Images stay as stored: bytes or a path.
    """
    try:
        import datasets
    except ImportError:
        raise _missing_extra(folder) from None
    try:
        # Memory-mapped Arrow tables: no image is decoded.
        rows = datasets.load_from_disk(str(_find_split(folder))).with_format("arrow")
        for table in rows.iter(batch_size=_BATCH_ROWS):
            yield from table.to_pylist()
    except TitaError as error:
        yield error
    except Exception as error:
        # A damaged state.json, feature types of another version, a missing file: of any type.
        yield _damaged(folder, "a complete folder of `datasets.save_to_disk`", error)


def may_store_images(path: Path) -> bool:
    """Whether rows of a dataset may hold the content of images.

    Parquet files have a type of columns for it, other files may embed images as text. A damaged
    file has none; its error is raised when its rows are read.
    """
    if path.is_dir() and _is_saved_dataset(path):
        return True
    files = _find_files(path) if path.is_dir() else [path]
    return any(
        _parquet_has_images(file)
        if file.suffix.lower() in _PARQUET_SUFFIXES
        else file_may_embed_images(file)
        for file in files
    )


def _parquet_has_images(file: Path) -> bool:
    """Whether a column is binary, or the first rows embed images as text."""
    try:
        import pyarrow
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as opened:
            if any("binary" in str(field.type) for field in opened.schema_arrow):
                return True
            first = next(opened.iter_batches(batch_size=_BATCH_ROWS), None)
    except (ImportError, OSError, pyarrow.ArrowException):
        return False
    return first is not None and may_embed_images(repr(first.to_pylist()).encode())


class RowFinder:
    """Reads single rows of the files of one dataset again, by their position.

    It has at most one row group of a Parquet file in memory. Threads and forked processes may share
    it.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._opened: dict[Path, Any] = {}
        self._starts: dict[Path, list[int]] = {}
        """Of each Parquet file: the index of the first row of each row group."""
        self._group: tuple[Path, int, Any] | None = None

    def read(self, file: Path, position: int) -> Mapping[str, Any]:
        """The content of the row that `read_rows` has read at this position.

        Raises:
            TitaError: the file has changed since.
        """
        try:
            if file.is_dir() or file.suffix.lower() in _PARQUET_SUFFIXES:
                read = self._read_saved if file.is_dir() else self._read_parquet
                with self._guard:
                    return read(file, position)
            with file.open("rb") as lines:
                lines.seek(position)
                return _parse_json(lines.readline(MAX_LINE_BYTES), where=str(file))
        # Those of pyarrow are ValueErrors.
        except (OSError, IndexError, ValueError, TitaError) as error:
            raise _damaged(file, "the file that was read before", error) from error

    def _read_saved(self, folder: Path, index: int) -> Mapping[str, Any]:
        if folder not in self._opened:
            import datasets

            rows = datasets.load_from_disk(str(_find_split(folder)))
            self._opened[folder] = rows.with_format("arrow")
        row: Mapping[str, Any] = self._opened[folder][index : index + 1].to_pylist()[0]
        return row

    def _read_parquet(self, file: Path, index: int) -> Mapping[str, Any]:
        import pyarrow.parquet

        if file not in self._opened:
            opened = pyarrow.parquet.ParquetFile(file, memory_map=True)
            sizes = (opened.metadata.row_group(n).num_rows for n in range(opened.num_row_groups))
            self._opened[file] = opened
            self._starts[file] = list(itertools.accumulate(sizes, initial=0))
        starts = self._starts[file]
        number = bisect_right(starts, index) - 1
        if self._group is None or self._group[:2] != (file, number):
            self._group = None
            # Threads of this library do not survive a fork.
            table = self._opened[file].read_row_group(number, use_threads=False)
            self._group = file, number, table
        row: Mapping[str, Any] = self._group[2].slice(index - starts[number], 1).to_pylist()[0]
        return row


def _find_split(folder: Path) -> Path:
    if not (folder / "dataset_dict.json").is_file():
        return folder
    splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if len(splits) != 1:
        raise TitaError(
            f"has the splits {', '.join(splits)}",
            where=str(folder),
            remedy=f"name one of them: {folder / str((splits or ['train'])[0])}",
        )
    return folder / str(splits[0])


def _damaged(path: Path, what: str, error: Exception) -> TitaError:
    reason = error.what if isinstance(error, TitaError) else str(error)
    first_line = (reason.strip().splitlines() or [type(error).__name__])[0][:200]
    return TitaError(f"not {what} ({first_line})", where=str(path), remedy="write it again")


def _missing_extra(path: Path) -> TitaError:
    return TitaError(
        "pyarrow or datasets is not installed", where=str(path), remedy="pip install 'tita[ml]'"
    )
