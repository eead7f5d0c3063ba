"""Append-only JSONL files of answers, which a killed run continues.

A file has one writer at a time and one line per question. Lines are only removed by writing a new
file and renaming it, so that a kill never loses earlier lines.
"""

import fcntl
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, Self

from tita.errors import TitaError
from tita.json_text import clean_text, dump_json
from tita.storage.files import is_stream, naming_full_disk
from tita.storage.image_shards import images_digest

IMAGES_SHA256 = "images_sha256"
"""Field of a record: digest of the question's images, which may change under the same names."""


class AppendLog(ABC):
    """A JSONL file opened for one writer; a context manager.

    Opening the file removes a truncated last line and the records to write again. Subclasses define
    the format of records.

    Raises:
        TitaError: another process has the file open, or the file has another format.
    """

    KIND: ClassVar[str]
    """Name of the format in error messages."""

    def __init__(self, path: Path, *, images: Mapping[str, Sequence[Path]] | None = None) -> None:
        """`images` are those of the questions by id: an answer to other images is removed."""
        self.path = path
        self._file: IO[bytes] | None = None
        self._images = images or {}
        self._digests: dict[str, str | None] = {}
        self.done: set[str] = set()
        """Ids of the questions in the file."""

    def images_sha256(self, question_id: str) -> str | None:
        """Digest of a question's images, read once; None without images or if one is missing."""
        if question_id not in self._digests:
            self._digests[question_id] = images_digest(self._images.get(question_id, ()))
        return self._digests[question_id]

    def has_other_images(self, record: Mapping[str, Any]) -> bool:
        """Whether the images of a record's question have changed; older records don't say."""
        known = record.get(IMAGES_SHA256)
        now = self.images_sha256(str(record["question_id"])) if known else None
        return now is not None and now != known

    @abstractmethod
    def _parse(self, line: bytes) -> dict[str, Any] | None:
        """Return the record of a line; None if the line is truncated or has another format."""

    @abstractmethod
    def _identity(self, record: Mapping[str, Any]) -> str | None:
        """Return the question id of a record; None if the question must be answered again."""

    @abstractmethod
    def _check(self, record: Mapping[str, Any], *, where: str) -> None:
        """Raises TitaError if a record belongs to another run."""

    def __enter__(self) -> Self:
        if is_stream(self.path):  # nothing to read back, to sort or to resume
            self._file = self.path.open("ab")
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_locked(self.path)
        try:
            self._repair(self._file)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with naming_full_disk(self.path):
                if not is_stream(self.path):
                    os.fsync(self._file.fileno())
                self._file.close()
            self._file = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line, which survives a kill of the process."""
        assert self._file is not None, "the file is not open"
        if self._images and (sha256 := self.images_sha256(str(record["question_id"]))):
            record = {**record, IMAGES_SHA256: sha256}
        # A server's messages may have half a character.
        line = clean_text(dump_json(record, ensure_ascii=False)).encode() + b"\n"
        with naming_full_disk(self.path):
            self._file.write(line)
            self._file.flush()
        identity = self._identity(record)
        if identity is not None:
            self.done.add(identity)

    def sort_by_question(self, question_ids: Sequence[str]) -> None:
        """Sort the lines into the order of the questions; lines of other questions go last."""
        assert self._file is not None
        if is_stream(self.path):
            return
        rank = {question: number for number, question in enumerate(question_ids)}
        self._file.seek(0)
        lines = list(self._file)
        records = map(self._parse, lines)
        ids = ["" if record is None else str(record["question_id"]) for record in records]
        order = sorted(range(len(lines)), key=lambda n: rank.get(ids[n], len(rank)))
        if order != list(range(len(lines))):
            self._replace(lines[n] for n in order)

    def _repair(self, file: IO[bytes]) -> None:
        """Leave only complete lines that are kept, and position the file at its end."""
        # A repair would empty a file that was named by mistake.
        remedy = "choose another --out"
        wrong_format = TitaError(f"not a valid {self.KIND}", where=str(self.path), remedy=remedy)
        valid, is_text, num_records, num_broken = True, False, 0, 0
        file.seek(0)
        for number, line in enumerate(file, start=1):
            record = self._parse(line)
            if record is None and json_object(line) is not None:
                raise wrong_format
            num_records += record is not None
            num_broken += record is None and bool(line.strip())
            is_text = is_text or (record is None and line.strip()[:1] not in (b"", b"{"))
            keep = record is not None and self._keep(record, number=number)
            valid = valid and keep and line.endswith(b"\n")
        if not num_records and (num_broken > 1 or is_text):
            raise wrong_format
        if valid:
            return
        self.done.clear()
        file.seek(0)
        self._replace(
            line.rstrip(b"\n") + b"\n"
            for number, line in enumerate(file, start=1)
            if (record := self._parse(line)) is not None and self._keep(record, number=number)
        )

    def _keep(self, record: Mapping[str, Any], *, number: int) -> bool:
        self._check(record, where=f"{self.path}:{number}")
        identity = self._identity(record)
        if identity is None or identity in self.done:
            return False
        self.done.add(identity)
        return True

    def _replace(self, lines: Iterable[bytes]) -> None:
        """Write lines to a new, locked file, and rename it over the old one."""
        assert self._file is not None
        temporary = self.path.with_name(f".{self.path.name}.part")
        new = temporary.open("w+b")
        fcntl.flock(new, fcntl.LOCK_EX)
        with naming_full_disk(temporary):
            new.writelines(lines)
            new.flush()
            os.fsync(new.fileno())
        temporary.replace(self.path)
        self._file.close()
        self._file = new


def json_object(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line; None if it is truncated or not an object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


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
        # Between open and lock, the previous writer may have renamed another file to this path.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
