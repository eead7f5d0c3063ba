"""The store as a plain directory: nothing to install, and files people can look at."""

import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.storage.locks import locked, wait_until_free
from tita.storage.manifest import MANIFEST, Manifest, describe, is_inside, is_whole, sha256_of
from tita.storage.store import ObjectInfo
from tita.terminal import progress

_SWAP = ".tita-swap"
"""Locked while files of a tree are replaced."""
_READINGS = 8
"""How often a pull looks again before it calls a tree torn."""
_MANY_FILES = 64
"""From here on one flush of all disks costs less than one a file."""


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
            folders.sort()
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
            self._write(prefix, manifest)
            return manifest
        target.mkdir(parents=True, exist_ok=True)
        with _staged(folder, target, manifest) as staged:
            _flush(staged.values())
            # Renames take moments, for which readers of an old tree wait.
            with locked(target / _SWAP):
                try:
                    known = _paths_before(target)
                    if known & staged.keys():
                        (target / MANIFEST).unlink(missing_ok=True)
                    for name, temporary in staged.items():
                        temporary.replace(target / name)
                    self._write(prefix, manifest)
                    # Only what the old tree had: others may keep trees of their own below this.
                    for left_over in known - {file.path for file in manifest.files}:
                        (target / left_over).unlink(missing_ok=True)
                finally:
                    (target / _SWAP).unlink(missing_ok=True)
        return manifest

    def _write(self, prefix: str, manifest: Manifest) -> None:
        self.put(f"{prefix}/{MANIFEST}", manifest.to_json())

    def pull_tree(self, prefix: str, *, into: Path | None = None) -> Path:
        source = self._path(prefix)
        left = _READINGS
        while True:
            left -= 1
            manifest = self.read_manifest(prefix)
            if manifest is None:
                raise TitaError(
                    "no complete tree", where=f"{self.uri}/{prefix}", remedy="push it (again)"
                )
            try:
                return self._pull(source, manifest, into)
            except (TitaError, FileNotFoundError):
                # Pushes may have replaced the tree while it was read, even by the same one again.
                if not left:
                    raise

    def _pull(self, source: Path, manifest: Manifest, into: Path | None) -> Path:
        for file in manifest.files:
            path = source / file.path
            if not path.is_file() or path.stat().st_size != file.size_bytes:
                raise TitaError(
                    "differs from its manifest", where=str(path), remedy="push it again"
                )
        if into is None:
            return source
        with _staged(source, into, manifest) as staged:
            for name, temporary in staged.items():
                temporary.replace(into / name)
        return into

    def read_manifest(self, prefix: str) -> Manifest | None:
        path = self._path(f"{prefix}/{MANIFEST}")
        if not path.is_file():
            wait_until_free(path.with_name(_SWAP))
        try:
            return Manifest.from_json(path.read_bytes(), where=str(path))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None


@contextmanager
def _staged(folder: Path, target: Path, manifest: Manifest) -> Iterator[dict[str, Path]]:
    """Checked copies of the files that `target` lacks, by path, each beside its place."""
    staged: dict[str, Path] = {}
    try:
        with progress("copy", total=manifest.size_bytes, unit="bytes") as advance:
            for file in manifest.files:
                if not is_whole(target / file.path, file):
                    (target / file.path).parent.mkdir(parents=True, exist_ok=True)
                    staged[file.path] = temporary = _beside(target / file.path)
                    shutil.copyfile(folder / file.path, temporary)
                    if sha256_of(temporary) != file.sha256:
                        raise TitaError(
                            "changed while it was copied",
                            where=str(folder / file.path),
                            remedy="try again; if it lasts, push the tree again",
                        )
                advance(file.size_bytes)
        yield staged
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _flush(paths: Collection[Path]) -> None:
    """Have files on the disk before a manifest says that they are there."""
    if len(paths) > _MANY_FILES:
        os.sync()
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _paths_before(target: Path) -> set[str]:
    try:
        manifest = Manifest.from_json((target / MANIFEST).read_bytes(), where=str(target))
    except (FileNotFoundError, TitaError):
        return set()
    return {file.path for file in manifest.files}


def _beside(path: Path) -> Path:
    return path.with_name(f".tita-{uuid.uuid4().hex}")
