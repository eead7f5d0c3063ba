"""Waits between two attempts of a request, which a caller can end."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_thread = threading.local()


@contextmanager
def checked_while_waiting(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` once a second while `wait` waits in this thread; what it raises ends the wait.

    Throttled requests are repeated for long, also after the transfer they belong to was cancelled.
    """
    _thread.check = check
    try:
        yield
    finally:
        del _thread.check


def wait(seconds: float) -> None:
    """Wait in this thread."""
    check: Callable[[], None] = getattr(_thread, "check", lambda: None)
    ends_at = time.monotonic() + seconds
    while (left := ends_at - time.monotonic()) > 0:
        check()
        time.sleep(min(left, 1.0))
    check()
