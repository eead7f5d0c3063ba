"""Objects that are written once: of two writers who try it, one is told that it did not."""

import hashlib
import threading
import uuid

from tita.errors import TitaError
from tita.storage.bodies import HashedBytes
from tita.storage.bucket import SHA256, WRITER, Bucket
from tita.storage.faults import Unsupported


class Exclusive:
    """Conditional writes to one bucket, whose server is asked first whether it obeys them."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._lock = threading.Lock()
        self._is_obeyed: bool | None = None

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write one object unless there is one; whether it was written.

        Raises:
            TitaError: the server does not obey If-None-Match.
        """
        with self._lock:
            if self._is_obeyed is None:
                self._is_obeyed = self._obeys()
        if not self._is_obeyed:
            raise TitaError(
                "the server does not obey If-None-Match: of two writers both would win",
                where=self._bucket.uri,
                remedy="name a server with conditional writes in TITA_S3_ENDPOINT_URL",
            )
        return self._put(key, data)

    def _put(self, key: str, data: bytes) -> bool:
        writer = uuid.uuid4().hex
        body = HashedBytes(data, sha256=hashlib.sha256(data).hexdigest())
        metadata = {SHA256: body.sha256, WRITER: writer}
        try:
            self._bucket.request("put_object", key, Body=body, Metadata=metadata, IfNoneMatch="*")
        except FileExistsError:
            # If the answer to our own write was lost, a second attempt finds it there.
            found = self._bucket.head(key)
            return found is not None and found.writer == writer
        return True

    def _obeys(self) -> bool:
        probe = f".tita-probe-{uuid.uuid4().hex}"
        try:
            first, second = (self._put(probe, data) for data in (b"first", b"second"))
            return first and not second
        except Unsupported:
            return False
        finally:
            self._bucket.delete(probe)
