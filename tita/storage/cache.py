"""The node's cache: files by digest, and trees whose files are hard links to them.

    objects/<first two digits>/<sha256>    the content of a file, read-only
    trees/<digest of a manifest>/          a complete tree of hard links to objects
    trees/<digest of a manifest>.json      its manifest
    trees/<digest of a manifest>.lock      the lock of the tree; its content is the tree's origin,
                                           its modification time the last time it was requested
    trees/<digest of a manifest>.fill      locked by the process that fills the tree
    filling.lock                           the lock of `objects/`
    content.lock                           locked by the process that fetches content of no tree
    packing/                               shards of images on their way to a store
    rows/<key>/, <key>.lock, <key>.fill    what `tita.data.row_cache` keeps of datasets, like a tree
                                           but with files of its own

Trees that differ in one file share all others.

Lock protocol:
    A process that uses a tree holds the tree's lock shared until the process ends. Nobody waits for
    that lock exclusively: only `prune` takes it so, and skips trees that are locked.
    A process that fills a tree uses it already. It also holds the `.fill` lock exclusively while
    it fills, and `filling.lock` shared. Others that need the tree wait for `.fill`, and then check
    again what is missing. A damaged tree is repaired file by file, because others may use it.
    `prune` holds `filling.lock` exclusively, because a tree being filled has objects without links,
    and the lock of each tree that it removes.
    Locks are taken in the order: tree, `.fill`, `content.lock`, `filling.lock`. `prune` waits for
    none. A process that holds `filling.lock` shared may take `content.lock`, and then
    `filling.lock` shared once more.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from tita.activity import on_progress
from tita.errors import TitaError, from_os_error
from tita.settings import settings
from tita.storage.directory_push import remove_abandoned_stages
from tita.storage.files import atomic_path, is_locked, lock, locked, temporary_path, try_lock
from tita.storage.manifest import Manifest, ManifestFile, sha256_of

Fetch = Callable[[Sequence[tuple[ManifestFile, Path]]], None]

_SEAL_NS = 315_532_800_000_000_000
"""Modification time of verified files, 1980-01-01; any write changes it."""
_NO_LINKS = frozenset((errno.EMLINK, errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.ENOSYS))
_LINK_ATTEMPTS = 20

_held: dict[Path, int] = {}
"""Descriptors of the locks of the trees that this process uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedTree:
    """One tree in the cache."""

    digest: str
    origin: str
    """Store and name of the tree for which it was last requested."""
    size_bytes: int
    """Total size of its files, which other trees may share."""
    used: datetime
    """Time of the last request."""
    in_use: bool


