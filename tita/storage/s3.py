"""The store in S3 by boto3: any server that speaks the API, credentials from the AWS chain."""

import base64
import hashlib
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.storage.faults import TornBody, again, told, untorn
from tita.storage.manifest import MANIFEST, Manifest, ManifestFile, describe, is_inside, sha256_of
from tita.storage.store import ObjectInfo
from tita.terminal import progress

_MULTIPART_BYTES = 64 << 20
_WORKERS = 16


class S3Store:
    """A store below `s3://bucket/prefix`."""

    def __init__(self, uri: str) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise TitaError(f"no bucket in {uri!r}", remedy="write s3://bucket/prefix")
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._client = _new_client()
        self._lock = threading.Lock()
        self._conditional: bool | None = None

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def _key(self, key: str) -> str:
        if not is_inside(key):
            raise TitaError(f"key {key!r} leaves the store", where=self.uri)
        return self.prefix + key

    def get(self, key: str) -> bytes:
        try:
            return self._read(key)
        except FileNotFoundError:
            raise TitaError("no such object", where=f"{self.uri}/{key}") from None

    def _read(self, key: str) -> bytes:
        def attempt() -> bytes:
            body = self._open(key)
            with untorn(f"{self.uri}/{key}"):
                return bytes(body.read())

        return again(attempt)

    def _open(self, key: str) -> Any:
        with self._told(key):
            return self._client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"]

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if if_absent:
            self._need_conditional_writes()
        try:
            with self._told(key):
                self._put(self._key(key), data, if_absent=if_absent)
        except FileExistsError:
            return False
        return True

    def _put(self, key: str, data: bytes, *, if_absent: bool) -> None:
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        self._client.put_object(
            Bucket=self.bucket,
            Key=key,
            Body=data,
            ChecksumSHA256=digest,
            **({"IfNoneMatch": "*"} if if_absent else {}),
        )

    def _need_conditional_writes(self) -> None:
        """Find out once whether the server obeys If-None-Match.

        Raises:
            TitaError: it ignores it, so that of two writers both would believe they had won.
        """
        with self._lock:
            if self._conditional is None:
                probe = f"{self.prefix}.tita-probe-{uuid.uuid4().hex}"
                try:
                    self._put(probe, b"first", if_absent=True)
                    self._conditional = not self._succeeds(
                        lambda: self._put(probe, b"second", if_absent=True)
                    )
                finally:
                    self._client.delete_object(Bucket=self.bucket, Key=probe)
        if not self._conditional:
            raise TitaError(
                "the server ignores If-None-Match",
                where=self.uri,
                remedy="use an S3 server with conditional writes",
            )

    def _succeeds(self, call: Callable[[], None]) -> bool:
        try:
            with self._told("probe"):
                call()
        except FileExistsError:
            return False
        return True

    def exists(self, key: str) -> bool:
        try:
            with self._told(key):
                self._client.head_object(Bucket=self.bucket, Key=self._key(key))
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        pages = self._client.get_paginator("list_objects_v2")
        with self._told(prefix):
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self.prefix)
                    yield ObjectInfo(key=key, size_bytes=entry["Size"])

    def delete(self, key: str) -> None:
        with self._told(key):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def push_tree(
        self, folder: Path, prefix: str, *, meta: Mapping[str, Any] | None = None
    ) -> Manifest:
        if not folder.is_dir():
            raise TitaError("no such folder", where=str(folder), remedy="check the path")
        manifest = describe(folder, meta=meta)
        before = self.read_manifest(prefix)
        known = set(before.files) if before else set()
        self.delete(f"{prefix}/{MANIFEST}")
        missing = [file for file in manifest.files if file not in known]
        self._each(missing, "push", lambda file: self._upload(folder, prefix, file))
        self.put(f"{prefix}/{MANIFEST}", manifest.to_json())
        return manifest

    def _upload(self, folder: Path, prefix: str, file: ManifestFile) -> None:
        from boto3.s3.transfer import TransferConfig

        with self._told(file.path):
            self._client.upload_file(
                str(folder / file.path),
                self.bucket,
                self._key(f"{prefix}/{file.path}"),
                ExtraArgs={"ChecksumAlgorithm": "SHA256"},
                Config=TransferConfig(multipart_threshold=_MULTIPART_BYTES, use_threads=False),
            )

    def pull_tree(self, prefix: str, *, into: Path | None = None) -> Path:
        manifest = self.read_manifest(prefix)
        if manifest is None:
            raise TitaError(
                "no complete tree", where=f"{self.uri}/{prefix}", remedy="push it (again)"
            )
        target = into or _cache_dir() / manifest.digest
        target.mkdir(parents=True, exist_ok=True)
        missing = [file for file in manifest.files if not _is_whole(target / file.path, file)]
        self._each(
            missing, "pull", lambda file: again(lambda: self._download(target, prefix, file))
        )
        (target / MANIFEST).write_bytes(manifest.to_json())
        return target

    def _download(self, target: Path, prefix: str, file: ManifestFile) -> None:
        path, key = target / file.path, f"{prefix}/{file.path}"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tita-{uuid.uuid4().hex}")
        try:
            body = self._open(key)
            with untorn(f"{self.uri}/{key}"), temporary.open("wb") as out:
                shutil.copyfileobj(body, out, 1 << 20)
            if sha256_of(temporary) != file.sha256:
                raise TornBody(
                    "content differs from its manifest",
                    where=f"{self.uri}/{key}",
                    remedy="push it again if this happens twice",
                )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _each(
        self, files: Sequence[ManifestFile], what: str, work: Callable[[ManifestFile], None]
    ) -> None:
        total = sum(file.size_bytes for file in files)
        with (
            progress(what, total=total, unit="bytes") as advance,
            ThreadPoolExecutor(_WORKERS) as pool,
        ):
            for file, _ in zip(files, pool.map(work, files), strict=True):
                advance(file.size_bytes)

    def read_manifest(self, prefix: str) -> Manifest | None:
        key = f"{prefix}/{MANIFEST}"
        try:
            data = self._read(key)
        except FileNotFoundError:
            return None
        return Manifest.from_json(data, where=f"{self.uri}/{key}")

    def _told(self, key: str) -> AbstractContextManager[None]:
        return told(f"{self.uri}/{key}")


def _new_client() -> Any:
    import boto3
    from botocore.config import Config

    from tita.settings import settings

    here = settings()
    return boto3.client(
        "s3",
        endpoint_url=here.s3_endpoint_url,
        region_name=here.s3_region,
        config=Config(
            max_pool_connections=_WORKERS * 2,
            # "standard" is exponential backoff with jitter.
            retries={"mode": "standard", "max_attempts": 8},
            connect_timeout=10,
            read_timeout=60,
            s3={"addressing_style": "path" if here.s3_path_style else "auto"},
        ),
    )


def _cache_dir() -> Path:
    from tita.settings import settings

    return settings().cache_dir.expanduser() / "trees"


def _is_whole(path: Path, file: ManifestFile) -> bool:
    return (
        path.is_file() and path.stat().st_size == file.size_bytes and sha256_of(path) == file.sha256
    )
