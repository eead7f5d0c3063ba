"""Downloads of a tree's files: verified, and large ones are resumed after an interruption."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tita.errors import DamagedData, StoreUnavailable
from tita.storage.files import atomic_path, lock
from tita.storage.manifest import ManifestFile, is_complete
from tita.storage.s3_bucket import Bucket, WrongContent
from tita.storage.s3_client import retry
from tita.storage.transfers import TransferPool

SLICE_BYTES = 64 << 20
"""A file up to this size is one request; slices of a larger one are requested concurrently."""
_READ_BYTES = 1 << 20
_DONE = b"\1"
_WRONG = "the content does not match its manifest"
_PUSH = "push the tree again, with --verify to find all such files"


@dataclass(kw_only=True)
class Download:
    """One file of a tree on its way to `path`; several threads request its slices.

    A large file is written to `.tita-<sha256>.part` beside it: its bytes, followed by one byte for
    each slice that says whether the slice is complete. A later pull of the same content resumes
    from that file.
    """

    bucket: Bucket
    pool: TransferPool
    key: str
    file: ManifestFile
    path: Path

    _part_file: int = -1
    _finished: bool = False
    _hash: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    _num_hashed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _hash_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def has_slices(self) -> bool:
        """Whether the file is requested in slices and can be resumed."""
        return self.file.size_bytes > SLICE_BYTES

    @property
    def _num_slices(self) -> int:
        return -(-self.file.size_bytes // SLICE_BYTES)

    @property
    def _part_path(self) -> Path:
        return self.path.with_name(f".tita-{self.file.sha256}.part")

    def tasks(self) -> Iterator[Callable[[], None]]:
        """The requests, in any order; the last one to finish renames the file."""
        if not self.has_slices:
            yield self._fetch_file
            return
        for number in range(self._num_slices):
            yield partial(self._fetch_slice, number)

    def close(self) -> None:
        """Close the part file; an unfinished one stays on disk."""
        if self._part_file >= 0:
            os.close(self._part_file)
            self._part_file = -1

    def _fetch_file(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        shown = 0
        with atomic_path(self.path) as temporary:

            def attempt() -> None:
                nonlocal shown
                digest, size = hashlib.sha256(), 0
                with temporary.open("wb", buffering=0) as out:
                    for chunk in self._read(0, self.file.size_bytes):
                        digest.update(chunk)
                        out.write(chunk)
                        size += len(chunk)
                        self.pool.advance(max(0, size - shown))
                        shown = max(shown, size)
                if digest.hexdigest() != self.file.sha256:
                    if not self.bucket.has_content(self.key, sha256=self.file.sha256):
                        # Something else has written it, so reading it again is useless.
                        raise _damaged(self.bucket, self.key)
                    raise self._wrong_content()

            with damage_reported(self.bucket, self.key, self.file):
                retry(attempt)

    def _fetch_slice(self, number: int) -> None:
        self._open()
        if self._finished:
            return
        position = number * SLICE_BYTES
        end = min(position + SLICE_BYTES, self.file.size_bytes)
        if self._is_done(number):
            self.pool.advance(end - position)
        else:

            def attempt() -> None:
                nonlocal position
                for chunk in self._read(position, end - position):
                    os.pwrite(self._part_file, chunk, position)
                    position += len(chunk)
                    self.pool.advance(len(chunk))

            with damage_reported(self.bucket, self.key, self.file):
                retry(attempt)
            os.pwrite(self._part_file, _DONE, self.file.size_bytes + number)
        self._hash_slices()

    def _open(self) -> None:
        with self._lock:
            if self._part_file >= 0 or self._finished:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._part_file = lock(self._part_path, while_waiting=lambda: self.pool.advance(0))
            if is_complete(self.path, self.file):
                # The process that held the lock has downloaded the file.
                self._part_path.unlink()
                self._finished = True
                self.close()
                return
            os.ftruncate(self._part_file, self.file.size_bytes + self._num_slices)

    def _is_done(self, number: int) -> bool:
        return os.pread(self._part_file, 1, self.file.size_bytes + number) == _DONE

    def _hash_slices(self) -> None:
        """Hash the completed slices in order; after the last one, finish the file."""
        with self._hash_lock:
            while self._num_hashed < self._num_slices and self._is_done(self._num_hashed):
                position = self._num_hashed * SLICE_BYTES
                end = min(position + SLICE_BYTES, self.file.size_bytes)
                while position < end:
                    chunk = os.pread(self._part_file, min(_READ_BYTES, end - position), position)
                    self._hash.update(chunk)
                    position += len(chunk)
                self._num_hashed += 1
            if self._num_hashed < self._num_slices or self._finished:
                return
            self._finished = True
            if self._hash.hexdigest() != self.file.sha256:
                self._part_path.unlink()
                raise self._wrong_content()
            os.ftruncate(self._part_file, self.file.size_bytes)
            self._part_path.replace(self.path)
            self.close()

    def _read(self, start: int, size_bytes: int) -> Iterator[bytes]:
        return self.bucket.read_range(self.key, start=start, size_bytes=size_bytes)

    def _wrong_content(self) -> WrongContent:
        return WrongContent(_WRONG, where=f"{self.bucket.uri}/{self.key}", remedy=_PUSH)


@contextmanager
def damage_reported(bucket: Bucket, key: str, file: ManifestFile) -> Iterator[None]:
    """Tell a damaged object from a failed transfer of an intact one.

    Raises:
        DamagedData: the object is missing, or does not have the content of `file`.
        StoreUnavailable: the transfer failed.
    """
    where = f"{bucket.uri}/{key}"
    try:
        yield
    except FileNotFoundError:
        raise DamagedData("a file of the tree is missing", where=where, remedy=_PUSH) from None
    except StoreUnavailable as error:
        found = bucket.head(key)
        if found is None:
            raise DamagedData("a file of the tree is missing", where=where, remedy=_PUSH) from None
        if found.size_bytes != file.size_bytes or isinstance(error, WrongContent):
            raise _damaged(bucket, key) from None
        raise


def _damaged(bucket: Bucket, key: str) -> DamagedData:
    return DamagedData(_WRONG, where=f"{bucket.uri}/{key}", remedy=_PUSH)


def has_content(bucket: Bucket, key: str, file: ManifestFile) -> bool:
    """Read an object and compare its content with that of `file`."""

    def attempt() -> bool:
        digest = hashlib.sha256()
        for chunk in bucket.read_range(key, start=0, size_bytes=file.size_bytes):
            digest.update(chunk)
        return digest.hexdigest() == file.sha256

    try:
        # A second reading tells damage from a transfer that went wrong.
        return retry(attempt) or retry(attempt)
    except FileNotFoundError:
        return False
