"""The store as a plain directory: nothing to install, and files people can look at."""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.storage.manifest import MANIFEST, Manifest, describe, is_inside, sha256_of
from tita.storage.store import ObjectInfo
from tita.terminal import progress


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
        if target.resolve() != folder.resolve():
            known = _paths_before(target)
            # While files change, no reader may take the tree for whole.
            (target / MANIFEST).unlink(missing_ok=True)
            self._copy_in(folder, target, manifest)
            # Only what the old tree had: others may keep trees of their own below this one.
            for left_over in known - {file.path for file in manifest.files}:
                (target / left_over).unlink(missing_ok=True)
        self.put(f"{prefix}/{MANIFEST}", manifest.to_json())
        return manifest

    def _copy_in(self, folder: Path, target: Path, manifest: Manifest) -> None:
        with progress("push", total=manifest.size_bytes, unit="bytes") as advance:
            for file in manifest.files:
                path = target / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = _beside(path)
                try:
                    shutil.copyfile(folder / file.path, temporary)
                    if sha256_of(temporary) != file.sha256:
                        raise TitaError(
                            "changed while it was pushed", where=str(folder / file.path)
                        )
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
                advance(file.size_bytes)

    def pull_tree(self, prefix: str, *, into: Path | None = None) -> Path:
        source = self._path(prefix)
        manifest = self.read_manifest(prefix)
        if manifest is None:
            raise TitaError(
                "no complete tree", where=f"{self.uri}/{prefix}", remedy="push it (again)"
            )
        for file in manifest.files:
            path = source / file.path
            if not path.is_file() or path.stat().st_size != file.size_bytes:
                raise TitaError(
                    "differs from its manifest", where=str(path), remedy="push it again"
                )
        if into is None:
            return source
        DirectoryStore(into.parent)._copy_in(source, into, manifest)
        return into

    def read_manifest(self, prefix: str) -> Manifest | None:
        path = self._path(f"{prefix}/{MANIFEST}")
        if not path.is_file():
            return None
        return Manifest.from_json(path.read_bytes(), where=str(path))


def _paths_before(target: Path) -> set[str]:
    try:
        manifest = Manifest.from_json((target / MANIFEST).read_bytes(), where=str(target))
    except (FileNotFoundError, TitaError):
        return set()
    return {file.path for file in manifest.files}


def _beside(path: Path) -> Path:
    return path.with_name(f".tita-{uuid.uuid4().hex}")
