"""JSONL files that grow line by line while answers come, and are carried on after a kill.

A file has one writer at a time, holds every question once, and is never without its earlier lines:
mending writes a new file and renames it.
"""

import fcntl
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar, Self

from tita.errors import TitaError


class AppendLog(ABC):
    """A JSONL file open for one writer; use it as a context manager.

    Opening it mends a torn last line and drops what is not kept, so that it is asked again. What
    its records are, and which of them are kept, a subclass says.

    Raises:
        TitaError: another writer has it, or it is something else than such a file.
    """

    KIND: ClassVar[str]
    """What such a file is called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self.done: set[str] = set()
        """What stands in the file and need not be asked again."""

    @abstractmethod
    def _parse(self, line: bytes) -> dict[str, Any] | None:
        """The record of one line; None if it is torn or something else."""

    @abstractmethod
    def _identity(self, record: Mapping[str, Any]) -> str | None:
        """What `done` knows a record by; None if it is to be asked again."""

    @abstractmethod
    def _check(self, record: Mapping[str, Any], *, where: str) -> None:
        """Raise a TitaError if a record belongs to another file than this."""

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_locked(self.path)
        try:
            self._mend()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; once this returns, killing the process does not lose it."""
        assert self._file is not None, "the file is not open"
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        identity = self._identity(record)
        if identity is not None:
            self.done.add(identity)

    def sort_by_question(self, question_ids: Sequence[str]) -> None:
        """Sort the lines by question; readers that go by place want them so.

        Lines of other questions keep their order at the end.
        """
        assert self._file is not None
        place = {question: number for number, question in enumerate(question_ids)}
        self._file.seek(0)
        lines = list(self._file)
        records = map(self._parse, lines)
        names = ["" if record is None else str(record["question_id"]) for record in records]
        order = sorted(range(len(lines)), key=lambda n: place.get(names[n], len(place)))
        if order != list(range(len(lines))):
            self._replace(lines[n] for n in order)

    def _mend(self) -> None:
        assert self._file is not None
        whole, num_records, num_torn = True, 0, 0
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            record = self._parse(line)
            if record is None or not self._keeps(record, number=number):
                whole = False
            num_records += record is not None
            num_torn += record is None and bool(line.strip())
            if record is None and _is_json(line):
                raise self._is_something_else()
        if num_torn > 1 and not num_records:
            raise self._is_something_else()
        if whole and not _ends_torn(self._file):
            self._file.seek(0, os.SEEK_END)
            return
        self._rewrite()

    def _is_something_else(self) -> TitaError:
        """Mending drops what is no record; a file named by mistake must not be emptied so."""
        return TitaError(f"is no {self.KIND}", where=str(self.path), remedy="choose another --out")

    def _keeps(self, record: Mapping[str, Any], *, number: int) -> bool:
        self._check(record, where=f"{self.path}:{number}")
        identity = self._identity(record)
        if identity is None or identity in self.done:
            return False
        self.done.add(identity)
        return True

    def _rewrite(self) -> None:
        """Leave only what is kept."""
        assert self._file is not None
        self.done.clear()
        self._file.seek(0)
        self._replace(
            line.rstrip(b"\n") + b"\n"
            for number, line in enumerate(self._file, start=1)
            if (record := self._parse(line)) is not None and self._keeps(record, number=number)
        )

    def _replace(self, lines: Iterable[bytes]) -> None:
        """Write lines to a new, locked file, and put it in the old one's place."""
        assert self._file is not None
        temporary = self.path.with_name(f".{self.path.name}.part")
        new = temporary.open("w+b")
        fcntl.flock(new, fcntl.LOCK_EX)
        new.writelines(lines)
        new.flush()
        os.fsync(new.fileno())
        temporary.replace(self.path)
        self._file.close()
        self._file = new


def json_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of one line; None if it is torn or no object."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _is_json(line: bytes) -> bool:
    return json_object(line) is not None


def _open_locked(path: Path) -> IO[bytes]:
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise TitaError(
                "another process is writing to it",
                where=str(path),
                remedy="wait for it or choose another --out",
            ) from None
        # The holder may have renamed a mended file into place between our open and our lock.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _ends_torn(file: IO[bytes]) -> bool:
    size = file.seek(0, os.SEEK_END)
    if not size:
        return False
    file.seek(size - 1)
    return file.read(1) != b"\n"
