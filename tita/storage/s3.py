"""The store in S3: trees go up file by file and can be seen once their manifest is there."""

import hashlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.storage.bucket import Bucket, Listed
from tita.storage.faults import TornBody, again
from tita.storage.manifest import MANIFEST, Manifest, ManifestFile, describe, sha256_of
from tita.storage.store import ObjectInfo
from tita.terminal import progress

_ONE_REQUEST_BYTES = 16 << 20
"""Files up to this size are read once and sent in one request; larger ones go in parts."""
_WORKERS = 12


class S3Store:
    """A store below `s3://bucket/prefix`."""

    def __init__(self, uri: str) -> None:
        self._bucket = Bucket(uri, workers=_WORKERS)

    @property
    def uri(self) -> str:
        return self._bucket.uri

    def get(self, key: str) -> bytes:
        try:
            return self._bucket.get(key)
        except FileNotFoundError:
            raise TitaError("no such object", where=f"{self.uri}/{key}") from None

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if if_absent:
            return self._bucket.put_if_absent(key, data)
        self._bucket.put(key, data)
        return True

    def exists(self, key: str) -> bool:
        return self._bucket.head(key) is not None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for entry in self._bucket.list(prefix):
            if not entry.key.rpartition("/")[2].startswith(".tita-"):
                yield ObjectInfo(key=entry.key, size_bytes=entry.size_bytes)

    def delete(self, key: str) -> None:
        self._bucket.delete(key)

    def push_tree(
        self, folder: Path, prefix: str, *, meta: Mapping[str, Any] | None = None
    ) -> Manifest:
        if not folder.is_dir():
            raise TitaError("no such folder", where=str(folder), remedy="check the path")
        manifest = describe(folder, meta=meta)
        before = self._manifest_before(prefix)
        there = {entry.key: entry for entry in self._bucket.list(f"{prefix}/")}
        known = {file.path: file for file in before.files} if before else {}
        missing = self._each(
            manifest.files,
            "check",
            lambda file: None if self._is_there(prefix, file, there, known) else file,
        )
        upload = [file for file in missing if file is not None]
        changed = [file for file in upload if file.path in known]
        # What is new hurts no reader of the old tree. What replaces a file of it would, so from
        # then on until the new manifest is written there is no tree.
        self._each(
            [file for file in upload if file.path not in known],
            "push",
            lambda file: self._upload(folder, prefix, file),
        )
        if changed:
            self.delete(f"{prefix}/{MANIFEST}")
            self._each(changed, "push", lambda file: self._upload(folder, prefix, file))
        self.put(f"{prefix}/{MANIFEST}", manifest.to_json())
        for left_over in known.keys() - {file.path for file in manifest.files}:
            self.delete(f"{prefix}/{left_over}")
        return manifest

    def _manifest_before(self, prefix: str) -> Manifest | None:
        """The old tree's manifest; one that cannot be read is removed, being no tree's."""
        try:
            return self.read_manifest(prefix)
        except TitaError as error:
            if error.what != "not a whole manifest":
                raise
            self.delete(f"{prefix}/{MANIFEST}")
            return None

    def _is_there(
        self,
        prefix: str,
        file: ManifestFile,
        there: Mapping[str, Listed],
        known: Mapping[str, ManifestFile],
    ) -> bool:
        """Whether an earlier push, finished or broken off, brought this very content."""
        key = f"{prefix}/{file.path}"
        if key not in there or there[key].size_bytes != file.size_bytes:
            return False
        if file.path in known:
            return known[file.path] == file
        head = self._bucket.head(key)
        return head is not None and head.sha256 == file.sha256

    def _upload(self, folder: Path, prefix: str, file: ManifestFile) -> None:
        path, key = folder / file.path, f"{prefix}/{file.path}"
        if file.size_bytes <= _ONE_REQUEST_BYTES:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != file.sha256:
                raise _changed(path)
            self._bucket.put(key, data, sha256=file.sha256)
            return
        self._bucket.put_file(key, path, sha256=file.sha256)
        if sha256_of(path) != file.sha256:
            self.delete(key)
            raise _changed(path)

    def pull_tree(self, prefix: str, *, into: Path | None = None) -> Path:
        manifest = self.read_manifest(prefix)
        if manifest is None:
            raise TitaError(
                "no complete tree", where=f"{self.uri}/{prefix}", remedy="push it (again)"
            )
        target = into or _cache_dir() / manifest.digest
        target.mkdir(parents=True, exist_ok=True)
        found = self._each(
            manifest.files, "check", lambda f: None if _is_whole(target / f.path, f) else f
        )
        missing = [file for file in found if file is not None]
        self._each(
            missing, "pull", lambda file: again(lambda: self._download(target, prefix, file))
        )
        (target / MANIFEST).write_bytes(manifest.to_json())
        return target

    def _download(self, target: Path, prefix: str, file: ManifestFile) -> None:
        path, key = target / file.path, f"{prefix}/{file.path}"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tita-{uuid.uuid4().hex}")
        digest = hashlib.sha256()
        try:
            with temporary.open("wb") as out:
                for piece in self._bucket.read(key, start=0, size_bytes=file.size_bytes):
                    digest.update(piece)
                    out.write(piece)
            if digest.hexdigest() != file.sha256:
                raise TornBody(
                    "content differs from its manifest",
                    where=f"{self.uri}/{key}",
                    remedy="push it again if this happens twice",
                )
            temporary.replace(path)
        except FileNotFoundError:
            raise TitaError(
                "differs from its manifest: a file is missing",
                where=f"{self.uri}/{key}",
                remedy="push it again",
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _each(
        self,
        files: Sequence[ManifestFile],
        what: str,
        work: Callable[[ManifestFile], ManifestFile | None],
    ) -> Sequence[ManifestFile | None]:
        results = []
        total = sum(file.size_bytes for file in files)
        with (
            progress(what, total=total, unit="bytes") as advance,
            ThreadPoolExecutor(_WORKERS) as pool,
        ):
            for file, result in zip(files, pool.map(work, files), strict=True):
                results.append(result)
                advance(file.size_bytes)
        return results

    def read_manifest(self, prefix: str) -> Manifest | None:
        key = f"{prefix}/{MANIFEST}"
        try:
            data = self._bucket.get(key)
        except FileNotFoundError:
            return None
        return Manifest.from_json(data, where=f"{self.uri}/{key}")


def _changed(path: Path) -> TitaError:
    return TitaError("changed while it was pushed", where=str(path), remedy="push it again")


def _cache_dir() -> Path:
    from tita.settings import settings

    return settings().cache_dir.expanduser() / "trees"


def _is_whole(path: Path, file: ManifestFile) -> bool:
    return (
        path.is_file() and path.stat().st_size == file.size_bytes and sha256_of(path) == file.sha256
    )
