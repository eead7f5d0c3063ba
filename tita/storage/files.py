"""Atomic writes, and locks between processes of one node."""

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tita.errors import TitaError
from tita.terminal import say

_POLL_S = 0.05
_SAY_AFTER_S = 2.0


def temporary_path(path: Path) -> Path:
    """An unused path beside `path`; listings of a store and pushes skip its name."""
    return path.with_name(f".tita-{uuid.uuid4().hex}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` when the block ends without an error.

    A reader sees the previous file or the complete new one; of several writers the last one wins.
    """
    temporary = temporary_path(path)
    try:
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
    """Like `try_lock`, but waits; `while_waiting` is called repeatedly and may raise."""
    started, said = time.monotonic(), False
    while (descriptor := try_lock(path, shared=shared)) is None:
        while_waiting()
        if not said and time.monotonic() - started > _SAY_AFTER_S:
            say(f"waiting for another process that holds {path}")
            said = True
        time.sleep(_POLL_S)
    return descriptor


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock during a block."""
    descriptor = lock(path, shared=shared)
    try:
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path, *, exclusively: bool = False) -> bool:
    """Whether a process holds a lock of any kind, or an exclusive one.

    False if the file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if exclusively else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def wait_until_unlocked(path: Path) -> None:
    """Wait while another process holds an exclusive lock."""
    while is_locked(path, exclusively=True):
        time.sleep(_POLL_S)
