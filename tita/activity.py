"""What this process does and when it last made progress, for those that wait and its watchdog.

A process that waits makes progress when the one that it waits for does.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True, eq=False)
class Stage:
    """What a process does for a while, for example loading a model."""

    name: str
    done: float = 0.0
    total: float | None = None
    """None if unknown, or if the stage has no parts."""
    unit: str = ""
    """Of `done` and `total`; `bytes` is shown as a size."""
    is_waiting: bool = False
    """Whether it only waits for other processes."""


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


_stages: list[Stage] = []
_reported = False


def enter_stage(name: str) -> Stage:
    """Begin the next stage of this process, which lasts until the next call."""
    entered = Stage(name=name)
    _stages[:1] = [entered]
    return entered


@contextmanager
def stage(
    name: str, *, total: float | None = None, unit: str = "", is_waiting: bool = False
) -> Iterator[Stage]:
    """A stage within the current one; its parts are counted in `done` of what this yields.

    Only the main thread has stages: what others do in the background is not what a process does.
    """
    entered = Stage(name=name, total=total, unit=unit, is_waiting=is_waiting)
    if threading.current_thread() is not threading.main_thread():
        yield entered
        return
    if not _stages:
        enter_stage("")
    _stages.append(entered)
    try:
        yield entered
    finally:
        if entered in _stages:
            _stages.remove(entered)


def current_stage() -> Stage | None:
    """The innermost stage that this process is in; None if it has entered none."""
    return next((found for found in reversed(_stages) if found.name), None)


def report_stages() -> None:
    """Record that something reports this process's stages to those that watch it."""
    global _reported
    _reported = True


def is_reported() -> bool:
    """Whether what the calling thread does is reported as this process's stage."""
    return _reported and threading.current_thread() is threading.main_thread()
