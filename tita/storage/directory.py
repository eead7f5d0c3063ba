"""The store in a plain directory: objects, and pulls of trees."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from tita.errors import DamagedData, TitaError
from tita.storage.directory_prune import find_unused, prune
from tita.storage.directory_push import (
    DirectoryPush,
    read_manifest,
    staged,
)
from tita.storage.files import temporary_path
from tita.storage.local_copy import write_record
from tita.storage.manifest import MANIFEST, Manifest, is_complete, is_inside
from tita.storage.push_rules import HIDDEN
from tita.storage.store import ObjectInfo, PullingStore, UnusedContent
from tita.terminal import progress


class DirectoryStore(PullingStore):
    """A store in one directory. Several processes may use it at the same time."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()

    @property
    def uri(self) -> str:
        return str(self.root)

    def _path(self, key: str) -> Path:
        if not is_inside(key):
            raise TitaError(f"key {key!r} leaves the store", where=self.uri)
        return self.root / key

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise TitaError("no such object", where=f"{self.uri}/{key}") from None

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if if_absent:
                # A hard link fails if the name exists, so one of several writers wins.
                os.link(temporary, path)
            else:
                temporary.replace(path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str = "", *, start_at: str = "") -> Iterator[ObjectInfo]:
        folder, slash, _ = prefix.rpartition("/")
        for key in _keys(self.root / folder, f"{folder}{slash}"):
            if key >= start_at and key.startswith(prefix):
                with suppress(FileNotFoundError):  # deleted since the folder was read
                    yield ObjectInfo(key=key, size_bytes=(self.root / key).stat().st_size)

    def folders(self, prefix: str) -> Sequence[str]:
        parent, _, start = prefix.rpartition("/")
        try:
            with os.scandir(self.root / parent) as entries:
                names = [entry.name for entry in entries if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        above = f"{parent}/" if parent else ""
        return sorted(
            f"{above}{name}"
            for name in names
            if name.startswith(start) and not name.startswith(HIDDEN)
        )

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        folder = self._path(prefix)
        for path in sorted(folder.rglob(MANIFEST)):
            path.unlink(missing_ok=True)
        if folder.is_dir():
            shutil.rmtree(folder)

    def find_unused(self, prefix: str, *, older_than: timedelta) -> Sequence[UnusedContent]:
        return find_unused(self.root, prefix, older_than=older_than)

    def prune(self, prefix: str, *, older_than: timedelta) -> Sequence[UnusedContent]:
        return prune(self.root, prefix, older_than=older_than)

    def read_manifest(self, prefix: str) -> Manifest | None:
        return read_manifest(self._path(prefix))[0]

    def push_tree(
        self,
        folder: str | Path,
        prefix: str,
        *,
        meta: Mapping[str, Any] | None = None,
        max_removed: float = 1.0,
        verify: bool = False,
    ) -> Manifest:
        push = DirectoryPush(
            root=self.root,
            folder=Path(folder),
            prefix=prefix,
            meta=dict(meta or {}),
            max_removed=max_removed,
        )
        return push.run()

    def copy_files(self, prefix: str, manifest: Manifest, into: Path | None) -> Path:
        source = self._path(prefix)

        def damaged(path: Path) -> DamagedData:
            return DamagedData(
                "does not match its manifest", where=str(path), remedy="push the tree again"
            )

        for file in manifest.files:
            path = source / file.stored_at
            if not path.is_file() or path.stat().st_size != file.size_bytes:
                raise damaged(path)
        if into is None:
            return source / self._version(prefix, manifest)
        with (
            staged(into) as stage,
            progress(f"pull {prefix}", total=manifest.size_bytes, unit="bytes") as advance,
        ):
            for file in manifest.files:
                if not is_complete(into / file.path, file) and not stage.copy(
                    file, source / file.stored_at
                ):
                    raise damaged(source / file.stored_at)
                advance(file.size_bytes)
            stage.rename_all(into)
        write_record(into, manifest)
        return into

    def _version(self, prefix: str, manifest: Manifest) -> str:
        """The folder of the files, relative to the tree.

        Raises:
            TitaError: they are in several folders, because the store was copied from S3.
        """
        folders = {
            file.stored_at.removesuffix(file.path) if file.stored_at.endswith(file.path) else None
            for file in manifest.files
        }
        if len(folders) > 1 or None in folders:
            raise TitaError(
                "the files of this tree are in several folders",
                where=f"{self.uri}/{prefix}",
                remedy="pull it into a folder with `tita data pull`, and push that",
            )
        return folders.pop() or "" if folders else ""


def _keys(folder: Path, above: str) -> Iterator[str]:
    """Keys of the objects in a folder and below, sorted; all begin with `above`."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(HIDDEN)]
    except (FileNotFoundError, NotADirectoryError):
        return
    files = [entry.name for entry in shown if not entry.is_dir()]
    # With its slash, by which a folder `a` comes behind a file `a-b`.
    folders = [f"{entry.name}/" for entry in shown if entry.is_dir() and not entry.is_symlink()]
    for name in sorted(files + folders):
        if name.endswith("/"):
            yield from _keys(folder / name, f"{above}{name}")
        else:
            yield f"{above}{name}"
