"""Displays of a run: live on a terminal, plain lines, JSON lines, or the job's log only."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from tita.launch.run_state import OVER, RunPhase, RunSnapshot, WorkerStatus
from tita.records import TrainProgress
from tita.terminal import Output, say

if TYPE_CHECKING:
    from rich.console import Group

MAX_ROWS = 8
"""More pods than this are shown as counts per state."""


class Display(Protocol):
    """Shows a run. `close` may be called several times."""

    def update(self, snapshot: RunSnapshot) -> None:
        """Show the run as it is now."""

    def say(self, text: str) -> None:
        """Show a message once."""

    def line(self, source: str, text: str) -> None:
        """Show a line of the job's log."""

    def close(self) -> None:
        """Restore the terminal."""


def open_display(output: Output = Output.TABLE) -> Display:
    """JSON lines for `-o json`, else live on a terminal and plain lines elsewhere."""
    if output is Output.JSON:
        return JsonDisplay()
    return LiveDisplay() if sys.stderr.isatty() else PlainDisplay()


def headline(snapshot: RunSnapshot) -> str:
    """Name, phase, running pods and elapsed time in one line."""
    workers = snapshot.workers
    running = sum(worker.state == "running" for worker in workers)
    shown = workers and snapshot.phase not in OVER
    pods = f"  {running}/{len(workers)} running" if shown else ""
    return f"{snapshot.run}  {snapshot.phase}{pods}  {clock(snapshot.elapsed_s)}"


def progress_line(progress: TrainProgress) -> str:
    """Training progress in one line."""
    return (
        f"step {progress.step}/{progress.steps}  loss {progress.loss:.3f}  "
        f"margin {progress.reward_margin:.2f}  acc {progress.reward_accuracy:.0%}  "
        f"{progress.samples_per_s:.1f}/s  {clock(progress.seconds_left)} left"
    )


def bar(progress: TrainProgress, *, width: int = 40) -> str:
    """A progress bar of characters."""
    share = min(1.0, progress.step / max(1, progress.steps))
    done = round(share * width)
    return f"[{'#' * done}{'-' * (width - done)}] {share:4.0%}"


def worker_lines(workers: Sequence[WorkerStatus]) -> list[str]:
    """One line per pod, or for many pods one line per state, the most frequent first."""
    if len(workers) > MAX_ROWS:
        counts = Counter((worker.state, worker.note) for worker in workers)
        return [f"  {n:5d} {state:9} {note}".rstrip() for (state, note), n in counts.most_common()]
    return [
        f"  {worker.rank:3d} {worker.state:9} {worker.node:24.24} "
        f"{f'try {worker.restarts + 1}' if worker.restarts else '':7}{worker.note:26.26}".rstrip()
        for worker in workers
    ]


def live_lines(snapshot: RunSnapshot) -> list[str]:
    """The lines of the live display."""
    lines = [headline(snapshot)]
    if snapshot.progress is not None:
        lines += [bar(snapshot.progress), progress_line(snapshot.progress)]
    return lines + worker_lines(snapshot.workers)


def clock(seconds: float) -> str:
    """`4:05` or `1:02:03`."""
    minutes, second = divmod(int(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def age(seconds: float) -> str:
    """`119s`, `3m`, `25h` or `11d`, as kubectl prints ages."""
    whole = int(max(0.0, seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= 2 * length:
            return f"{whole // length}{unit}"
    return f"{whole}s"


class PlainDisplay:
    """Lines for a log file: one per change of phase, and progress every few seconds."""

    def __init__(self, *, progress_every_s: float = 10.0) -> None:
        self._every_s = progress_every_s
        self._phase: RunPhase | None = None
        self._step = 0
        self._progress_at = float("-inf")

    def update(self, snapshot: RunSnapshot) -> None:
        if snapshot.phase != self._phase:
            self._phase = snapshot.phase
            say(headline(snapshot))
        progress = snapshot.progress
        if progress is None or progress.step == self._step:
            return
        last = progress.step >= progress.steps
        if last or snapshot.elapsed_s - self._progress_at >= self._every_s:
            self._step, self._progress_at = progress.step, snapshot.elapsed_s
            say(progress_line(progress))

    def say(self, text: str) -> None:
        say(text)

    def line(self, source: str, text: str) -> None:
        say(f"{source}| {text}")

    def close(self) -> None:
        return


class LogDisplay(PlainDisplay):
    """The job's log on standard output, messages on standard error."""

    def __init__(self, *, prefixed: bool) -> None:
        super().__init__()
        self._prefixed = prefixed

    def update(self, snapshot: RunSnapshot) -> None:
        return

    def line(self, source: str, text: str) -> None:
        print(f"{source}| {text}" if self._prefixed else text, flush=True)


class LiveDisplay:
    """The run on the last lines of the screen; the job's log scrolls above them."""

    def __init__(self) -> None:
        from rich.console import Console  # 30 ms, for terminals only
        from rich.live import Live

        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()
        self._shown: list[str] = []

    def update(self, snapshot: RunSnapshot) -> None:
        lines = live_lines(snapshot)
        if lines != self._shown:
            self._shown = lines
            self._live.update(_cropped(lines), refresh=True)

    def say(self, text: str) -> None:
        self._console.print(text)

    def line(self, source: str, text: str) -> None:
        self._console.print(f"{source}| {text}", soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


def _cropped(lines: Sequence[str]) -> "Group":
    from rich.console import Group
    from rich.text import Text

    return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


class JsonDisplay:
    """One JSON object per line on standard output."""

    def __init__(self) -> None:
        self._phase: RunPhase | None = None
        self._workers: Sequence[WorkerStatus] = ()
        self._progress: TrainProgress | None = None

    def update(self, snapshot: RunSnapshot) -> None:
        if snapshot.phase != self._phase or snapshot.workers != self._workers:
            self._phase, self._workers = snapshot.phase, snapshot.workers
            pods = [asdict(worker) for worker in snapshot.workers]
            self._print(event="state", run=snapshot.run, phase=snapshot.phase, pods=pods)
        if snapshot.progress is not None and snapshot.progress != self._progress:
            self._progress = snapshot.progress
            self._print(event="progress", run=snapshot.run, **asdict(snapshot.progress))

    def say(self, text: str) -> None:
        self._print(event="note", text=text)

    def line(self, source: str, text: str) -> None:
        self._print(event="log", source=source, text=text)

    def close(self) -> None:
        return

    def _print(self, **event: Any) -> None:
        print(json.dumps(event), flush=True)
