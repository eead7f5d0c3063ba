"""Files on their way up: in one request, or large ones in parts that a later push finds."""

import hashlib
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from tita.errors import StoreUnavailable, TitaError
from tita.storage import parts
from tita.storage.bucket import Bucket
from tita.storage.manifest import ManifestFile
from tita.storage.transfers import Transfer

WHOLE_BYTES = 32 << 20
"""Files up to this size go in one request, signed by the digest that the manifest has, so that the
server checks it; larger ones go in parts, each hashed once more to sign it."""
_PART_BYTES = 8 << 20
"""What one thread holds in memory; a file that is smaller is read once more, hashed and sent."""
_streams = threading.BoundedSemaphore(8)
"""Files on their way in one long request each: servers that hold pieces of more take longer."""
_MOST_PARTS = 10_000
_ABANDONED_AFTER = timedelta(days=1)


@dataclass(kw_only=True)
class Upload:
    """One file of a tree on its way to `key`, sent by several threads part by part."""

    bucket: Bucket
    transfer: Transfer
    path: Path
    key: str
    file: ManifestFile
    state: "State"
    """What the file system said of it before it was hashed."""
    left: str | None = None
    """Id of the upload in parts that an earlier push left for this key, if any."""

    _id: str = ""
    _known: dict[int, str] = field(default_factory=dict)
    """ETags of the parts that an earlier push sent."""
    _etags: dict[int, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def _part_bytes(self) -> int:
        return max(_PART_BYTES, -(-self.file.size_bytes // _MOST_PARTS))

    @property
    def _num_parts(self) -> int:
        return -(-self.file.size_bytes // self._part_bytes)

    def tasks(self) -> Iterator[Callable[[], None]]:
        """The pieces of work, in any order; the last to end puts the file together."""
        if self.file.size_bytes > WHOLE_BYTES:
            for number in range(1, self._num_parts + 1):
                yield partial(self._send_part, number)
        elif self.file.size_bytes > _PART_BYTES:
            yield self._send_from_disk
        else:
            yield self._send_from_memory

    def _send_from_memory(self) -> None:
        data = self.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.file.sha256:
            raise changed(self.path)
        self.bucket.put(self.key, data, sha256=self.file.sha256)
        self.transfer.advance(len(data))

    def _send_from_disk(self) -> None:
        try:
            with _streams:
                self.bucket.put_file(
                    self.key,
                    self.path,
                    size_bytes=self.file.size_bytes,
                    sha256=self.file.sha256,
                    advance=self.transfer.advance,
                )
        except StoreUnavailable:
            # The server, or we, may have met other content than was promised.
            self._expect_it_unchanged()
            raise
        try:
            self._expect_it_unchanged()
        except TitaError:
            # Not every server checks the digest, and what lies there now would claim to have it.
            self.bucket.delete(self.key)
            raise

    def _expect_it_unchanged(self) -> None:
        try:
            unchanged = state_of(self.path) == self.state
        except FileNotFoundError:
            unchanged = False
        if not unchanged:
            raise changed(self.path)

    def _send_part(self, number: int) -> None:
        try:
            upload_id = self._begin()
            data = self._read(number)
            etag = self._known.get(number)
            if etag is None or etag.strip('"') != _md5(data):
                etag = parts.send(self.bucket, self.key, data, upload_id=upload_id, number=number)
            self.transfer.advance(len(data))
            with self._lock:
                self._etags[number] = etag
                last = len(self._etags) == self._num_parts
            if last:
                self._put_together()
        except FileNotFoundError:
            # Another push of the same tree has put the parts together, or given them up.
            self._expect_it_there()
        except StoreUnavailable:
            raise
        except TitaError:
            # What no second attempt will mend leaves nothing behind.
            parts.abort(self.bucket, self.key, upload_id=self._id)
            raise

    def _begin(self) -> str:
        with self._lock:
            if not self._id:
                if self.left is not None:
                    self._known = parts.listed(self.bucket, self.key, upload_id=self.left)
                self._id = self.left or parts.begin(self.bucket, self.key, sha256=self.file.sha256)
            return self._id

    def _read(self, number: int) -> bytearray:
        start = (number - 1) * self._part_bytes
        data = bytearray(min(self._part_bytes, self.file.size_bytes - start))
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                whole = file.readinto(data) == len(data)
        except FileNotFoundError:
            whole = False
        if not whole:
            raise changed(self.path)
        return data

    def _put_together(self) -> None:
        # Every part was checked on its way, and the whole file before; nobody wrote in between.
        self._expect_it_unchanged()
        parts.finish(self.bucket, self.key, self._etags, upload_id=self._id)
        if self.left is not None and not self._is_there():
            # The upload was begun for other content, and says so.
            self.bucket.copy(self.key, self.key, sha256=self.file.sha256)

    def _is_there(self) -> bool:
        head = self.bucket.head(self.key)
        return head is not None and head.sha256 == self.file.sha256

    def _expect_it_there(self) -> None:
        if self._is_there():
            return
        raise StoreUnavailable(
            "another push of this tree was under way",
            where=f"{self.bucket.uri}/{self.key}",
            remedy="push again; what is there need not be sent again",
        )


def left_over(bucket: Bucket, prefix: str, *, keys: Collection[str]) -> dict[str, str]:
    """Ids by key of uploads that earlier pushes left, the newest of each.

    Others below `prefix` that are older than a day are given up: no listing shows their parts, and
    they are paid for. Where these credentials may not see or remove any, there are none.
    """
    newest: dict[str, parts.UnderWay] = {}
    try:
        found = parts.under_way(bucket, prefix)
        newest = {upload.key: upload for upload in found if upload.key in keys}
        for upload in found:
            old = datetime.now(UTC) - upload.begun > _ABANDONED_AFTER
            if old and newest.get(upload.key) is not upload:
                parts.abort(bucket, upload.key, upload_id=upload.upload_id)
    except StoreUnavailable:
        raise
    except (TitaError, FileNotFoundError):
        pass
    return {key: upload.upload_id for key, upload in newest.items()}


def changed(path: Path) -> TitaError:
    """What to say of a file that is not what it was when the push began."""
    return TitaError("changed while it was pushed", where=str(path), remedy="push it again")


State = tuple[int, int, int]


def state_of(path: Path) -> State:
    """Size, time of change and inode: the same as long as nobody writes to the file."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _md5(data: bytearray) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