class TreeCache:
    """A cache in one folder. Any number of processes may use it at the same time."""

    def __init__(
        self, root: Path, *, limit_bytes: int | None = None, volume_bytes: int | None = None
    ) -> None:
        """Args:
        root: folder of the cache.
        limit_bytes: size beyond which unused trees are evicted.
        volume_bytes: size of its volume, if the file system does not report it.
        """
        self.root = root
        self._limit_bytes, self._volume_bytes = limit_bytes, volume_bytes
        self._objects, self._trees = root / "objects", root / "trees"
        self._rows = root / "rows"
        self._filling_lock = root / "filling.lock"

    @classmethod
    def from_settings(cls) -> "TreeCache":
        """The cache in the settings."""
        here = settings()
        limit, volume = here.cache_max_gib, here.cache_volume_gib
        return cls(
            here.cache_dir.expanduser().absolute(),
            limit_bytes=None if limit is None else int(limit * 2**30),
            volume_bytes=None if volume is None else int(volume * 2**30),
        )

    @property
    def packing(self) -> Path:
        """The folder in which a push makes its shards, in a staging folder of its own."""
        return self.root / "packing"

    def hold(self, manifest: Manifest, *, fetch: Fetch, origin: str = "") -> Path:
        """The folder of a complete tree, which stays in the cache until this process ends.

        Args:
            fetch: writes verified files to paths; called with those that the cache does not have.
            origin: store and name of the tree, for `tita cache list`.

        Raises:
            TitaError: the cache is not writable or has no space left.
        """
        tree = self._trees / manifest.digest
        try:
            return self._hold(tree, manifest, fetch, origin)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES) and _is_intact(tree, manifest):
                # Another user filled this cache; without write permission nothing can be evicted.
                return tree
            known = from_os_error(error)
            if known is None:
                raise
            raise TitaError(
                f"the cache is not writable: {known.what}",
                where=str(self.root),
                remedy="free some space there or set TITA_CACHE_DIR to another folder",
            ) from error

    def _hold(self, tree: Path, manifest: Manifest, fetch: Fetch, origin: str) -> Path:
        self._trees.mkdir(parents=True, exist_ok=True)
        self._objects.mkdir(exist_ok=True)
        tree_lock, fill_lock = _lock_path(tree), _fill_lock_path(tree)
        is_new = tree_lock not in _held
        if is_new:
            # Waits at most for an eviction.
            _held[tree_lock] = lock(tree_lock, shared=True)
        try:
            if not _is_intact(tree, manifest):
                with locked(fill_lock), on_progress(partial(_touch, fill_lock)):
                    if not _is_intact(tree, manifest):
                        self._fill(tree, manifest, fetch)
            _write_manifest(tree, manifest)
        except BaseException:
            if is_new:
                os.close(_held.pop(tree_lock))
            raise
        with suppress(OSError):
            # Only `tita cache list` needs it; the disk may be full.
            os.pwrite(_held[tree_lock], f"{origin}\n".encode(), 0)
        os.utime(tree_lock)
        return tree

    def _fill(self, tree: Path, manifest: Manifest, fetch: Fetch) -> None:
        self._make_space(
            sum(
                file.size_bytes
                for files in map(_by_content, manifest.batches())
                for file in files
                if not self._object(file.sha256).exists()
            ),
            keep=(file.sha256 for file in manifest.files),
        )
        with locked(self._filling_lock, shared=True):
            for files in map(_by_content, manifest.batches()):
                missing = [file for file in files if not self._has(file)]
                fetch([(file, self._object(file.sha256)) for file in missing])
                for file in missing:
                    _seal(self._object(file.sha256))
            # A folder may have taken the place of a file, or the reverse.
            with suppress(NotADirectoryError, IsADirectoryError, FileExistsError):
                if tree.is_dir():
                    self._repair(tree, manifest)
                    return
            new = temporary_path(tree)
            try:
                new.mkdir()
                self._repair(new, manifest)
                _remove(tree)
                new.replace(tree)
            finally:
                shutil.rmtree(new, ignore_errors=True)

    def _repair(self, tree: Path, manifest: Manifest) -> None:
        """Link the files that a tree lacks to their objects; what is intact is not touched."""
        for file in manifest.files:
            path = tree / file.path
            if not _is_sealed(path, file):
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as temporary:
                    _link(self._object(file.sha256), temporary)

    def content(self, sha256: str, *, fetch: Callable[[], bytes]) -> bytes:
        """Small content that is in no tree, fetched once by all processes of this node.

        `prune` may remove it, and it is fetched again; so it is if the cache is not writable.

        Args:
            sha256: of the content. Cached content is verified, and what `fetch` returns is not: if
                it is other content, it is returned and not cached.
        """
        path = self._object(sha256)

        def cached() -> bytes | None:
            data = path.read_bytes() if path.is_file() else b""
            return data if hashlib.sha256(data).hexdigest() == sha256 else None

        try:
            if (data := cached()) is not None:
                return data
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.root / "content.lock"), locked(self._filling_lock, shared=True):
                if (data := cached()) is None:
                    data = fetch()
                    if hashlib.sha256(data).hexdigest() == sha256:
                        with atomic_path(path) as temporary:
                            temporary.write_bytes(data)
                        _seal(path)
                return data
        except OSError:
            return fetch()

    def _object(self, sha256: str) -> Path:
        return self._objects / sha256[:2] / sha256

    def _has(self, file: ManifestFile) -> bool:
        """Whether the content is cached. An object that was written to is hashed again."""
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

    def _make_space(self, need_bytes: int, *, keep: Iterable[str]) -> None:
        free = shutil.disk_usage(self.root).free
        is_bounded = self._volume_bytes is not None or self._limit_bytes is not None
        # Reads the whole folder.
        used = self.size_bytes() if is_bounded else 0
        if self._volume_bytes is not None:
            free = min(free, max(0, self._volume_bytes - used))
        excess = need_bytes - free
        if self._limit_bytes is not None:
            excess = max(excess, used + need_bytes - self._limit_bytes)
        freed = self.prune(excess, keep=keep) if excess > 0 else 0
        if need_bytes > free + freed:
            raise TitaError(
                f"{need_bytes / 2**30:.1f} GiB needed, {(free + freed) / 2**30:.1f} GiB free",
                where=str(self.root),
                remedy="free some space or set TITA_CACHE_DIR to another folder",
            )

    def trees(self) -> list[CachedTree]:
        """All trees and rows of datasets, least recently used first."""
        found = []
        for tree in self._oldest_first():
            # Skip a tree that is incomplete or being removed.
            if tree.name.startswith(".tita-"):
                continue
            with suppress(FileNotFoundError, TitaError):
                tree_lock = _lock_path(tree)
                found.append(
                    CachedTree(
                        digest=tree.name,
                        origin=tree_lock.read_text().partition("\n")[0],
                        size_bytes=self._tree_bytes(tree),
                        used=datetime.fromtimestamp(tree_lock.stat().st_mtime, UTC),
                        in_use=is_locked(tree_lock),
                    )
                )
        return found

    def _tree_bytes(self, tree: Path) -> int:
        if tree.parent == self._rows:
            return _total_bytes(tree.rglob("*"))
        manifest = Manifest.from_json(_manifest_path(tree).read_bytes(), where=str(tree))
        return manifest.size_bytes

    def size_bytes(self) -> int:
        """Total size of all objects and rows of datasets."""
        return _total_bytes(self._objects.glob("*/*")) + _total_bytes(self._rows.glob("*/**/*"))

    def shrink(self) -> None:
        """Evict what is beyond the limit, as far as no process uses it."""
        if self._limit_bytes is not None:
            excess = self.size_bytes() - self._limit_bytes
            if excess > 0:
                self.prune(excess)

    def prune(self, bytes_to_free: int, *, keep: Iterable[str] = ()) -> int:
        """Remove the least recently used trees that no process uses; the bytes that were freed.

        Shards of pushes that were killed are removed in any case.

        Args:
            bytes_to_free: removes no more trees once this much is freed.
            keep: digests of objects that are not removed.
        """
        if not self.root.is_dir():
            return 0
        # Before the lock, which reading the parts of a manifest may take.
        kept = set(keep)
        filling = try_lock(self._filling_lock)
        if filling is None:
            return 0
        try:
            freed = self._remove_abandoned_shards() + self._remove_unlinked(kept)
            for tree in self._oldest_first():
                if freed >= bytes_to_free:
                    break
                descriptor = try_lock(_lock_path(tree))
                if descriptor is not None:
                    if tree.parent == self._rows:
                        freed += self._tree_bytes(tree)
                    _remove(tree)
                    _remove_lock(_fill_lock_path(tree))
                    _manifest_path(tree).unlink(missing_ok=True)
                    _lock_path(tree).unlink(missing_ok=True)
                    os.close(descriptor)
                    freed += self._remove_unlinked(kept)
            return freed
        finally:
            os.close(filling)

    def _remove_abandoned_shards(self) -> int:
        before = _total_bytes(self.packing.rglob("*"))
        remove_abandoned_stages(self.packing)
        return max(0, before - _total_bytes(self.packing.rglob("*")))

    def _oldest_first(self) -> list[Path]:
        def last_used(tree: Path) -> float:
            path = _lock_path(tree)
            return path.stat().st_mtime if path.exists() else 0.0

        folders = (folder for folder in (self._trees, self._rows) if folder.is_dir())
        found = (path for folder in folders for path in folder.iterdir() if path.is_dir())
        return sorted(found, key=last_used)

    def _remove_unlinked(self, keep: set[str]) -> int:
        """Remove objects that are in no tree; the bytes that were freed."""
        freed = 0
        for path in self._objects.glob("*/*"):
            found = path.stat()
            if found.st_nlink == 1 and path.name not in keep:
                path.unlink(missing_ok=True)
                freed += found.st_size
        return freed


