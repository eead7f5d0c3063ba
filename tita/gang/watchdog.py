"""Ends this process when it makes no progress: a hung process cannot end itself otherwise.

Progress is what `tita.activity` records, and data that is read or written. While a model is
trained, only finished steps count, because uploads go on in the background of a hung step.
"""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from tita.activity import idle_s, mark_progress
from tita.errors import ExitCode
from tita.terminal import say

_IO_BYTES = 1 << 20
"""Reading or writing this much between two checks is progress."""


class Watchdog:
    """Watches the progress of this process from a thread; one per process."""

    def __init__(self) -> None:
        self._job = ""
        self._timeout_s = float("inf")
        self._last_step: float | None = None
        self._over = threading.Event()
        self._io_bytes = 0

    def start(self, job: str, *, timeout_s: float) -> None:
        """End this process with `ExitCode.HUNG` after `timeout_s` without progress."""
        self._job, self._timeout_s = job, timeout_s
        mark_progress()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def finish_step(self) -> None:
        """A training step is finished, or training begins: from now on only steps count."""
        self._last_step = time.monotonic()

    def end_steps(self) -> None:
        """Training is over."""
        self._last_step = None
        mark_progress()

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self._timeout_s / 4)):
            if self._last_step is None:
                self._count_io()
                waited_s, what = idle_s(), "no progress"
            else:
                waited_s, what = time.monotonic() - self._last_step, "no step finished"
            if waited_s > self._timeout_s:
                rank = os.environ.get("RANK", "0")
                say(f"{self._job}: rank {rank} is hung: {what} for {waited_s:.0f} s")
                # A thread that waits in a collective cannot be stopped in any other way.
                os._exit(ExitCode.HUNG)

    def _count_io(self) -> None:
        read_before, self._io_bytes = self._io_bytes, _io_bytes()
        if self._io_bytes - read_before > _IO_BYTES:
            mark_progress()


def _io_bytes() -> int:
    """Bytes that this process has read and written so far, files mapped to memory included."""
    # Some sandboxes have no such file.
    with suppress(OSError):
        lines = Path("/proc/self/io").read_text().splitlines()
        counts = dict(line.split(": ") for line in lines)
        return sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
    return 0


WATCHDOG = Watchdog()
