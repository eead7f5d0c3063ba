"""Bodies of requests whose SHA-256 is known: signing one does not hash it once more."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 256 << 10
"""What is read and sent at once: small enough to stay in a processor's cache between the two."""
_SIGNER = "tita-s3v4"


class HashedBytes(bytearray):
    """Bytes and their SHA-256 in hex.

    botocore takes `bytes` for a file, and sends those in small blocks after a pause for the
    server's consent.
    """

    def __init__(self, data: bytes | bytearray, *, sha256: str) -> None:
        super().__init__(data)
        self.sha256 = sha256


class HashedFile(io.FileIO):
    """A file that had this size and SHA-256 when it was looked at; it is sent block by block.

    If it is another by now, it fits neither the length nor the digest of the request, and the
    server refuses it. `on_read` is told how many bytes are on their way, and may raise.
    """

    def __init__(
        self, path: Path, *, size_bytes: int, sha256: str, on_read: Callable[[int], None]
    ) -> None:
        super().__init__(path, "rb")
        self.sha256 = sha256
        self._size_bytes = size_bytes
        self._on_read = on_read

    def __len__(self) -> int:
        return self._size_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        """A block, however much is asked for; nothing behind the known size."""
        left = self._size_bytes - self.tell()
        data = super().read(max(0, min(left, _BLOCK_BYTES)))
        if left > 0 and not data:
            raise EOFError("the file is shorter than it was")
        self._on_read(self.tell())
        return data or b""


def sign_by_known_digests(client: Any) -> None:
    """Have a boto3 client for S3 sign these bodies by the digest that they bring.

    botocore hashes whatever it signs; for a file of a tree that would be the same digest again.
    https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    """
    from botocore import auth

    class Signer(auth.S3SigV4Auth):  # type: ignore[misc]
        def payload(self, request: Any) -> Any:
            return getattr(request.body, "sha256", None) or super().payload(request)

    def choose(signature_version: Any, **_: Any) -> str | None:
        # Not for requests without a signature, or of another kind than S3's usual.
        return _SIGNER if signature_version in ("s3v4", "v4") else None

    auth.AUTH_TYPE_MAPS[_SIGNER] = Signer
    client.meta.events.register("choose-signer.s3.PutObject", choose)
