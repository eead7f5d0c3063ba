"""Files by their digest on this node's disk, and trees made of links to them.

    objects/<first two digits>/<sha256>    each content once, read-only
    trees/<digest of a manifest>/          a whole tree; its files are hard links to objects
    trees/<digest of a manifest>.lock      held by all processes that use the tree; its time says
                                           when one last began to, its content what it came from

Trees that differ in one file share all others. A process holds what it was given until it ends, so
nobody makes room at its expense.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tita.errors import TitaError, from_os_error
from tita.storage.locks import is_locked, lock, locked, try_lock
from tita.storage.manifest import MANIFEST, Manifest, ManifestFile, sha256_of

Fetch = Callable[[Sequence[tuple[ManifestFile, Path]]], None]

_STAMP_NS = 315_532_800_000_000_000
"""The time of change that checked files bear, 1980-01-01; whoever writes to one sets another."""
_NO_LINKS = frozenset((errno.EMLINK, errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.ENOSYS))

_held: dict[Path, int] = {}
"""Locks of the trees that this process uses, until it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedTree:
    """A tree as the cache knows it."""

    digest: str
    origin: str
    """The tree in a store that it was last used for."""
    size_bytes: int
    """Of its files, which other trees may share."""
    used: datetime
    """When a process last began to use it."""
    in_use: bool


class TreeCache:
    """Below one folder. Any number of processes may use it at once."""

    def __init__(self, root: Path, *, limit_bytes: int | None = None) -> None:
        self.root = root
        self._limit_bytes = limit_bytes
        self._objects, self._trees = root / "objects", root / "trees"

    @classmethod
    def of_settings(cls) -> "TreeCache":
        """The cache of this node."""
        from tita.settings import settings

        here = settings()
        limit = here.cache_max_gib
        return cls(
            here.cache_dir.expanduser().absolute(),
            limit_bytes=None if limit is None else int(limit * 2**30),
        )

    def hold(self, manifest: Manifest, *, fetch: Fetch, origin: str = "") -> Path:
        """The tree's folder, whole, and kept until this process ends.

        Args:
            fetch: brings files, checked, to paths; called with what no earlier tree brought.
            origin: where the tree is from, for people who look at the cache.

        Raises:
            TitaError: the cache cannot be written, or has no room.
        """
        tree = self._trees / manifest.digest
        try:
            return self._hold(tree, manifest, fetch, origin)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES) and _is_unchanged(tree, manifest):
                # Somebody filled it for us, and nobody here can make room in it.
                return tree
            raise self._told(error) from error

    def _hold(self, tree: Path, manifest: Manifest, fetch: Fetch, origin: str) -> Path:
        self._trees.mkdir(parents=True, exist_ok=True)
        self._objects.mkdir(exist_ok=True)
        own = tree.with_suffix(".lock")
        while True:
            if own not in _held:
                _held[own] = lock(own, shared=True)
            if _is_unchanged(tree, manifest):
                with suppress(OSError):
                    # For people only; there may be no room for it.
                    os.pwrite(_held[own], f"{origin}\n".encode(), 0)
                os.utime(own)
                _describe(tree, manifest)
                return tree
            os.close(_held.pop(own))
            with locked(own):
                if not _is_unchanged(tree, manifest):
                    self._fill(tree, manifest, fetch)

    def _fill(self, tree: Path, manifest: Manifest, fetch: Fetch) -> None:
        wanted = {file.sha256: file for file in manifest.files}
        self._make_room(
            sum(f.size_bytes for f in wanted.values() if not self._object(f.sha256).exists()),
            keep=wanted.keys(),
        )
        # While one is held, nobody takes objects that no tree has yet.
        with locked(self.root / "filling.lock", shared=True):
            missing = [file for file in wanted.values() if not self._has(file)]
            fetch([(file, self._object(file.sha256)) for file in missing])
            for file in missing:
                _seal(self._object(file.sha256))
            fresh = self._trees / f".tita-{uuid.uuid4().hex}"
            try:
                for file in manifest.files:
                    (fresh / file.path).parent.mkdir(parents=True, exist_ok=True)
                    _link(self._object(file.sha256), fresh / file.path)
                fresh.mkdir(exist_ok=True)
                _remove(tree)
                fresh.replace(tree)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)

    def _object(self, sha256: str) -> Path:
        return self._objects / sha256[:2] / sha256

    def _has(self, file: ManifestFile) -> bool:
        """Whether the content is there; one that somebody wrote to is looked at, and may go."""
        path = self._object(file.sha256)
        if _is_sealed(path, file):
            return True
        if not path.exists():
            return False
        if sha256_of(path) == file.sha256:
            _seal(path)
            return True
        path.unlink()
        return False

    def _make_room(self, need_bytes: int, *, keep: Iterable[str]) -> None:
        free = shutil.disk_usage(self.root).free
        short = need_bytes - free
        if self._limit_bytes is not None:
            short = max(short, self.size_bytes() + need_bytes - self._limit_bytes)
        freed = self.prune(short, keep=keep) if short > 0 else 0
        if need_bytes > free + freed:
            raise TitaError(
                f"no room for {need_bytes / 2**30:.1f} GiB, {(free + freed) / 2**30:.1f} are free",
                where=str(self.root),
                remedy="free some space or choose another folder in TITA_CACHE_DIR",
            )

    def trees(self) -> list[CachedTree]:
        """What is there, used longest ago first."""
        trees = [tree for tree in self._oldest_first() if not tree.name.startswith(".tita-")]
        return [found for tree in trees if (found := _look_at(tree)) is not None]

    def size_bytes(self) -> int:
        """What all objects take."""
        return sum(entry.stat().st_size for entry in self._entries())

    def prune(self, bytes_to_free: int, *, keep: Iterable[str] = ()) -> int:
        """Remove what was not used for longest until so much is free, or all that is in use stays.

        Args:
            keep: digests of objects to spare.

        Returns:
            The bytes that were freed.
        """
        if not self._trees.is_dir():
            return 0
        filling = try_lock(self.root / "filling.lock")
        if filling is None:
            return 0
        try:
            spared = set(keep)
            freed = self._sweep(spared)
            for tree in self._oldest_first():
                if freed >= bytes_to_free:
                    break
                own = try_lock(tree.with_suffix(".lock"))
                if own is not None:
                    _remove(tree)
                    tree.with_suffix(".lock").unlink(missing_ok=True)
                    os.close(own)
                    freed += self._sweep(spared)
            return freed
        finally:
            os.close(filling)

    def _oldest_first(self) -> list[Path]:
        def used(tree: Path) -> float:
            stamp = tree.with_suffix(".lock")
            return stamp.stat().st_mtime if stamp.exists() else 0.0

        if not self._trees.is_dir():
            return []
        trees = [path for path in self._trees.iterdir() if path.is_dir()]
        return sorted(trees, key=used)

    def _sweep(self, spared: set[str]) -> int:
        """Remove objects that are in no tree; how many bytes that freed."""
        freed = 0
        for entry in self._entries():
            found = entry.stat()
            if found.st_nlink == 1 and entry.name not in spared:
                Path(entry.path).unlink(missing_ok=True)
                freed += found.st_size
        return freed

    def _entries(self) -> "Iterator[os.DirEntry[str]]":
        if self._objects.is_dir():
            for folder in self._objects.iterdir():
                with os.scandir(folder) as entries:
                    yield from entries

    def _told(self, error: OSError) -> Exception:
        told = from_os_error(error)
        if told is None:
            return error
        return TitaError(
            f"the cache cannot be written: {told.what}",
            where=str(self.root),
            remedy="free some space there or name another folder in TITA_CACHE_DIR",
        )


