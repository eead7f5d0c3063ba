"""Atomic writes, and locks between processes of one node."""

import errno
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tita.activity import mark_progress
from tita.errors import NoProgress, TitaError, is_disk_full
from tita.settings import settings
from tita.terminal import say

_POLL_S = 0.05
_SAY_AFTER_S = 2.0


def temporary_path(path: Path) -> Path:
    """An unused path beside `path`; listings of a store and pushes skip its name."""
    return path.with_name(f".tita-{uuid.uuid4().hex}")


def is_stream(path: Path) -> bool:
    """Whether `path` is a pipe, a terminal or another device: it can't be read back or replaced.

    /dev/stdout counts even if standard output is a file, since a rename would replace the link.
    """
    in_dev = path.absolute().parts[1:2] in (("dev",), ("proc",)) and path.exists()
    return in_dev or (path.exists() and not path.is_file() and not path.is_dir())


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Name `path` in the error of a write to a full disk; the system names no file there."""
    try:
        yield
    except OSError as error:
        if error.filename is None and is_disk_full(error):
            error.filename = str(path)
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` when the block ends without an error.

    A reader sees the previous file or the complete new one; of several writers the last one wins.
    A pipe or device receives the content and stays what it is.
    """
    if is_stream(path):
        with tempfile.TemporaryDirectory(prefix="tita-") as folder:
            yield (temporary := Path(folder) / path.name)
            with temporary.open("rb") as source, path.open("ab") as sink:
                shutil.copyfileobj(source, sink)
        return
    temporary = temporary_path(path)
    try:
        with naming_full_disk(path):
            yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def try_lock(path: Path, *, shared: bool = False) -> int | None:
    """Lock a file and return its descriptor, or None if another process holds the lock.

    Closing the descriptor releases the lock; so does the end of the process.

    Raises:
        OSError: the file cannot be created or opened.
        TitaError: the file system does not support locks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _has_path(descriptor, path):
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            raise TitaError(
                "the file system does not support locks",
                where=str(path),
                remedy="choose a local disk",
            ) from None


def _has_path(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`: the previous holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def lock(
    path: Path, *, shared: bool = False, while_waiting: Callable[[], None] = lambda: None
) -> int:
    """Like `try_lock`, but waits; `while_waiting` is called repeatedly and may raise.

    Raises:
        NoProgress: the holder made no progress for `lock_timeout_s` of the settings.
    """
    patience = _Patience(path)
    while (descriptor := try_lock(path, shared=shared)) is None:
        while_waiting()
        patience.wait()
    return descriptor


class _Patience:
    """Waits for the holder of a lock as long as it makes progress.

    A holder that works for long writes to the locked file or changes its modification time
    (`tita.activity.on_progress`). Its progress is also this process's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._timeout_s = settings().lock_timeout_s
        self._modified = _modified(path)
        self._started = self._changed = time.monotonic()
        self._said = False

    def wait(self) -> None:
        now = time.monotonic()
        if (modified := _modified(self._path)) != self._modified:
            self._modified, self._changed = modified, now
            mark_progress()
        if now - self._changed > self._timeout_s:
            raise NoProgress(
                f"{_holder(self._path)} holds the lock and made no progress for "
                f"{now - self._changed:.0f} s",
                where=str(self._path),
                remedy="end that process",
            )
        if not self._said and now - self._started > _SAY_AFTER_S:
            say(f"waiting for {_holder(self._path)}, which holds {self._path}")
            self._said = True
        time.sleep(_POLL_S)


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _holder(path: Path) -> str:
    """The process that holds a lock on a file, as far as the kernel shows it (Linux)."""
    try:
        inode = path.stat().st_ino
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return "another process"
    for fields in map(str.split, lines):
        # `1: FLOCK ADVISORY WRITE <pid> <device>:<inode> 0 EOF`; those that wait have an arrow.
        if "->" not in fields and fields[5].rpartition(":")[2] == str(inode):
            return f"process {fields[4]}"
    return "another process"


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock during a block."""
    descriptor = lock(path, shared=shared)
    try:
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock; False if the file cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
