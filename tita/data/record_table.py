"""The records of a dataset in a file that is mapped into memory.

A dataset is read and checked once per node, row by row, and written as an Arrow file to the node's
cache (`tita.data.row_cache`). Later starts, and the other processes of the node, only map that
file, so that records take no memory of a process. The file is written again if a file of the
dataset, or a folder of its images, has changed.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow  # type: ignore[import-untyped]

from tita import __version__
from tita.data.dataset import Dataset, default_folder
from tita.data.image_table import (
    ImageSource,
    ImageTable,
    ImageTableWriter,
    modified_ns,
    open_table,
)
from tita.data.row_cache import hold_entry
from tita.data.rows import dataset_files, read_rows
from tita.records import ContextTurn, Pair, Question
from tita.terminal import progress

R = TypeVar("R", Pair, Question)
T = TypeVar("T")
U = TypeVar("U")

_BATCH = 1_000
_MAX_SPREAD = 16
"""Rows that are farther apart on average are read one by one."""
_TICK_S = 0.02
"""Files that are written within a tick of the kernel's clock may have one modification time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFacts:
    """What is known of a table besides its records."""

    digest: str
    """SHA-256 over all records."""
    layouts: str
    """What was read, for people."""
    searched: dict[str, int]
    """Modification times of the folders that have the images."""


class RecordTable(Sequence[R], Generic[R]):
    """The pairs or questions of one dataset, which are made when they are read."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        """Open what `open_records` has built."""
        self.kind: type[R] = kind
        self.facts = TableFacts(**json.loads((path / "facts.json").read_text()))
        self.images = ImageTable(path)
        self._path, self._table = path, open_table(path / "records.arrow")

    def __reduce__(self) -> Any:
        # `datasets` hashes, that is pickles, whatever its rows are made from.
        return type(self), (self._path, self.kind)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[R]: ...
    def __getitem__(self, index: int | slice) -> R | Sequence[R]:
        if isinstance(index, slice):
            return take(self, np.arange(*index.indices(len(self)), dtype=np.int32))
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(index)
        return self._decode(self._table.slice(number, 1))[0]

    def __iter__(self) -> Iterator[R]:
        for start in range(0, len(self), _BATCH):
            yield from self._decode(self._table.slice(start, _BATCH))

    def at(self, indices: Any) -> Iterator[R]:
        """The records at some indices `[N]`, in their order."""
        for start in range(0, len(indices), _BATCH):
            some = np.asarray(indices[start : start + _BATCH])
            first, number = int(some.min()), int(np.ptp(some)) + 1
            if number <= _MAX_SPREAD * len(some):
                # Of a slice, because `take` copies all columns of its table first.
                yield from self._decode(self._table.slice(first, number).take(some - first))
            else:
                yield from (self[int(index)] for index in some)

    def count(self, column: Any) -> int:
        """The number of records that have a value of this field."""
        values = self._table.column(column)
        return len(values) - int(values.null_count)

    def source(self) -> ImageSource:
        """Its images."""
        return ImageSource(tables=(self.images,), folder=self.images.folder)

    def _decode(self, table: Any) -> list[R]:
        columns = table.to_pydict()
        columns["context"] = [_parse_context(text) for text in columns["context"]]
        if "references" in columns:
            columns["references"] = [tuple(texts) for texts in columns["references"]]
        names = list(columns)
        rows = zip(*columns.values(), strict=True)
        return [self.kind(**dict(zip(names, row, strict=True))) for row in rows]


class SelectedRows(Sequence[T]):
    """Some items of another sequence, which are not copied."""

    def __init__(self, items: Sequence[T], indices: Any) -> None:
        """`indices` is an array `[N]`."""
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return SelectedRows(self.items, self.indices[index])
        return self.items[int(self.indices[index])]

    def __iter__(self) -> Iterator[T]:
        if isinstance(self.items, RecordTable):
            return self.items.at(self.indices)
        return (self.items[int(index)] for index in self.indices)


class MappedRows(Sequence[U], Generic[T, U]):
    """A function's values of the items of another sequence, computed when they are read."""

    def __init__(self, items: Sequence[T], function: Callable[[T], U]) -> None:
        self.items, self.function = items, function

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> U: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[U]: ...
    def __getitem__(self, index: int | slice) -> U | Sequence[U]:
        if isinstance(index, slice):
            return MappedRows(self.items[index], self.function)
        return self.function(self.items[index])

    def __iter__(self) -> Iterator[U]:
        return map(self.function, self.items)


def take(items: Sequence[T], indices: Any) -> Sequence[T]:
    """The items at `indices[N]`, an array."""
    if isinstance(items, MappedRows):
        return MappedRows(take(items.items, indices), items.function)
    if isinstance(items, SelectedRows):
        return SelectedRows(items.items, items.indices[indices])
    return SelectedRows(items, indices)