def _look_at(tree: Path) -> CachedTree | None:
    """What is known of a tree; None if it is being removed or was not finished."""
    own = tree.with_suffix(".lock")
    try:
        manifest = Manifest.from_json((tree / MANIFEST).read_bytes(), where=str(tree))
        return CachedTree(
            digest=tree.name,
            origin=own.read_text().partition("\n")[0],
            size_bytes=manifest.size_bytes,
            used=datetime.fromtimestamp(own.stat().st_mtime, UTC),
            in_use=is_locked(own),
        )
    except (FileNotFoundError, TitaError):
        return None


def _is_unchanged(tree: Path, manifest: Manifest) -> bool:
    """Whether all files are there, and nobody has written to one since it was checked."""
    return tree.is_dir() and all(_is_sealed(tree / file.path, file) for file in manifest.files)


def _describe(tree: Path, manifest: Manifest) -> None:
    """Put the manifest beside the files; trees of the same files may differ in what it says."""
    path, content = tree / MANIFEST, manifest.to_json()
    if not path.is_file() or path.read_bytes() != content:
        temporary = tree / f".tita-{uuid.uuid4().hex}"
        temporary.write_bytes(content)
        temporary.replace(path)


def _is_sealed(path: Path, file: ManifestFile) -> bool:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return found.st_size == file.size_bytes and found.st_mtime_ns == _STAMP_NS


def _seal(path: Path) -> None:
    path.chmod(0o444)
    os.utime(path, ns=(_STAMP_NS, _STAMP_NS))


def _link(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, path)
        _seal(path)


def _remove(tree: Path) -> None:
    """Out of sight in one step, then off the disk."""
    if tree.exists():
        gone = tree.with_name(f".tita-{uuid.uuid4().hex}")
        tree.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)
