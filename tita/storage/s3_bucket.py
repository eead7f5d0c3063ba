"""One prefix of one bucket: every request is retried, every transferred byte has a checksum."""

import hashlib
import io
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig

from tita.errors import DamagedData, StoreUnavailable, TitaError
from tita.storage.manifest import is_inside
from tita.storage.push_rules import check_key_length
from tita.storage.s3_client import NotSupported, create_client, parse_uri, retry, translate_errors
from tita.storage.store import ObjectInfo

_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 256 << 10
"""Block of a file that is sent; small enough for a processor's cache."""
_COPY_PART_BYTES = 128 << 20
"""The server copies this much per request, and does not answer until it is done."""
# Names of the metadata of each object. Every server stores user metadata; not every one supports
# the newer checksums of S3.
_SHA256 = "tita-sha256"
_WRITER = "tita-writer"
_PROBE = ".tita-probe"
"""Key of the object that shows whether the server honours conditions; it is never deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectHead:
    """What a HEAD request tells about one object."""

    size_bytes: int
    sha256: str | None
    """SHA-256 that tita recorded when it wrote the object; None if something else wrote it."""
    encryption: str | None = None
    """Server-side encryption of the object; None if the server does not name any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MultipartUpload:
    """A multipart upload that is neither completed nor aborted."""

    key: str
    upload_id: str
    created: datetime


class WrongContent(StoreUnavailable):
    """Bytes that were read do not have the recorded SHA-256; a second reading may tell why."""


class _BytesBody(bytearray):
    """The body of a PutObject request: bytes and their SHA-256.

    botocore wraps `bytes` in a file, which it sends in small blocks after `100 Continue`; it sends
    a bytearray at once.
    """

    def __init__(self, data: bytes, *, sha256: str) -> None:
        super().__init__(data)
        self.sha256 = sha256


class _FileBody(io.FileIO):
    """The body of a PutObject request: a file and the size and SHA-256 that it had when hashed.

    If it has changed, the body does not match the request's length or digest, and the server
    rejects it.
    """

    def __init__(
        self, path: Path, *, size_bytes: int, sha256: str, on_read: Callable[[int], None]
    ) -> None:
        super().__init__(path, "rb")
        self.sha256 = sha256
        self._size_bytes, self._on_read = size_bytes, on_read

    def __len__(self) -> int:
        return self._size_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        """A block; `size` is ignored, because http.client asks for 16 KiB, which is slow."""
        left = self._size_bytes - self.tell()
        data = super().read(max(0, min(left, _BLOCK_BYTES)))
        if left > 0 and not data:
            raise EOFError("the file is shorter than when it was hashed")
        self._on_read(self.tell())
        return data or b""