def records_digest(records: Sequence[Pair | Question]) -> bytes:
    """Identifies records; those of a table are not read again."""
    if isinstance(records, RecordTable):
        return bytes.fromhex(records.facts.digest)
    digest = hashlib.sha256()
    if isinstance(records, SelectedRows):
        digest.update(records_digest(records.items))
        digest.update(np.asarray(records.indices, dtype=np.int64).tobytes())
    else:
        for record in records:
            digest.update(json.dumps(asdict(record)).encode())
    return digest.digest()


def open_records(
    path: str | Path,
    kind: type[R],
    *,
    images: str | Path | None = None,
    ignore: Iterable[str] = (),
    limit: int | None = None,
) -> RecordTable[R]:
    """The pairs or questions of a dataset in a format of `open_dataset`.

    The first call on a node reads the rows. Images that stand in them stay there, except those of
    Parquet files with row groups of more than 64 MiB, of CSV files and of JSON arrays, which are
    written to files beside the records.

    Args:
        path: a file or a folder.
        kind: of the records.
        images: the folder that image paths are relative to; default: the dataset's folder.
        ignore: columns that are treated as absent.
        limit: maximum number of records; rows behind are not read.

    Raises:
        TitaError: a row is invalid, or the cache is not writable.
    """
    path, hidden = Path(path), frozenset(ignore)
    folder = default_folder(path, images)
    options: dict[str, Any] = {"path": path, "images": folder, "ignore": hidden, "limit": limit}
    return hold_entry(
        _key(kind, **options),
        open_entry=partial(RecordTable, kind=kind),
        is_valid=_is_valid,
        build=partial(_write, kind, **options),
        origin=f"rows of {path.absolute()}",
    )


def _key(
    kind: type[Any], *, path: Path, images: Path, ignore: frozenset[str], limit: int | None
) -> str:
    digest = hashlib.sha256(_reader_digest().encode())
    places = (str(place) for place in (path, path.absolute(), images, images.absolute()))
    names = [field.name for field in fields(kind)]
    facts = [kind.__name__, *names, str(limit), *places, *sorted(ignore)]
    digest.update(json.dumps(facts).encode())
    for file in dataset_files(path):
        found = file.stat()
        digest.update(f"{file}\n{found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


@cache
def _reader_digest() -> str:
    """Identifies the code that reads rows, so that another release reads them again."""
    digest = hashlib.sha256(__version__.encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()


def _is_valid(table: RecordTable[Any]) -> bool:
    """Whether a table's images are where they were."""
    searched = table.facts.searched.items()
    is_same = all(modified_ns(Path(where)) == when for where, when in searched)
    return table.images.missing is None and is_same


def _write(
    kind: type[Any],
    into: Path,
    *,
    path: Path,
    images: Path,
    ignore: frozenset[str],
    limit: int | None,
) -> None:
    newest = max(file.stat().st_mtime for file in dataset_files(path))
    time.sleep(min(_TICK_S, max(0.0, newest + _TICK_S - time.time())))
    schema, digest = _schema(kind), hashlib.sha256()
    table = ImageTableWriter(into, folder=images)
    read = Dataset(
        path=path, rows=read_rows(path), images=images, resolve_image=table.resolve, ignore=ignore
    )
    rows: list[dict[str, Any]] = []
    names = [field.name for field in fields(kind)]
    with (
        pyarrow.ipc.new_file(str(into / "records.arrow"), schema) as sink,
        progress("reading the rows", total=None, unit="rows") as advance,
    ):

        def write_batch() -> None:
            sink.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))
            advance(len(rows))
            rows.clear()

        records: Iterator[Any] = read.pairs() if kind is Pair else read.questions()
        for record in islice(records, limit):
            row = {name: getattr(record, name) for name in names}
            row["context"] = _context_text(record.context)
            digest.update(json.dumps(list(row.values())).encode())
            rows.append(row)
            if len(rows) == _BATCH:
                write_batch()
        write_batch()
    table.close()
    facts = TableFacts(
        digest=digest.hexdigest(), layouts=read.layouts.describe(), searched=table.searched
    )
    (into / "facts.json").write_text(json.dumps(asdict(facts)))


def _schema(kind: type[Any]) -> Any:
    text = pyarrow.string()
    types = {"references": pyarrow.list_(text)}
    return pyarrow.schema([(field.name, types.get(field.name, text)) for field in fields(kind)])


def _context_text(context: Sequence[ContextTurn]) -> str | None:
    return json.dumps([asdict(turn) for turn in context]) if context else None


def _parse_context(text: str | None) -> tuple[ContextTurn, ...]:
    return tuple(ContextTurn(**turn) for turn in json.loads(text)) if text else ()
