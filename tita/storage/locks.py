"""Locks between processes of one node, by files; the system frees them when a process ends."""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tita.errors import TitaError
from tita.terminal import say

_PAUSE_S = 0.05
_SAY_AFTER_S = 2.0


def try_lock(path: Path, *, shared: bool = False) -> int | None:
    """The descriptor of a locked file, or None if someone else has it; close it to let go.

    Raises:
        OSError: the file can be neither made nor opened.
        TitaError: the file system has no locks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _is_still(descriptor, path):
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
                "the file system has no locks", where=str(path), remedy="choose a local disk"
            ) from None


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the locked file is the one of that name: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def lock(
    path: Path, *, shared: bool = False, while_waiting: Callable[[], None] = lambda: None
) -> int:
    """As `try_lock`, but wait for it; `while_waiting` is called now and then and may raise."""
    started, said = time.monotonic(), False
    while (descriptor := try_lock(path, shared=shared)) is None:
        while_waiting()
        if not said and time.monotonic() - started > _SAY_AFTER_S:
            say(f"waiting for another process that has {path}")
            said = True
        time.sleep(_PAUSE_S)
    return descriptor


@contextmanager
def locked(
    path: Path, *, shared: bool = False, while_waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold a lock for the length of a block."""
    descriptor = lock(path, shared=shared, while_waiting=while_waiting)
    try:
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process has this lock now; without the right to look, no."""
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


def wait_until_free(path: Path) -> None:
    """Wait while another process has a lock; without the right to look, do not."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_PAUSE_S)
        except OSError:
            return
        finally:
            os.close(descriptor)
