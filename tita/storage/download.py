"""Files on their way down: checked, and a large one goes on where it was broken off."""

import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tita.errors import TitaError
from tita.storage.bucket import Bucket
from tita.storage.faults import TornBody, again
from tita.storage.locks import lock
from tita.storage.manifest import ManifestFile, is_whole
from tita.storage.transfers import Transfer

SLICE_BYTES = 64 << 20
"""Files up to this size come as one stream; of larger ones several slices come at once."""
_READ_BYTES = 1 << 20
_DONE = b"\1"


@dataclass(kw_only=True)
class Download:
    """One file of a tree on its way to `path`, fetched by several threads slice by slice.

    A large file grows in `.tita-<sha256>.part` beside it: its bytes, and behind them one byte a
    slice that says whether the slice is there. Whoever wants the same content goes on from that.
    """

    bucket: Bucket
    transfer: Transfer
    key: str
    file: ManifestFile
    path: Path

    _part: int = -1
    _finished: bool = False
    _hash: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    _hashed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _hashing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_large(self) -> bool:
        """Whether it comes in slices, and leaves a file to go on from if it is broken off."""
        return self.file.size_bytes > SLICE_BYTES

    @property
    def _num_slices(self) -> int:
        return -(-self.file.size_bytes // SLICE_BYTES)

    @property
    def _part_path(self) -> Path:
        return self.path.with_name(f".tita-{self.file.sha256}.part")

    @property
    def _where(self) -> str:
        return f"{self.bucket.uri}/{self.key}"

    def tasks(self) -> Iterator[Callable[[], None]]:
        """The pieces of work, in any order; the last to end gives the file its name."""
        if self.is_large:
            for number in range(self._num_slices):
                yield partial(self._fetch_slice, number)
        else:
            yield self._fetch_whole

    def close(self) -> None:
        """Let go of what has not come to its end; it stays for a later attempt."""
        if self._part >= 0:
            os.close(self._part)
            self._part = -1

    def _fetch_whole(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".tita-{uuid.uuid4().hex}")
        shown = 0

        def attempt() -> None:
            nonlocal shown
            digest, size = hashlib.sha256(), 0
            with temporary.open("wb", buffering=0) as out:
                for piece in self._read(0, self.file.size_bytes):
                    digest.update(piece)
                    out.write(piece)
                    size += len(piece)
                    self.transfer.advance(max(0, size - shown))
                    shown = max(shown, size)
            if digest.hexdigest() != self.file.sha256:
                raise self._differs()

        try:
            again(attempt)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _fetch_slice(self, number: int) -> None:
        self._open()
        if not self._finished:
            end = min((number + 1) * SLICE_BYTES, self.file.size_bytes)
            place = number * SLICE_BYTES
            if self._is_done(number):
                self.transfer.advance(end - place)
            else:
                self._fetch(place, end)
                os.pwrite(self._part, _DONE, self.file.size_bytes + number)
            self._hash_on()

    def _fetch(self, place: int, end: int) -> None:
        def attempt() -> None:
            nonlocal place
            for piece in self._read(place, end - place):
                os.pwrite(self._part, piece, place)
                place += len(piece)
                self.transfer.advance(len(piece))

        again(attempt)

    def _open(self) -> None:
        with self._lock:
            if self._part >= 0 or self._finished:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._part = lock(self._part_path, while_waiting=lambda: self.transfer.advance(0))
            if is_whole(self.path, self.file):
                # Someone else had the lock and has brought it.
                self._part_path.unlink()
                self._finished = True
                self.close()
                return
            os.ftruncate(self._part, self.file.size_bytes + self._num_slices)

    def _is_done(self, number: int) -> bool:
        return os.pread(self._part, 1, self.file.size_bytes + number) == _DONE

    def _hash_on(self) -> None:
        """Hash what is there without a gap; who hashes the last slice ends the file."""
        with self._hashing:
            while self._hashed < self._num_slices and self._is_done(self._hashed):
                place = self._hashed * SLICE_BYTES
                end = min(place + SLICE_BYTES, self.file.size_bytes)
                while place < end:
                    piece = os.pread(self._part, min(_READ_BYTES, end - place), place)
                    self._hash.update(piece)
                    place += len(piece)
                self._hashed += 1
            if self._hashed == self._num_slices and not self._finished:
                self._finish()

    def _finish(self) -> None:
        self._finished = True
        if self._hash.hexdigest() != self.file.sha256:
            self._part_path.unlink()
            raise self._differs()
        os.ftruncate(self._part, self.file.size_bytes)
        self._part_path.replace(self.path)
        self.close()

    def _read(self, start: int, size_bytes: int) -> Iterator[bytes]:
        try:
            yield from self.bucket.read(self.key, start=start, size_bytes=size_bytes)
        except FileNotFoundError:
            raise TitaError(
                "differs from its manifest: a file is missing",
                where=self._where,
                remedy="push it again",
            ) from None

    def _differs(self) -> TornBody:
        return TornBody(
            "content differs from its manifest",
            where=self._where,
            remedy="push it again if this happens twice",
        )
