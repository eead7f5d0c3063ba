"""The store as a plain directory: nothing to install, and files people can look at."""

import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.storage.locks import locked, wait_until_free
from tita.storage.manifest import MANIFEST, Manifest, describe, is_inside
from tita.storage.staging import Stage, stage
from tita.storage.store import ObjectInfo, whole_tree

_SWAP = ".tita-swap"
"""Locked while files of a tree are replaced."""
_READINGS = 8
"""How often a pull begins again because another push replaced the tree meanwhile."""

logger = logging.getLogger(__name__)


class DirectoryStore:
    """A store below one directory. Several processes may use it at once."""

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
        except (FileNotFoundError, IsADirectoryError):
            raise TitaError("no such object", where=f"{self.uri}/{key}") from None

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if not if_absent:
                temporary.replace(path)
                return True
            # A hard link fails where the name is taken: of two writers one wins.
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = self.root / prefix.rpartition("/")[0]
        for root, folders, names in os.walk(start):
            folders[:] = sorted(name for name in folders if not name.startswith(".tita-"))
            for path in (Path(root, name) for name in sorted(names)):
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not path.name.startswith(".tita-"):
                    yield ObjectInfo(key=key, size_bytes=path.stat().st_size)

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def push_tree(
        self, folder: Path, prefix: str, *, meta: Mapping[str, Any] | None = None
    ) -> Manifest:
        if not folder.is_dir():
            raise TitaError("no such folder", where=str(folder), remedy="check the path")
        target = self._path(prefix)
        manifest = describe(folder, meta=meta)
        if target.resolve() == folder.resolve():
            self.put(f"{prefix}/{MANIFEST}", manifest.to_json())
            return manifest
        with stage(target) as staged:
            staged.copy(folder, manifest, differs="changed while it was pushed")
            staged.write(MANIFEST, manifest.to_json())
            staged.flush()
            # Renames take moments, for which readers of an old tree wait.
            with locked(target / _SWAP):
                try:
                    _swap(target, manifest, staged)
                finally:
                    (target / _SWAP).unlink(missing_ok=True)
        return manifest

    def pull_tree(self, prefix: str, *, into: Path | None = None) -> Path:
        source = self._path(prefix)
        for reading in range(2, _READINGS + 1):
            seen = self._state(prefix)
            try:
                return self._pull(source, whole_tree(self, prefix), into)
            except (TitaError, FileNotFoundError) as error:
                # A push may have replaced the tree while it was read, even by the same one again.
                # Else it is torn, and no reading will mend it.
                if self._state(prefix) == seen:
                    raise
                logger.info("%s; reading again (%d of %d)", error, reading, _READINGS)
        return self._pull(source, whole_tree(self, prefix), into)

    def _state(self, prefix: str) -> tuple[int, int] | None:
        """What is never the same again once a tree was pushed over; None if there is no tree."""
        self._wait_for_push(prefix)
        try:
            found = self._path(f"{prefix}/{MANIFEST}").stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _pull(self, source: Path, manifest: Manifest, into: Path | None) -> Path:
        for file in manifest.files:
            path = source / file.path
            if not path.is_file() or path.stat().st_size != file.size_bytes:
                raise TitaError(
                    "differs from its manifest", where=str(path), remedy="push it again"
                )
        if into is None:
            return source
        with stage(into) as staged:
            staged.copy(source, manifest, differs="differs from its manifest")
            staged.move_in()
        return into

    def _wait_for_push(self, prefix: str) -> None:
        path = self._path(f"{prefix}/{MANIFEST}")
        if not path.is_file():
            wait_until_free(path.with_name(_SWAP))

    def read_manifest(self, prefix: str) -> Manifest | None:
        path = self._path(f"{prefix}/{MANIFEST}")
        self._wait_for_push(prefix)
        try:
            return Manifest.from_json(path.read_bytes(), where=str(path))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None


def _swap(target: Path, manifest: Manifest, staged: Stage) -> None:
    """Replace the tree that is there; the new one counts with its manifest, which comes last."""
    known = _paths_before(target)
    # Only what the old tree had: others may keep trees of their own below this.
    gone = known - {file.path for file in manifest.files}
    if gone or known & staged.files.keys():
        (target / MANIFEST).unlink(missing_ok=True)
    for path in gone:
        _remove(target / path, below=target)
    staged.move_in()


def _remove(path: Path, *, below: Path) -> None:
    """Remove a file, and folders that it leaves empty."""
    path.unlink(missing_ok=True)
    for folder in path.parents:
        if folder == below:
            return
        try:
            folder.rmdir()
        except OSError:
            return


def _paths_before(target: Path) -> set[str]:
    try:
        manifest = Manifest.from_json((target / MANIFEST).read_bytes(), where=str(target))
    except (FileNotFoundError, TitaError):
        return set()
    return {file.path for file in manifest.files}


def _beside(path: Path) -> Path:
    return path.with_name(f".tita-{uuid.uuid4().hex}")
