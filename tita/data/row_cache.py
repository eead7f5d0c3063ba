"""The node's cache of what was read from datasets: one folder per dataset and reader.

Below `TITA_CACHE_DIR`, or if that is mounted read-only, below a temporary folder of this user:

    rows/<key>/         a complete entry, which is never changed
    rows/<key>.lock     held shared by the processes that use the entry; its modification time is
                        the last time it was requested
    rows/<key>.fill     held by the process that builds or opens the entry

An entry that is being built has another name and a lock of its own. `TreeCache` counts and evicts
entries of `TITA_CACHE_DIR` as it does trees. The entry `images` has the images that rows store as
files, under their digests; it grows, and is evicted as one.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from tita.activity import on_progress
from tita.errors import TitaError, from_os_error
from tita.settings import settings
from tita.storage.cache import TreeCache
from tita.storage.files import lock, locked, temporary_path

T = TypeVar("T")

_IMAGES = "images"
"""The entry of images; keys are digests."""

_held: dict[Path, int] = {}
"""Descriptors of the locks of the entries that this process uses."""


def hold_entry(
    key: str,
    *,
    open_entry: Callable[[Path], T],
    is_valid: Callable[[T], bool],
    build: Callable[[Path], None],
    origin: str,
) -> T:
    """Open an entry, which stays in the cache until this process ends.

    Of several processes that need an entry one builds it, and the others wait.

    Args:
        key: a file name.
        open_entry: opens the folder of an entry; fails if it is incomplete or damaged.
        is_valid: whether an entry that was opened may be used.
        build: fills an empty folder.
        origin: the dataset, for `tita cache list`.

    Returns:
        What `open_entry` returns.

    Raises:
        TitaError: the cache is not writable or has no space left, or `build` raises it.
    """

    def open_valid(entry: Path) -> T | None:
        try:
            found = open_entry(entry)
        except (OSError, EOFError, ValueError, TypeError, KeyError):  # Arrow's are ValueErrors
            return None
        return found if is_valid(found) else None

    root = _cache_root()
    if not os.access(root, os.W_OK) and (found := open_valid(root / key)) is not None:
        return found
    try:
        root = root if _is_writable(root) else _own_folder()
        entry = root / key
        own = entry.with_suffix(".lock")
        if own not in _held:
            # Waits at most for an eviction.
            _held[own] = lock(own, shared=True)
        fill = entry.with_suffix(".fill")
        # Also to open it: another process may find it outdated and replace it.
        with locked(fill), on_progress(partial(_touch, fill)):
            found = open_valid(entry)
            if found is None:
                _build(entry, build)
                found = open_entry(entry)
        with suppress(OSError):
            # Only `tita cache list` needs it; the disk may be full.
            os.pwrite(_held[own], f"{origin}\n".encode(), 0)
        os.utime(own)
        return found
    except OSError as error:
        known = from_os_error(error)
        # `build` reads other files, which are not the cache's.
        is_other = error.filename is not None and not Path(error.filename).is_relative_to(root)
        if known is None or is_other:
            raise
        raise TitaError(
            f"the cache is not writable: {known.what}",
            where=str(root),
            remedy="free some space there or set TITA_CACHE_DIR to another folder",
        ) from error


def hold_images() -> Path:
    """The folder of this node for images that rows store; they stay until this process ends.

    Raises:
        OSError: it cannot be made, or has no space left.
    """
    root = _cache_root()
    if not _is_writable(root):
        root = _own_folder()
    entry = root / _IMAGES
    own = entry.with_suffix(".lock")
    if own not in _held:
        TreeCache.from_settings().shrink()
        # Waits at most for an eviction.
        _held[own] = lock(own, shared=True)
        with suppress(OSError):
            os.pwrite(_held[own], b"images in rows\n", 0)
        os.utime(own)
    entry.mkdir(exist_ok=True)
    return entry


def _cache_root() -> Path:
    return settings().cache_dir.expanduser().absolute() / "rows"


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
    return os.access(folder, os.W_OK)


def _own_folder() -> Path:
    root = Path(settings().scratch_dir or tempfile.gettempdir()) / f"tita-rows-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise TitaError(
            "belongs to another user", where=str(root), remedy="set TITA_CACHE_DIR or remove it"
        )
    return root


def _build(entry: Path, build: Callable[[Path], None]) -> None:
    new = temporary_path(entry)
    # `TreeCache.prune` removes folders whose lock nobody holds.
    own = new.with_suffix(".lock")
    with locked(own):
        try:
            new.mkdir()
            build(new)
            if entry.exists():
                # Another process may still map its files, which stay until it ends.
                old = temporary_path(entry)
                entry.replace(old)
                shutil.rmtree(old, ignore_errors=True)
            new.replace(entry)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            own.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    """Show those that wait for a lock that the process that holds it makes progress."""
    with suppress(OSError):
        os.utime(path)
