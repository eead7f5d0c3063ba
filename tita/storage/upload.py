"""Uploads of a tree's files: small ones in one request, large ones in parts that can be resumed."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from tita.errors import StoreUnavailable, TitaError
from tita.settings import settings
from tita.storage.manifest import ManifestFile
from tita.storage.s3_bucket import Bucket, MultipartUpload
from tita.storage.transfers import TransferPool

MULTIPART_THRESHOLD_BYTES = 32 << 20
"""A file up to this size is sent in one request; a larger one is sent in parts."""
_PART_BYTES = 8 << 20
"""Size of a part. A thread holds one part, or a file up to this size, in memory."""
_streams = threading.BoundedSemaphore(8)
"""Limits the files sent from disk at once: more make a server slower that buffers them."""
_MAX_PARTS = 10_000
_ABANDONED_AFTER = timedelta(days=1)

FileState = tuple[int, int, int]


def file_state(path: Path) -> FileState:
    """Size, modification time and inode, which change if the file is written or replaced."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def is_multipart(file: ManifestFile) -> bool:
    """Whether a file is sent in parts."""
    return file.size_bytes > MULTIPART_THRESHOLD_BYTES


@dataclass(kw_only=True)
class Upload:
    """One file of a tree on its way to `key`; several threads send its parts.

    boto3's transfer manager cannot resume a multipart upload, so parts are sent here.
    """

    bucket: Bucket
    pool: TransferPool
    path: Path
    key: str
    file: ManifestFile
    state: FileState
    """The file's state before it was hashed."""
    resume_id: str | None = None
    """Id of the multipart upload that an interrupted push left for this key."""

    _id: str = ""
    _known_etags: dict[int, str] = field(default_factory=dict)
    """ETags of the parts that the interrupted push sent."""
    _etags: dict[int, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def _part_bytes(self) -> int:
        return max(_PART_BYTES, -(-self.file.size_bytes // _MAX_PARTS))

    @property
    def _num_parts(self) -> int:
        return -(-self.file.size_bytes // self._part_bytes)

    def tasks(self) -> Iterator[Callable[[], None]]:
        """The requests, in any order; the last one to finish completes the upload."""
        if is_multipart(self.file):
            for number in range(1, self._num_parts + 1):
                yield partial(self._send_part, number)
        elif self.file.size_bytes > _PART_BYTES:
            yield self._send_from_disk
        else:
            yield self._send_from_memory

    def _send_from_memory(self) -> None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            raise self._changed() from None
        if hashlib.sha256(data).hexdigest() != self.file.sha256:
            raise self._changed()
        self.bucket.put(self.key, data, sha256=self.file.sha256)
        self.pool.advance(len(data))

    def _send_from_disk(self) -> None:
        try:
            with _streams:
                self.bucket.put_file(
                    self.key,
                    self.path,
                    size_bytes=self.file.size_bytes,
                    sha256=self.file.sha256,
                    advance=self.pool.advance,
                )
        except (FileNotFoundError, StoreUnavailable):
            if self._has_changed():
                raise self._changed() from None
            raise
        if self._has_changed():
            # Not every server verifies the digest, and this object is recorded with the old one.
            self.bucket.delete(self.key)
            raise self._changed()

    def _has_changed(self) -> bool:
        try:
            return file_state(self.path) != self.state
        except FileNotFoundError:
            return True

    def _changed(self) -> TitaError:
        return TitaError("changed during the push", where=str(self.path), remedy="push again")

    def _send_part(self, number: int) -> None:
        try:
            upload_id = self._start()
            data = self._read_part(number)
            etag = self._known_etags.get(number)
            if etag is None or etag.strip('"') != _md5(data):
                etag = self.bucket.upload_part(self.key, data, upload_id=upload_id, number=number)
            self.pool.advance(len(data))
            with self._lock:
                self._etags[number] = etag
                is_last = len(self._etags) == self._num_parts
            if is_last:
                self._complete()
        except FileNotFoundError:
            # A concurrent push of the same tree completed or aborted this upload.
            if not self.bucket.has_content(self.key, sha256=self.file.sha256):
                raise StoreUnavailable(
                    "a concurrent push of this tree interfered",
                    where=f"{self.bucket.uri}/{self.key}",
                    remedy="push again; files that are complete are not sent again",
                ) from None
        except StoreUnavailable:
            raise
        except TitaError:
            # Permanent: nothing would resume from these parts.
            self.bucket.abort_upload(self.key, upload_id=self._id)
            raise

    def _start(self) -> str:
        with self._lock:
            if not self._id:
                if self.resume_id is not None:
                    self._known_etags = self.bucket.list_parts(self.key, upload_id=self.resume_id)
                self._id = self.resume_id or self.bucket.create_upload(
                    self.key, sha256=self.file.sha256
                )
            return self._id

    def _read_part(self, number: int) -> bytearray:
        start = (number - 1) * self._part_bytes
        data = bytearray(min(self._part_bytes, self.file.size_bytes - start))
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                complete = file.readinto(data) == len(data)
        except FileNotFoundError:
            complete = False
        if not complete:
            raise self._changed()
        return data

    def _complete(self) -> None:
        # The server verified each part. The parts are what was hashed if the file did not change.
        if self._has_changed():
            raise self._changed()
        self.bucket.complete_upload(self.key, self._etags, upload_id=self._id)
        sha256 = self.file.sha256
        if self.resume_id is not None:
            found, wanted = self.bucket.head(self.key), settings().s3_encryption
            # The interrupted push may have recorded the SHA-256 of other content, and have run
            # with another TITA_S3_ENCRYPTION.
            if (
                found is None
                or found.sha256 != sha256
                or found.encryption != (wanted or found.encryption)
            ):
                self.bucket.copy(self.key, self.key, sha256=sha256)


@dataclass(frozen=True, kw_only=True)
class UnfinishedUploads:
    """Multipart uploads that were neither completed nor aborted when a push began, oldest first."""

    bucket: Bucket | None = None
    found: tuple[MultipartUpload, ...] = ()

    @classmethod
    def find(cls, bucket: Bucket, prefix: str) -> "UnfinishedUploads":
        """Those below `prefix`; none if the credentials do not allow to list them."""
        try:
            return cls(bucket=bucket, found=tuple(bucket.list_uploads(prefix)))
        except StoreUnavailable:
            raise
        except (TitaError, FileNotFoundError):
            return cls()

    def newest(self, key: str) -> str | None:
        """Id of the upload to resume for a key."""
        if settings().s3_encryption.startswith("aws:kms"):
            # The ETags of its parts are not their MD5, and it may have another key.
            return None
        return next((one.upload_id for one in reversed(self.found) if one.key == key), None)

    def abort(
        self, is_obsolete: Callable[[str], bool], *, created_before: datetime | None = None
    ) -> None:
        """Abort those whose key is obsolete, and old ones, by default those older than a day.

        Their parts use paid storage and appear in no listing.
        """
        oldest = created_before or datetime.now(UTC) - _ABANDONED_AFTER
        for upload in self.found:
            expired = upload.created < oldest
            if self.bucket is not None and (expired or is_obsolete(upload.key)):
                self.bucket.abort_upload(upload.key, upload_id=upload.upload_id)


def _md5(data: bytearray) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
