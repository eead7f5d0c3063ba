"""The store in S3: objects, and pulls of trees."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tita.errors import DamagedData, TitaError
from tita.storage.cache import TreeCache
from tita.storage.download import Download
from tita.storage.local_copy import write_record
from tita.storage.manifest import MANIFEST, Manifest, ManifestFile, is_complete
from tita.storage.push_rules import is_hidden
from tita.storage.s3_bucket import Bucket, WrongContent
from tita.storage.s3_prune import find_unused, prune
from tita.storage.s3_push import S3Push, read_manifest
from tita.storage.store import ObjectInfo, PullingStore, UnusedContent
from tita.storage.transfers import WORKERS, TransferPool, for_each_file, transfer_pool


class S3Store(PullingStore):
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
            return self._bucket.put_if_unchanged(key, data, etag=None)
        self._bucket.put(key, data)
        return True

    def exists(self, key: str) -> bool:
        return self._bucket.head(key) is not None

    def list(self, prefix: str = "", *, start_at: str = "") -> Iterator[ObjectInfo]:
        for entry in self._bucket.list_objects(prefix, start_at=start_at):
            if not is_hidden(entry.key):
                yield entry

    def folders(self, prefix: str) -> Sequence[str]:
        return [key for key in self._bucket.list_folders(prefix) if not is_hidden(key)]

    def delete(self, key: str) -> None:
        self._bucket.delete(key)

    def delete_tree(self, prefix: str) -> None:
        keys = [entry.key for entry in self._bucket.list_objects(f"{prefix}/")]
        manifests = [key for key in keys if key.endswith(f"/{MANIFEST}")]
        for some in (manifests, sorted(set(keys) - set(manifests))):
            TransferPool().run(partial(self.delete, key) for key in some)

    def find_unused(self, prefix: str, *, older_than: timedelta) -> Sequence[UnusedContent]:
        return find_unused(self._bucket, prefix, older_than=older_than)

    def prune(self, prefix: str, *, older_than: timedelta) -> Sequence[UnusedContent]:
        return prune(self._bucket, prefix, older_than=older_than)

    def read_manifest(self, prefix: str) -> Manifest | None:
        return read_manifest(self._bucket, prefix)[0]

    def push_tree(
        self,
        folder: str | Path,
        prefix: str,
        *,
        meta: Mapping[str, Any] | None = None,
        max_removed: float = 1.0,
        verify: bool = False,
    ) -> Manifest:
        push = S3Push(
            bucket=self._bucket,
            folder=Path(folder),
            prefix=prefix,
            meta=dict(meta or {}),
            max_removed=max_removed,
            verify=verify,
        )
        return push.run()

    def copy_files(self, prefix: str, manifest: Manifest, into: Path | None) -> Path:
        if into is None:
            return TreeCache.from_settings().hold(
                manifest, fetch=partial(self._fetch, prefix), origin=f"{self.uri}/{prefix}"
            )
        into.mkdir(parents=True, exist_ok=True)
        for files in manifest.batches():
            missing: list[tuple[ManifestFile, Path]] = []

            def check(file: ManifestFile, into: Path = into, missing: Any = missing) -> None:
                if not is_complete(into / file.path, file):
                    missing.append((file, into / file.path))

            for_each_file(f"check {prefix}", files, check)
            self._fetch(prefix, missing)
        write_record(into, manifest)
        return into

    def _fetch(self, prefix: str, files: Sequence[tuple[ManifestFile, Path]]) -> None:
        """Download files of a tree to paths."""
        try:
            self._download(prefix, files)
        except WrongContent:
            # A slice of a large file was damaged on this disk or on its way here, or in the store.
            left = [(file, path) for file, path in files if not is_complete(path, file)]
            try:
                self._download(prefix, left)
            except WrongContent as error:
                raise DamagedData(error.what, where=error.where, remedy=error.remedy) from None

    def _download(self, prefix: str, files: Sequence[tuple[ManifestFile, Path]]) -> None:
        total_bytes = sum(file.size_bytes for file, _ in files)
        with (
            transfer_pool(f"pull {prefix}", total_bytes=total_bytes) as pool,
            ExitStack() as opened,
        ):

            def tasks(file: ManifestFile, path: Path) -> Iterator[Callable[[], None]]:
                key = f"{prefix}/{file.stored_at}"
                download = Download(bucket=self._bucket, pool=pool, key=key, file=file, path=path)
                if download.has_slices:
                    opened.enter_context(closing(download))
                return download.tasks()

            pool.run(chain.from_iterable(tasks(file, path) for file, path in files))
