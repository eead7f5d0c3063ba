"""Ends workers of this node that show no life: a frozen process cannot end itself.

torchrun notices only workers that exit. A frozen one (SIGSTOP, a debugger, a hung driver) would
keep its pod running for ever, after all other ranks have given it up.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tita.terminal import say

_PATIENCE = 10.0
"""Factor for a worker without heartbeats that still uses the CPU or reads pages: loading a shared
library from a slow disk stops all threads of Python."""


@dataclass(slots=True)
class _Seen:
    """What was seen of a worker, and the seconds since each changed."""

    beat: int = -1
    work: tuple[str, ...] = ()
    without_beat_s: float = 0.0
    without_work_s: float = 0.0


class WorkerMonitor:
    """Watches the workers, which are children of this process, from a thread."""

    def __init__(self, folder: Path, *, timeout_s: float) -> None:
        """`folder` has one file per worker, named by its process id, that it touches."""
        self._folder = folder
        self._timeout_s = timeout_s
        self._seen: dict[int, _Seen] = {}
        self._stopped = threading.Event()
        self.ended: list[int] = []
        """Process ids of the workers that were ended."""

    def start(self) -> None:
        threading.Thread(target=self._watch, name="workers", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        every_s = min(2.0, self._timeout_s / 4)
        last = time.monotonic()
        while not self._stopped.wait(every_s):
            now = time.monotonic()
            # The whole container may have been paused: then workers had no time either.
            passed_s, last = min(now - last, 2 * every_s), now
            for pid, rank in _workers().items():
                self._check(pid, rank, passed_s)

    def _check(self, pid: int, rank: str, passed_s: float) -> None:
        seen = self._seen.setdefault(pid, _Seen())
        beat, work = _modified(self._folder / str(pid)), _work(pid)
        seen.without_beat_s = 0.0 if beat != seen.beat else seen.without_beat_s + passed_s
        seen.without_work_s = 0.0 if work != seen.work else seen.without_work_s + passed_s
        seen.beat, seen.work = beat, work
        frozen = min(seen.without_beat_s, seen.without_work_s) > self._timeout_s
        if pid not in self.ended and (frozen or seen.without_beat_s > _PATIENCE * self._timeout_s):
            self.ended.append(pid)
            say(f"rank {rank} (process {pid}) is frozen: no life for {seen.without_beat_s:.0f} s")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _workers() -> dict[int, str]:
    """Process id and rank of this process's children that are torchrun's workers (Linux)."""
    found = {}
    for thread in Path("/proc/self/task").iterdir():
        # Threads and processes may end at any time; some sandboxes list no children.
        with suppress(OSError):
            for pid in (thread / "children").read_text().split():
                with suppress(OSError):
                    environment = Path("/proc", pid, "environ").read_bytes().split(b"\0")
                    ranks = [e[5:] for e in environment if e.startswith(b"RANK=")]
                    if ranks:
                        found[int(pid)] = ranks[0].decode()
    return found


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _work(pid: int) -> tuple[str, ...]:
    """Major page faults and CPU time of a process so far."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ()
    return fields[9], fields[11], fields[12]
