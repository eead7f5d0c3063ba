"""One prefix of one bucket: requests tried again where that helps, every byte checked both ways."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.storage.bodies import HashedBytes, HashedFile
from tita.storage.connection import connect, parse_uri
from tita.storage.faults import TornBody, again, told, untorn
from tita.storage.manifest import is_inside

_CHUNK_BYTES = 1 << 20
_COPY_BYTES = 128 << 20
# What we write beside each object, since any server keeps such metadata and gives it back: other
# checksums are known to some and not to others.
SHA256 = "tita-sha256"
WRITER = "tita-writer"

Body = bytes | bytearray


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a server knows of one object."""

    size_bytes: int
    etag: str
    sha256: str | None
    """What the writer said; None if someone else wrote it."""
    writer: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One object of a listing."""

    key: str
    size_bytes: int
    etag: str


class Bucket:
    """The requests that the store is made of. Keys are relative to the prefix."""

    def __init__(self, uri: str, *, workers: int) -> None:
        self.name, self.prefix = parse_uri(uri)
        self._client = connect(workers=workers)

    @property
    def uri(self) -> str:
        return f"s3://{self.name}/{self.prefix}".rstrip("/")

    def address(self, key: str) -> dict[str, str]:
        """`key` as boto3's requests want it.

        Raises:
            TitaError: the key leaves the store.
        """
        if not is_inside(key):
            raise TitaError(f"key {key!r} leaves the store", where=self.uri)
        return {"Bucket": self.name, "Key": self.prefix + key}

    def told(self, key: str) -> AbstractContextManager[None]:
        """Failures of a request about `key`, in our words."""
        return told(f"{self.uri}/{key}")

    def request(self, operation: str, key: str, **parameters: Any) -> dict[str, Any]:
        """One request about `key` by boto3's name, tried again where that may help.

        Raises:
            FileNotFoundError, FileExistsError, TitaError: as `faults.told` says.
        """
        address = self.address(key)

        return self._ask(operation, key, **address, **parameters)

    def _ask(self, operation: str, where: str, **parameters: Any) -> dict[str, Any]:
        def attempt() -> dict[str, Any]:
            with self.told(where):
                answer: dict[str, Any] = getattr(self._client, operation)(**parameters)
                return answer

        return again(attempt)

    def search(self, operation: str, prefix: str, **parameters: str) -> dict[str, Any]:
        """One page of what is below `prefix`, by a listing request of boto3's name."""
        below = {"Bucket": self.name, "Prefix": self.prefix + prefix}
        return self._ask(operation, prefix, **below, **parameters)

    def head(self, key: str) -> Head | None:
        """What the server knows of an object, or None if there is none."""
        try:
            answer = self.request("head_object", key)
        except FileNotFoundError:
            return None
        ours = _metadata(answer)
        return Head(
            size_bytes=answer["ContentLength"],
            etag=answer.get("ETag", ""),
            sha256=ours.get(SHA256),
            writer=ours.get(WRITER),
        )

    def get(self, key: str) -> bytes:
        """An object's content, checked against what its writer said of it.

        Raises:
            FileNotFoundError: there is none.
        """
        address = self.address(key)

        def attempt() -> bytes:
            with self.told(key):
                answer = self._client.get_object(**address)
            with untorn(f"{self.uri}/{key}"):
                data = bytes(answer["Body"].read())
            wanted = _metadata(answer).get(SHA256)
            if wanted is not None and hashlib.sha256(data).hexdigest() != wanted:
                raise TornBody("content differs from its checksum", where=f"{self.uri}/{key}")
            return data

        return again(attempt)

    def read(self, key: str, *, start: int, size_bytes: int) -> Iterator[bytes]:
        """One attempt at so many bytes from `start`, in pieces, whatever else the object holds.

        Raises:
            TornBody: it gave fewer.
            FileNotFoundError: there is no such object.
        """
        if not size_bytes:
            return
        where = f"{self.uri}/{key}"
        wanted = f"bytes={start}-{start + size_bytes - 1}"
        with self.told(key):
            answer = self._client.get_object(**self.address(key), Range=wanted)
        body = answer["Body"]
        # A server that does not know ranges sends the whole object.
        skip = 0 if "ContentRange" in answer else start
        left = size_bytes
        try:
            while left:
                with untorn(where):
                    piece = body.read(min(_CHUNK_BYTES, left + skip))
                if not piece:
                    raise TornBody(
                        f"content differs from its manifest: {left} bytes are missing", where=where
                    )
                kept = piece[skip : skip + left]
                skip -= min(skip, len(piece))
                left -= len(kept)
                yield kept
            if "ContentRange" in answer:
                # An empty last read lets the connection be used again.
                with untorn(where):
                    body.read(1)
        finally:
            body.close()

    def put(self, key: str, data: Body, *, sha256: str | None = None) -> str:
        """Write one object; its ETag."""
        body = HashedBytes(data, sha256=sha256 or hashlib.sha256(data).hexdigest())
        answer = self.request("put_object", key, Body=body, Metadata={SHA256: body.sha256})
        return str(answer.get("ETag", ""))

    def put_file(
        self,
        key: str,
        path: Path,
        *,
        size_bytes: int,
        sha256: str,
        advance: Callable[[int], None],
    ) -> None:
        """Write one object from a file that had this size and digest when it was looked at.

        Args:
            advance: told of bytes that are on their way for the first time; may raise.

        Raises:
            StoreUnavailable: also where the file is another by now.
        """
        address, shown = self.address(key), 0

        def show(done: int) -> None:
            nonlocal shown
            advance(max(0, done - shown))
            shown = max(shown, done)

        def attempt() -> None:
            # What is raised amid a request, botocore makes a failure of the connection.
            show(0)
            opened = HashedFile(path, size_bytes=size_bytes, sha256=sha256, on_read=show)
            with opened as body, self.told(key):
                self._client.put_object(**address, Body=body, Metadata={SHA256: sha256})

        again(attempt)

    def delete(self, key: str) -> None:
        """Remove one object; one that is not there is no error."""
        try:
            self.request("delete_object", key)
        except FileNotFoundError:
            return

    def list(self, prefix: str) -> list[Listed]:
        """All objects whose key begins with `prefix`, sorted by key.

        They are sorted here: some servers list folder by folder, which is another order.
        """
        found: dict[str, Listed] = {}
        token: dict[str, str] = {}
        while True:
            page = self._page(prefix, token)
            for entry in page.get("Contents", ()):
                key = str(entry["Key"]).removeprefix(self.prefix)
                found[key] = Listed(key=key, size_bytes=entry["Size"], etag=entry.get("ETag", ""))
            following = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or not following:
                return [found[key] for key in sorted(found)]
            if token.get("ContinuationToken") == following:
                raise TitaError("the server lists the same page again", where=self.uri)
            token = {"ContinuationToken": following}

    def _page(self, prefix: str, token: Mapping[str, str]) -> dict[str, Any]:
        try:
            page = self.search("list_objects_v2", prefix, **token)
        except FileNotFoundError:
            return {}
        if "Name" not in page:
            # A web page is taken for an empty listing, as that of MinIO's console is.
            raise TitaError(
                "what answers is no S3 server",
                where=self.uri,
                remedy="check the port in TITA_S3_ENDPOINT_URL",
            )
        return page

    def copy(self, source: str, key: str, *, sha256: str) -> None:
        """Let the server copy one object of any size, and say of it what was said of the first."""
        source_address, address = self.address(source), self.address(key)

        def attempt() -> None:
            with self.told(source):
                self._client.copy(
                    source_address,
                    *address.values(),
                    ExtraArgs={"Metadata": {SHA256: sha256}, "MetadataDirective": "REPLACE"},
                    Config=_in_large_pieces(),
                )

        again(attempt)


def _in_large_pieces() -> Any:
    """How a server is to copy: a piece is one request, and silent until it is done."""
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        use_threads=False, multipart_threshold=_COPY_BYTES, multipart_chunksize=_COPY_BYTES
    )


def _metadata(answer: Mapping[str, Any]) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in answer.get("Metadata", {}).items()}
