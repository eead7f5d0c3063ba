"""What a person or a script sees of a run: a live display, plain lines, or JSON lines."""

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


# More pods than this are shown as counts.
MAX_ROWS = 8


class Display(Protocol):
    """Shows a run; a view is closed once, at the end or on the way out."""

    def update(self, snapshot: RunSnapshot) -> None:
        """The run as it is now."""
        ...

    def say(self, text: str) -> None:
        """A sentence, told once."""
        ...

    def line(self, source: str, text: str) -> None:
        """A line that the job wrote."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


def open_display(output: Output = Output.TABLE) -> Display:
    """The view that fits: JSON lines if asked for, live on a terminal, else plain lines."""
    if output is Output.JSON:
        return JsonDisplay()
    return LiveDisplay() if sys.stderr.isatty() else PlainDisplay()


def headline(snapshot: RunSnapshot) -> str:
    """One line: name, phase, pods that run, time."""
    workers = snapshot.workers
    running = sum(worker.state == "running" for worker in workers)
    shown = workers and snapshot.phase not in OVER
    pods = f"  {running}/{len(workers)} running" if shown else ""
    return f"{snapshot.run}  {snapshot.phase}{pods}  {clock(snapshot.elapsed_s)}"


def progress_line(progress: TrainProgress) -> str:
    """One line of numbers, for people."""
    return (
        f"step {progress.step}/{progress.steps}  loss {progress.loss:.3f}  "
        f"margin {progress.reward_margin:.2f}  acc {progress.reward_accuracy:.0%}  "
        f"{progress.samples_per_s:.1f}/s  {clock(progress.seconds_left)} left"
    )


def bar(progress: TrainProgress, *, width: int = 40) -> str:
    """How much is done, as characters."""
    share = min(1.0, progress.step / max(1, progress.steps))
    done = round(share * width)
    return f"[{'#' * done}{'-' * (width - done)}] {share:4.0%}"


def worker_lines(workers: Sequence[WorkerStatus]) -> list[str]:
    """One line a pod, or where there are many one a state, with what is wrong first."""
    if len(workers) > MAX_ROWS:
        counts = Counter((worker.state, worker.note) for worker in workers)
        return [f"  {n:5d} {state:9} {note}".rstrip() for (state, note), n in counts.most_common()]
    return [
        f"  {worker.rank:3d} {worker.state:9} {worker.node:24.24} "
        f"{f'try {worker.restarts + 1}' if worker.restarts else '':7}{worker.note:26.26}".rstrip()
        for worker in workers
    ]


def clock(seconds: float) -> str:
    """`4:05` or `1:02:03`."""
    minutes, second = divmod(int(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def age(seconds: float) -> str:
    """`119s`, `3m`, `25h` or `11d`: one number and its unit, as kubectl has it."""
    whole = int(max(0.0, seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= 2 * length:
            return f"{whole // length}{unit}"
    return f"{whole}s"


class PlainDisplay:
    """Lines for a log file: a line when something changed, progress now and then."""

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


class LiveDisplay:
    """The last lines of the screen show the run; the job's own lines scroll above them."""

    def __init__(self) -> None:
        from rich.console import Console
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


def live_lines(snapshot: RunSnapshot) -> list[str]:
    """What the live view shows."""
    lines = [headline(snapshot)]
    if snapshot.progress is not None:
        lines += [bar(snapshot.progress), progress_line(snapshot.progress)]
    return lines + worker_lines(snapshot.workers)


def _cropped(lines: Sequence[str]) -> "Group":
    from rich.console import Group
    from rich.text import Text

    return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


class JsonDisplay:
    """One JSON object a line on standard output."""

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