def _by_content(files: Iterable[ManifestFile]) -> Collection[ManifestFile]:
    """The files without those that have the same content as another one."""
    return {file.sha256: file for file in files}.values()


def _total_bytes(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        # Another process may rename or remove it.
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _lock_path(tree: Path) -> Path:
    return tree.with_suffix(".lock")


def _manifest_path(tree: Path) -> Path:
    # Beside the tree, which may have a file of any name.
    return tree.with_suffix(".json")


def read_cached_manifest(tree: Path) -> Manifest | None:
    """The manifest of a tree in a cache, or None for any other folder."""
    if tree.parent.name != "trees":
        return None
    path = _manifest_path(tree)
    try:
        manifest = Manifest.from_json(path.read_bytes(), where=str(path))
    except (OSError, TitaError):
        return None
    return manifest if manifest.digest == tree.name else None


def _fill_lock_path(tree: Path) -> Path:
    return tree.with_suffix(".fill")


def _touch(fill_lock: Path) -> None:
    """Show those that wait for the lock that the process that fills makes progress."""
    with suppress(OSError):
        os.utime(fill_lock)


def _remove_lock(path: Path) -> None:
    """Remove the file of a lock unless a process holds it."""
    descriptor = try_lock(path)
    if descriptor is not None:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _is_intact(tree: Path, manifest: Manifest) -> bool:
    """Whether all files exist and none was written to since it was verified."""
    return tree.is_dir() and all(_is_sealed(tree / file.path, file) for file in manifest.files)


def _write_manifest(tree: Path, manifest: Manifest) -> None:
    """Store the manifest of a tree; trees of the same files may differ in its `meta`."""
    path, content = _manifest_path(tree), manifest.to_json()
    if not path.is_file() or path.read_bytes() != content:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)


def _is_sealed(path: Path, file: ManifestFile) -> bool:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return found.st_size == file.size_bytes and found.st_mtime_ns == _SEAL_NS


def _seal(path: Path) -> None:
    path.chmod(0o444)
    os.utime(path, ns=(_SEAL_NS, _SEAL_NS))


def _link(source: Path, path: Path) -> None:
    try:
        for _ in range(_LINK_ATTEMPTS):
            with suppress(FileNotFoundError):
                os.link(source, path)
                return
            # A process that fills another tree has just replaced the object by the same content:
            # Linux does not link to a file that has lost its name since it was found.
        os.link(source, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, path)
        _seal(path)


def _remove(tree: Path) -> None:
    """Rename a tree in one step, then delete its files."""
    if tree.exists():
        renamed = temporary_path(tree)
        tree.replace(renamed)
        shutil.rmtree(renamed, ignore_errors=True)
