"""When this process last made progress, for those that wait for it and for its watchdog.

A process that waits makes progress when the one that it waits for does.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_last = time.monotonic()
_listeners: list[Callable[[], None]] = []


def mark_progress() -> None:
    """Record that this process made progress: bytes were moved, a batch or a step was finished."""
    global _last
    _last = time.monotonic()
    for listener in tuple(_listeners):
        listener()


def idle_s() -> float:
    """Seconds since this process last made progress, or since it started."""
    return time.monotonic() - _last


@contextmanager
def on_progress(callback: Callable[[], None], *, every_s: float = 1.0) -> Iterator[None]:
    """Call `callback` when this process makes progress, at most once in `every_s` seconds.

    It is called in the thread that made the progress.
    """
    called, guard = time.monotonic(), threading.Lock()

    def listener() -> None:
        nonlocal called
        now = time.monotonic()
        with guard:
            if now - called < every_s:
                return
            called = now
        callback()

    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