class Bucket:
    """The S3 requests that the store needs. Keys are relative to the prefix.

    Methods raise `StoreUnavailable` if all attempts failed, and `TitaError` for permanent errors.
    """

    def __init__(self, uri: str, *, max_connections: int) -> None:
        self.name, self.prefix = parse_uri(uri)
        self._client = create_client(max_connections=max_connections)
        self._lock = threading.Lock()
        self._honoured: dict[str, bool] = {}
        """Whether the server honours `IfNoneMatch` and `IfMatch`, as far as it was tested."""

    @property
    def uri(self) -> str:
        return f"s3://{self.name}/{self.prefix}".rstrip("/")

    def _address(self, key: str) -> dict[str, str]:
        """The parameters `Bucket` and `Key` of a request.

        Raises:
            TitaError: the key is outside the store.
        """
        if not is_inside(key):
            raise TitaError(f"key {key!r} leaves the store", where=self.uri)
        check_key_length(self.prefix + key)
        return {"Bucket": self.name, "Key": self.prefix + key}

    def _request(self, operation: str, key: str, **parameters: Any) -> dict[str, Any]:
        """Call one method of the boto3 client for `key`.

        Raises:
            FileNotFoundError, FileExistsError: see `translate_errors`.
        """
        return self._send(operation, where=key, **self._address(key), **parameters)

    def _send(self, operation: str, *, where: str, **parameters: Any) -> dict[str, Any]:
        @translate_errors(f"{self.uri}/{where}")
        def attempt() -> Any:
            return getattr(self._client, operation)(**parameters)

        response: dict[str, Any] = retry(attempt)
        return response

    def _pages(
        self, operation: str, where: str, markers: tuple[str, ...], **parameters: str
    ) -> Iterator[dict[str, Any]]:
        """The pages of a listing; `markers` name the parameters that select the next page."""
        position: dict[str, Any] = {}
        while True:
            page = self._send(operation, where=where, **parameters, **position)
            yield page
            following = {name: page[f"Next{name}"] for name in markers if page.get(f"Next{name}")}
            if not page.get("IsTruncated") or not following:
                return
            if following == position:
                raise TitaError("the server repeats a page of its listing", where=self.uri)
            position = following

    def head(self, key: str) -> ObjectHead | None:
        """Size and recorded digest of an object, or None if it does not exist."""
        try:
            response = self._request("head_object", key)
        except FileNotFoundError:
            return None
        return ObjectHead(
            size_bytes=response["ContentLength"],
            sha256=_metadata(response).get(_SHA256),
            encryption=response.get("ServerSideEncryption"),
        )

    def has_content(self, key: str, *, sha256: str) -> bool:
        """Whether an object exists whose writer recorded this SHA-256."""
        found = self.head(key)
        return found is not None and found.sha256 == sha256

    def get(self, key: str) -> bytes:
        """The content of an object; see `get_with_etag`."""
        return self.get_with_etag(key)[0]

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """Content and ETag of an object; the SHA-256 is verified if the writer recorded it.

        Raises:
            FileNotFoundError: the object does not exist.
            DamagedData: the content does not have the recorded SHA-256.
        """
        address, where = self._address(key), f"{self.uri}/{key}"

        def attempt() -> tuple[bytes, str]:
            with translate_errors(where):
                response = self._client.get_object(**address)
                data = bytes(response["Body"].read())
            expected = _metadata(response).get(_SHA256)
            if expected is not None and hashlib.sha256(data).hexdigest() != expected:
                raise WrongContent("the content does not match its checksum", where=where)
            return data, str(response["ETag"])

        try:
            return retry(attempt)
        except WrongContent as error:
            # Every attempt read it: the object is damaged, not the transfer.
            raise DamagedData(
                error.what, where=where, remedy="delete the object, or write it again"
            ) from None

    def read_range(self, key: str, *, start: int, size_bytes: int) -> Iterator[bytes]:
        """Yield `size_bytes` bytes of an object from `start`. Not retried.

        Raises:
            StoreUnavailable: also if the object or the response is shorter.
            FileNotFoundError: the object does not exist.
        """
        if not size_bytes:
            return
        where = f"{self.uri}/{key}"
        with translate_errors(where):
            response = self._client.get_object(
                **self._address(key), Range=f"bytes={start}-{start + size_bytes - 1}"
            )
            # A server without support for ranges sends the whole object.
            skip = 0 if "ContentRange" in response else start
            left = size_bytes
            with closing(response["Body"]) as body:
                while left:
                    chunk = body.read(min(_CHUNK_BYTES, left + skip))
                    if not chunk:
                        raise StoreUnavailable(
                            f"content does not match its manifest: {left} bytes are missing",
                            where=where,
                        )
                    kept = chunk[skip : skip + left]
                    skip -= min(skip, len(chunk))
                    left -= len(kept)
                    yield kept
                if "ContentRange" in response:
                    # Only a body that was read to its end returns the connection to the pool.
                    body.read(1)

    def put(self, key: str, data: bytes, *, sha256: str | None = None) -> None:
        """Write one object; `sha256` is its digest, if the caller knows it."""
        body = _BytesBody(data, sha256=sha256 or hashlib.sha256(data).hexdigest())
        self._request("put_object", key, Body=body, Metadata={_SHA256: body.sha256})

    def put_file(
        self, key: str, path: Path, *, size_bytes: int, sha256: str, advance: Callable[[int], None]
    ) -> None:
        """Write one object from a file with a known size and digest, without loading it.

        Args:
            advance: called with the number of bytes sent for the first time; may raise.

        Raises:
            StoreUnavailable: also if the file does not have this size and digest any more.
        """
        address, shown = self._address(key), 0

        def on_read(position: int) -> None:
            nonlocal shown
            advance(max(0, position - shown))
            shown = max(shown, position)

        def attempt() -> None:
            # botocore reports an exception during a request as a failed connection, after which
            # the next attempt ends here.
            advance(0)
            with (
                _FileBody(path, size_bytes=size_bytes, sha256=sha256, on_read=on_read) as body,
                translate_errors(f"{self.uri}/{key}"),
            ):
                self._client.put_object(**address, Body=body, Metadata={_SHA256: sha256})

        retry(attempt)

    def put_if_unchanged(self, key: str, data: bytes, *, etag: str | None) -> bool:
        """Write one object if it still has this ETag or, for None, if it does not exist.

        Returns:
            Whether it was written.

        Raises:
            TitaError: the server ignores the condition; see `require_conditions`.
        """
        self.require_conditions(etag is not None)
        return self._put_conditionally(key, data, etag=etag)

    def require_conditions(self, on_existing: bool) -> None:
        """Test, once, whether the server honours If-Match, or else If-None-Match.

        Raises:
            TitaError: it does not.
        """
        name = "IfMatch" if on_existing else "IfNoneMatch"
        with self._lock:
            if name not in self._honoured:
                self._honoured[name] = self._probe(on_existing)
        if self._honoured[name]:
            return
        header = "If-Match" if on_existing else "If-None-Match"
        versioning = self.versioning()
        if versioning in ("Enabled", "Suspended"):
            # Ceph 16.2, for example, which otherwise honours conditions.
            raise TitaError(
                f"the server ignores {header} in this bucket, whose versioning is "
                f"{versioning.lower()}, so two writers could both succeed",
                where=self.uri,
                remedy="use a bucket that never had versioning, or a server that honours "
                "conditions in versioned buckets",
            )
        remedy = "set TITA_S3_ENDPOINT_URL to a server with conditional writes"
        if versioning is None:
            remedy = f"use a bucket without versioning, or {remedy}"
        raise TitaError(
            f"the server ignores {header}, so two writers could both succeed",
            where=self.uri,
            remedy=remedy,
        )

    def versioning(self) -> str | None:
        """`Enabled`, `Suspended`, or empty if the bucket never had it; None if that is unknown."""
        try:
            found = self._send("get_bucket_versioning", where="", Bucket=self.name)
        except (TitaError, FileNotFoundError):
            return None  # few credentials have the right to ask
        return str(found.get("Status", ""))

    def _probe(self, on_existing: bool) -> bool:
        """Whether the server refuses what it must refuse; writes at most one small object."""
        try:
            if on_existing:
                return not self._put_conditionally(_PROBE, b"", etag='"0"')
            created = self._put_conditionally(_PROBE, b"", etag=None)
            return not created or not self._put_conditionally(_PROBE, b"", etag=None)
        except NotSupported:
            return False

    def _put_conditionally(self, key: str, data: bytes, *, etag: str | None) -> bool:
        writer = uuid.uuid4().hex
        body = _BytesBody(data, sha256=hashlib.sha256(data).hexdigest())
        metadata = {_SHA256: body.sha256, _WRITER: writer}
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        try:
            self._request("put_object", key, Body=body, Metadata=metadata, **condition)
        except (FileExistsError, FileNotFoundError):
            # If the response to our own write was lost, the retry finds our object.
            try:
                found = _metadata(self._request("head_object", key))
            except FileNotFoundError:
                return False
            return found.get(_WRITER) == writer
        return True

    def delete(self, key: str) -> None:
        """Delete one object, if it exists."""
        with suppress(FileNotFoundError):
            self._request("delete_object", key)

    def list_objects(self, prefix: str, *, start_at: str = "") -> list[ObjectInfo]:
        """All objects whose key begins with `prefix` and is not before `start_at`, sorted by key.

        Some servers sort by folder, so the keys are sorted here.
        """
        found: dict[str, ObjectInfo] = {}
        # S3 takes the key after which a listing begins: a little before `start_at`.
        before = start_at[:-1] + chr(ord(start_at[-1]) - 1) if start_at else ""
        options = {"StartAfter": self.prefix + before} if start_at else {}
        for page in self._listing(prefix, **options):
            for entry in page.get("Contents", ()):
                key = str(entry["Key"]).removeprefix(self.prefix)
                if key < start_at:
                    continue
                found[key] = ObjectInfo(
                    key=key,
                    size_bytes=entry["Size"],
                    etag=entry.get("ETag", ""),
                    modified=entry["LastModified"],
                )
        return [found[key] for key in sorted(found)]

    def list_folders(self, prefix: str) -> list[str]:
        """Keys of the folders that begin with `prefix` and have no further `/`, sorted."""
        found: set[str] = set()
        for page in self._listing(prefix, Delimiter="/"):
            names = (str(entry["Prefix"]) for entry in page.get("CommonPrefixes") or ())
            found |= {name.removeprefix(self.prefix).rstrip("/") for name in names}
        return sorted(found)

    def _listing(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        """The pages of the listing of a prefix; none if the server says that it does not exist."""
        with suppress(FileNotFoundError):
            for page in self._pages(
                "list_objects_v2",
                prefix,
                ("ContinuationToken",),
                Bucket=self.name,
                Prefix=self.prefix + prefix,
                **options,
            ):
                if "Name" not in page:
                    # botocore parses a web page, such as MinIO's console, as an empty listing.
                    raise TitaError(
                        "this is not an S3 server",
                        where=self.uri,
                        remedy="check the port in TITA_S3_ENDPOINT_URL",
                    )
                yield page

    def copy(self, source: str, key: str, *, sha256: str) -> None:
        """Copy one object of any size on the server; `sha256` is recorded for the copy.

        Raises:
            FileNotFoundError: the source does not exist.
        """
        address, target = self._address(source), self._address(key)
        config = TransferConfig(
            use_threads=False,
            multipart_threshold=_COPY_PART_BYTES,
            multipart_chunksize=_COPY_PART_BYTES,
        )
        metadata = {"Metadata": {_SHA256: sha256}, "MetadataDirective": "REPLACE"}

        @translate_errors(f"{self.uri}/{source}")
        def attempt() -> None:
            self._client.copy(
                address, target["Bucket"], target["Key"], ExtraArgs=metadata, Config=config
            )

        retry(attempt)

    # Multipart uploads. Their methods raise FileNotFoundError if the upload does not exist (any
    # more): it was completed or aborted.

    def create_upload(self, key: str, *, sha256: str) -> str:
        """Start a multipart upload and return its id; `sha256` is that of the whole object."""
        response = self._request("create_multipart_upload", key, Metadata={_SHA256: sha256})
        return str(response["UploadId"])

    def upload_part(self, key: str, data: bytearray, *, upload_id: str, number: int) -> str:
        """Write part `number`, counted from 1, and return its ETag."""
        response = self._request(
            "upload_part", key, Body=data, UploadId=upload_id, PartNumber=number
        )
        return str(response["ETag"])

    def complete_upload(self, key: str, etags: Mapping[int, str], *, upload_id: str) -> None:
        """Make an object of the parts, given their ETags by number."""
        parts = [{"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)]
        self._request(
            "complete_multipart_upload", key, UploadId=upload_id, MultipartUpload={"Parts": parts}
        )

    def abort_upload(self, key: str, *, upload_id: str) -> None:
        """Delete a multipart upload and its parts, if it exists."""
        with suppress(FileNotFoundError):
            self._request("abort_multipart_upload", key, UploadId=upload_id)

    def list_parts(self, key: str, *, upload_id: str) -> dict[int, str]:
        """ETags by number of the parts that the server has."""
        pages = self._pages(
            "list_parts", key, ("PartNumberMarker",), UploadId=upload_id, **self._address(key)
        )
        return {
            part["PartNumber"]: part["ETag"] for page in pages for part in page.get("Parts", ())
        }

    def list_uploads(self, prefix: str) -> list[MultipartUpload]:
        """All multipart uploads whose key begins with `prefix`, oldest first."""
        pages = self._pages(
            "list_multipart_uploads",
            prefix,
            ("KeyMarker", "UploadIdMarker"),
            Bucket=self.name,
            Prefix=self.prefix + prefix,
        )
        found = [
            MultipartUpload(
                key=str(entry["Key"]).removeprefix(self.prefix),
                upload_id=entry["UploadId"],
                created=entry["Initiated"],
            )
            for page in pages
            for entry in page.get("Uploads") or ()
        ]
        return sorted(found, key=lambda upload: upload.created)


def _metadata(response: Mapping[str, Any]) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in response.get("Metadata", {}).items()}
