"""The store in a plain directory. A push copies files to a staging folder, then renames them.

    <tree>/.tita-stage-<id>/<number>    verified copies, on the file system of their destination
    <tree>/.tita-stage-<id>.lock        locked by the process that makes them
    <tree>/.tita-swap                   locked while files of a tree are replaced

The next push or pull removes the staging folders of processes that were killed.
"""

import errno
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.storage.files import lock, locked, temporary_path, try_lock, wait_until_unlocked
from tita.storage.manifest import (
    MANIFEST,
    Manifest,
    build_manifest,
    is_complete,
    is_inside,
    sha256_of,
)
from tita.storage.store import ObjectInfo, require_manifest
from tita.terminal import progress

_STAGE, _LOCK, _SWAP = ".tita-stage-", ".lock", ".tita-swap"
_MAX_PULL_ATTEMPTS = 8
"""A pull is repeated if a push replaced the tree meanwhile."""
_MANY_FILES = 64
"""From this number on, one `sync` of all disks is faster than one `fsync` per file."""

logger = logging.getLogger(__name__)


class DirectoryStore:
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
        except (FileNotFoundError, IsADirectoryError):
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
        self, folder: str | Path, prefix: str, *, meta: Mapping[str, Any] | None = None
    ) -> Manifest:
        folder, target = Path(folder), self._path(prefix)
        manifest = build_manifest(folder, meta=meta)
        if target.resolve() == folder.resolve():
            self.put(f"{prefix}/{MANIFEST}", manifest.to_json())
            return manifest
        with _staged(target) as stage:
            stage.copy(folder, manifest, mismatch="changed during the push")
            stage.write(MANIFEST, manifest.to_json())
            stage.sync()
            # Readers of the previous tree wait for the renames.
            with locked(target / _SWAP):
                try:
                    _replace_tree(target, manifest, stage)
                finally:
                    (target / _SWAP).unlink(missing_ok=True)
        return manifest

    def pull_tree(self, prefix: str, *, into: str | Path | None = None) -> Path:
        source, into = self._path(prefix), None if into is None else Path(into)
        for attempt in range(2, _MAX_PULL_ATTEMPTS + 1):
            version = self._version(prefix)
            try:
                return self._pull(source, require_manifest(self, prefix), into)
            except (TitaError, FileNotFoundError) as error:
                # Without a push in between, the tree is damaged, and another attempt is useless.
                if self._version(prefix) == version:
                    raise
                logger.info("%s; reading again (%d of %d)", error, attempt, _MAX_PULL_ATTEMPTS)
        return self._pull(source, require_manifest(self, prefix), into)

    def _version(self, prefix: str) -> tuple[int, int] | None:
        """A value that every push changes, even one of the same files; None without a tree."""
        self._wait_for_swap(prefix)
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
                    "does not match its manifest", where=str(path), remedy="push it again"
                )
        if into is None:
            return source
        with _staged(into) as stage:
            stage.copy(source, manifest, mismatch="does not match its manifest")
            stage.rename_all()
        return into

    def _wait_for_swap(self, prefix: str) -> None:
        path = self._path(f"{prefix}/{MANIFEST}")
        if not path.is_file():
            wait_until_unlocked(path.with_name(_SWAP))

    def read_manifest(self, prefix: str) -> Manifest | None:
        path = self._path(f"{prefix}/{MANIFEST}")
        self._wait_for_swap(prefix)
        try:
            return Manifest.from_json(path.read_bytes(), where=str(path))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None


@dataclass(kw_only=True)
class _Stage:
    """Copies of files in `folder` that will be renamed to paths in `target`."""

    target: Path
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    """Path of each copy, by its destination relative to `target`."""

    def copy(self, source: Path, manifest: Manifest, *, mismatch: str) -> None:
        """Copy the files that `target` does not have.

        Raises:
            TitaError: a file does not match the manifest; the message is `mismatch`.
        """
        with progress("copy", total=manifest.size_bytes, unit="bytes") as advance:
            for file in manifest.files:
                if not is_complete(self.target / file.path, file):
                    copied = self._add(file.path)
                    shutil.copyfile(source / file.path, copied)
                    if sha256_of(copied) != file.sha256:
                        where = str(source / file.path)
                        raise TitaError(mismatch, where=where, remedy="push it again")
                advance(file.size_bytes)

    def write(self, path: str, data: bytes) -> None:
        """Add a file with this content."""
        self._add(path).write_bytes(data)

    def sync(self) -> None:
        """Flush all copies to disk."""
        if len(self.files) > _MANY_FILES:
            os.sync()
            return
        for path in self.files.values():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def rename_all(self) -> None:
        """Rename each copy to its destination, in the order in which they were added."""
        for path, copied in self.files.items():
            (self.target / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                copied.replace(self.target / path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # A folder in the target may be a link to another disk.
                shutil.copyfile(copied, self.target / path)

    def _add(self, path: str) -> Path:
        # A copy is named by a number, so that readers of the folder do not take it for data.
        self.files[path] = self.folder / str(len(self.files))
        return self.files[path]


@contextmanager
def _staged(target: Path) -> Iterator[_Stage]:
    """A staging folder in `target`; what was not renamed is removed at the end."""
    target.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_stages(target)
    folder = target / f"{_STAGE}{uuid.uuid4().hex}"
    # The lock is created before the folder and removed after it, so a folder without a locked file
    # is abandoned.
    descriptor = lock(_lock_path(folder))
    try:
        folder.mkdir()
        yield _Stage(target=target, folder=folder)
    finally:
        _remove_stage(folder, descriptor)


def _remove_abandoned_stages(target: Path) -> None:
    names = {path.name.removesuffix(_LOCK) for path in target.glob(f"{_STAGE}*")}
    for name in sorted(names):
        # A folder that cannot be removed does no harm.
        with suppress(OSError):
            descriptor = try_lock(_lock_path(target / name))
            if descriptor is not None:
                _remove_stage(target / name, descriptor)


def _remove_stage(folder: Path, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _lock_path(folder).unlink(missing_ok=True)
    os.close(descriptor)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)


def _replace_tree(target: Path, manifest: Manifest, stage: _Stage) -> None:
    """Replace the files of the previous tree; the new manifest is renamed last."""
    try:
        previous = Manifest.from_json((target / MANIFEST).read_bytes(), where=str(target))
        known = {file.path for file in previous.files}
    except (FileNotFoundError, TitaError):
        known = set()
    # Files outside the previous tree may belong to other trees.
    removed = known - {file.path for file in manifest.files}
    if removed or known & stage.files.keys():
        (target / MANIFEST).unlink(missing_ok=True)
    for path in removed:
        (target / path).unlink(missing_ok=True)
        # Empty folders are removed up to `target`, which has the staging folder.
        with suppress(OSError):
            os.removedirs((target / path).parent)
    stage.rename_all()
