"""The store in S3. A push uploads files one by one; the manifest makes the tree visible."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.storage.cache import TreeCache
from tita.storage.download import Download
from tita.storage.manifest import (
    MANIFEST,
    InvalidManifest,
    Manifest,
    ManifestFile,
    build_manifest,
    is_complete,
    tree_paths,
)
from tita.storage.s3_bucket import Bucket
from tita.storage.store import ObjectInfo, require_manifest
from tita.storage.transfers import WORKERS, TransferPool, for_each_file, transfer_pool
from tita.storage.upload import FileState, Upload, file_state, is_multipart, unfinished_uploads

_MAX_PULL_ATTEMPTS = 4
"""A pull is repeated if a push replaced the tree meanwhile."""


class S3Store:
    """A store at `s3://bucket/prefix`."""

    def __init__(self, uri: str) -> None:
        self._bucket = Bucket(uri, max_connections=WORKERS)

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
        return self._bucket.metadata(key) is not None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for entry in self._bucket.list_objects(prefix):
            if not entry.key.rpartition("/")[2].startswith(".tita-"):
                yield entry

    def delete(self, key: str) -> None:
        self._bucket.delete(key)

    def read_manifest(self, prefix: str) -> Manifest | None:
        key = f"{prefix}/{MANIFEST}"
        try:
            data = self._bucket.get(key)
        except FileNotFoundError:
            return None
        return Manifest.from_json(data, where=f"{self.uri}/{key}")

    def push_tree(
        self, folder: str | Path, prefix: str, *, meta: Mapping[str, Any] | None = None
    ) -> Manifest:
        folder = Path(folder)
        states = {path: file_state(folder / path) for path in tree_paths(folder)}
        manifest = build_manifest(folder, paths=states, meta=meta)
        known = {file.path: file for file in self._previous_files(prefix)}
        # A file that is new to the tree is uploaded to its final key. One that replaces a file is
        # uploaded beside it, so that readers of the previous tree are not disturbed; a manifest
        # with these keys then makes the new tree visible, and the files are moved.
        files = [
            file
            if known.get(file.path) in (None, file)
            else replace(file, key=_temporary_key(file))
            for file in manifest.files
        ]
        self._upload(folder, prefix, files, known=known, states=states)
        beside = [file for file in files if file.key is not None]
        if beside:
            interim = replace(manifest, files=tuple(files))
            self.put(f"{prefix}/{MANIFEST}", interim.to_json())
            for_each_file("put in place", beside, partial(self._move, prefix))
        self.put(f"{prefix}/{MANIFEST}", manifest.to_json())
        removed = known.keys() - {file.path for file in manifest.files}
        temporary = {file.key for file in (*known.values(), *beside) if file.key is not None}
        unused = sorted(removed | temporary)
        TransferPool().run(partial(self.delete, f"{prefix}/{path}") for path in unused)
        return manifest

    def _move(self, prefix: str, file: ManifestFile) -> None:
        source, key = f"{prefix}/{file.key}", f"{prefix}/{file.path}"
        try:
            self._bucket.copy(source, key, sha256=file.sha256)
        except FileNotFoundError:
            raise TitaError(
                "a concurrent push of this tree interfered",
                where=f"{self.uri}/{source}",
                remedy="push again",
            ) from None

    def _previous_files(self, prefix: str) -> Sequence[ManifestFile]:
        """The files of the tree that is replaced; deletes a manifest that cannot be parsed."""
        try:
            manifest = self.read_manifest(prefix)
        except InvalidManifest:
            self.delete(f"{prefix}/{MANIFEST}")
            return ()
        return manifest.files if manifest else ()

    def _upload(
        self,
        folder: Path,
        prefix: str,
        files: Sequence[ManifestFile],
        *,
        known: Mapping[str, ManifestFile],
        states: Mapping[str, FileState],
    ) -> None:
        """Upload the files that an earlier push did not upload."""
        sizes = {entry.key: entry.size_bytes for entry in self._bucket.list_objects(f"{prefix}/")}
        missing: set[ManifestFile] = set()

        def check(file: ManifestFile) -> None:
            key = f"{prefix}/{file.stored_at}"
            if sizes.get(key) != file.size_bytes or (
                known.get(file.path) != file
                and not self._bucket.has_content(key, sha256=file.sha256)
            ):
                missing.add(file)

        for_each_file("look up", files, check)
        large = {f"{prefix}/{file.stored_at}" for file in missing if is_multipart(file)}
        unfinished = unfinished_uploads(self._bucket, f"{prefix}/", keys=large)
        with transfer_pool("push", total_bytes=sum(file.size_bytes for file in missing)) as pool:
            uploads = (
                Upload(
                    bucket=self._bucket,
                    pool=pool,
                    path=folder / file.path,
                    key=f"{prefix}/{file.stored_at}",
                    file=file,
                    state=states[file.path],
                    resume_id=unfinished.get(f"{prefix}/{file.stored_at}"),
                )
                for file in sorted(missing, key=lambda file: file.path)
            )
            pool.run(chain.from_iterable(upload.tasks() for upload in uploads))

    def pull_tree(self, prefix: str, *, into: str | Path | None = None) -> Path:
        into = None if into is None else Path(into)
        manifest = require_manifest(self, prefix)
        for _ in range(_MAX_PULL_ATTEMPTS - 1):
            try:
                return self._pull(prefix, manifest, into)
            except TitaError:
                # Without a push in between, another attempt is useless.
                current = require_manifest(self, prefix)
                if current == manifest:
                    raise
                manifest = current
        return self._pull(prefix, manifest, into)

    def _pull(self, prefix: str, manifest: Manifest, into: Path | None) -> Path:
        if into is None:
            return TreeCache.from_settings().hold(
                manifest, fetch=partial(self._fetch, prefix), origin=f"{self.uri}/{prefix}"
            )
        into.mkdir(parents=True, exist_ok=True)
        missing: list[tuple[ManifestFile, Path]] = []

        def check(file: ManifestFile) -> None:
            if not is_complete(into / file.path, file):
                missing.append((file, into / file.path))

        for_each_file("check", manifest.files, check)
        self._fetch(prefix, missing)
        (into / MANIFEST).write_bytes(manifest.to_json())
        return into

    def _fetch(self, prefix: str, files: Sequence[tuple[ManifestFile, Path]]) -> None:
        """Download files of a tree to paths."""
        total_bytes = sum(file.size_bytes for file, _ in files)
        with transfer_pool("pull", total_bytes=total_bytes) as pool, ExitStack() as opened:

            def tasks(file: ManifestFile, path: Path) -> Iterator[Callable[[], None]]:
                key = f"{prefix}/{file.stored_at}"
                download = Download(bucket=self._bucket, pool=pool, key=key, file=file, path=path)
                if download.has_slices:
                    opened.enter_context(closing(download))
                return download.tasks()

            pool.run(chain.from_iterable(tasks(file, path) for file, path in files))


def _temporary_key(file: ManifestFile) -> str:
    """Where the new content of an existing file is stored until the new tree is visible."""
    folder, _, _ = file.path.rpartition("/")
    return f"{folder}/.tita-{file.sha256}".lstrip("/")
