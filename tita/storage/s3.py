"""The store in S3: trees go up file by file and can be seen once their manifest is there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.storage.bucket import Bucket, Listed
from tita.storage.cache import TreeCache
from tita.storage.download import Download
from tita.storage.exclusive import Exclusive
from tita.storage.manifest import (
    MANIFEST,
    Manifest,
    ManifestFile,
    describe,
    files_below,
    is_whole,
)
from tita.storage.store import ObjectInfo, whole_tree
from tita.storage.transfers import WORKERS, each, in_parallel, transfer
from tita.storage.upload import WHOLE_BYTES, State, Upload, left_over, state_of

_READINGS = 3
"""How often a pull begins again because another push replaced the tree meanwhile."""


class S3Store:
    """A store below `s3://bucket/prefix`."""

    def __init__(self, uri: str) -> None:
        self._bucket = Bucket(uri, workers=WORKERS)
        self._exclusive = Exclusive(self._bucket)

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
            return self._exclusive.put_if_absent(key, data)
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

    def read_manifest(self, prefix: str) -> Manifest | None:
        key = f"{prefix}/{MANIFEST}"
        try:
            data = self._bucket.get(key)
        except FileNotFoundError:
            return None
        return Manifest.from_json(data, where=f"{self.uri}/{key}")

    def push_tree(
        self, folder: Path, prefix: str, *, meta: Mapping[str, Any] | None = None
    ) -> Manifest:
        if not folder.is_dir():
            raise TitaError("no such folder", where=str(folder), remedy="check the path")
        states = {path: state_of(folder / path) for path in files_below(folder)}
        manifest = describe(folder, paths=states, meta=meta)
        before = self._manifest_before(prefix)
        known = {file.path: file for file in before.files} if before else {}
        # What is new hurts no reader of the old tree. What replaces a file of it is put aside, and
        # a manifest that says so makes the new tree the one that is there; then it is moved.
        placed = [
            file if known.get(file.path) in (None, file) else replace(file, key=_aside(file))
            for file in manifest.files
        ]
        self._send(folder, prefix, placed, known=known, states=states)
        aside = [file for file in placed if file.key is not None]
        if aside:
            self._write(prefix, replace(manifest, files=tuple(placed)))
            each("put in place", aside, partial(self._move_in, prefix))
        self._write(prefix, manifest)
        gone = known.keys() - {file.path for file in manifest.files}
        stale = {file.key for file in (*known.values(), *aside) if file.key is not None}
        in_parallel(partial(self.delete, f"{prefix}/{path}") for path in sorted(gone | stale))
        return manifest

    def _write(self, prefix: str, manifest: Manifest) -> None:
        self.put(f"{prefix}/{MANIFEST}", manifest.to_json())

    def _move_in(self, prefix: str, file: ManifestFile) -> None:
        source, key = f"{prefix}/{file.key}", f"{prefix}/{file.path}"
        try:
            self._bucket.copy(source, key, sha256=file.sha256)
        except FileNotFoundError:
            raise _met_another_push(f"{self.uri}/{source}") from None

    def _manifest_before(self, prefix: str) -> Manifest | None:
        """The old tree's manifest; one that cannot be read is removed, being no tree's."""
        try:
            return self.read_manifest(prefix)
        except TitaError as error:
            if error.what != "not a whole manifest":
                raise
            self.delete(f"{prefix}/{MANIFEST}")
            return None

    def _send(
        self,
        folder: Path,
        prefix: str,
        files: Sequence[ManifestFile],
        *,
        known: Mapping[str, ManifestFile],
        states: Mapping[str, State],
    ) -> None:
        there = {entry.key: entry for entry in self._bucket.list(f"{prefix}/")}
        found: set[ManifestFile] = set()
        each("look up", files, partial(self._check, prefix, there, known, found))
        missing = sorted(found, key=lambda file: file.path)
        large = {f"{prefix}/{_place(f)}" for f in missing if f.size_bytes > WHOLE_BYTES}
        left = left_over(self._bucket, f"{prefix}/", keys=large)
        with transfer("push", total=sum(file.size_bytes for file in missing)) as sending:
            uploads = (
                Upload(
                    bucket=self._bucket,
                    transfer=sending,
                    path=folder / file.path,
                    key=f"{prefix}/{_place(file)}",
                    file=file,
                    state=states[file.path],
                    left=left.get(f"{prefix}/{_place(file)}"),
                )
                for file in missing
            )
            sending.run(chain.from_iterable(upload.tasks() for upload in uploads))

    def _check(
        self,
        prefix: str,
        there: Mapping[str, Listed],
        known: Mapping[str, ManifestFile],
        missing: set[ManifestFile],
        file: ManifestFile,
    ) -> None:
        """Add `file` to what is missing, unless an earlier push brought this very content."""
        key = f"{prefix}/{_place(file)}"
        if key in there and there[key].size_bytes == file.size_bytes:
            if known.get(file.path) == file:
                return
            head = self._bucket.head(key)
            if head is not None and head.sha256 == file.sha256:
                return
        missing.add(file)

    def pull_tree(self, prefix: str, *, into: Path | None = None) -> Path:
        manifest = whole_tree(self, prefix)
        for _ in range(_READINGS):
            try:
                return self._pull(prefix, manifest, into)
            except TitaError:
                # Another push may have replaced the tree while it was read.
                now = whole_tree(self, prefix)
                if now == manifest:
                    raise
                manifest = now
        return self._pull(prefix, manifest, into)

    def _pull(self, prefix: str, manifest: Manifest, into: Path | None) -> Path:
        if into is None:
            return TreeCache.of_settings().hold(
                manifest, fetch=partial(self._fetch, prefix), origin=f"{self.uri}/{prefix}"
            )
        into.mkdir(parents=True, exist_ok=True)
        missing: list[tuple[ManifestFile, Path]] = []

        def check(file: ManifestFile) -> None:
            if not is_whole(into / file.path, file):
                missing.append((file, into / file.path))

        each("check", manifest.files, check)
        self._fetch(prefix, missing)
        (into / MANIFEST).write_bytes(manifest.to_json())
        return into

    def _fetch(self, prefix: str, files: Sequence[tuple[ManifestFile, Path]]) -> None:
        with (
            transfer("pull", total=sum(file.size_bytes for file, _ in files)) as fetching,
            ExitStack() as opened,
        ):

            def download(file: ManifestFile, path: Path) -> Iterator[Callable[[], None]]:
                one = Download(
                    bucket=self._bucket,
                    transfer=fetching,
                    key=f"{prefix}/{_place(file)}",
                    file=file,
                    path=path,
                )
                if one.is_large:
                    opened.enter_context(closing(one))
                return one.tasks()

            fetching.run(chain.from_iterable(download(*wanted) for wanted in files))


def _place(file: ManifestFile) -> str:
    return file.key or file.path


def _aside(file: ManifestFile) -> str:
    """Where new content waits below the tree until it may replace the old."""
    folder, _, _ = file.path.rpartition("/")
    return f"{folder}/.tita-{file.sha256}".lstrip("/")


def _met_another_push(where: str) -> TitaError:
    return TitaError("another push of this tree was under way", where=where, remedy="push again")
