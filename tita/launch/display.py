"""Displays of a run: live on a terminal, plain lines, JSON lines, or the job's log only."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from tita.json_text import dump_json
from tita.launch.run_state import OVER, RunPhase, RunSnapshot, WorkerStatus
from tita.records import (
    TRAINING_STAGE,
    RankStage,
    RunStages,
    TrainProgress,
    ValidationFigures,
    format_ranks,
)
from tita.terminal import Output, amount_of, say

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


def held_out_line(figures: ValidationFigures) -> str:
    """Figures of the held-out pairs in one line, with the interval of what their images add."""
    return (
        f"held out: loss {figures.loss:.3f}  acc {figures.accuracy:.0%}, "
        f"{figures.other_accuracy:.0%} with other images "
        f"({100 * figures.image_effect_low:+.0f} to {100 * figures.image_effect_high:+.0f} points)"
    )


def stage_text(stage: RankStage) -> str:
    """`loading the model`, or with progress `reference pass: 3/40 batches`."""
    if not stage.total:
        return stage.name
    return f"{stage.name}: {amount_of(stage.done, total=stage.total, unit=stage.unit)}"


def stages_line(stages: RunStages) -> str:
    """What the ranks do in one line; ranks are named if they differ, and left out if they wait."""
    busy = _busy(stages)
    if len(busy) == 1:
        return stage_text(busy[0])
    texts = [f"{_rank_names(stage.ranks)}: {stage_text(stage)}" for stage in busy]
    return "; ".join(texts)


def _busy(stages: RunStages) -> tuple[RankStage, ...]:
    """The stages of ranks that do not wait for others; all, if every rank waits."""
    return tuple(stage for stage in stages.stages if not stage.is_waiting) or stages.stages


def _rank_names(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {format_ranks(ranks)}"


def node_stages(stages: RunStages | None) -> dict[int, str]:
    """What each node does, if the ranks differ; by the rank of the node."""
    found: dict[int, list[str]] = {}
    if stages is not None and len(stages.stages) > 1:
        for stage in sorted(stages.stages, key=lambda each: each.is_waiting):
            for node in sorted({rank // stages.ranks_per_node for rank in stage.ranks}):
                found.setdefault(node, []).append(stage_text(stage))
    return {node: ", ".join(texts) for node, texts in found.items()}


def bar(done: float, total: float, *, width: int = 40) -> str:
    """A progress bar of characters."""
    share = min(1.0, done / max(1, total))
    filled = round(share * width)
    return f"[{'#' * filled}{'-' * (width - filled)}] {share:4.0%}"


def worker_lines(workers: Sequence[WorkerStatus], *, stages: RunStages | None = None) -> list[str]:
    """One line per pod, or for many pods one line per state, the most frequent first."""
    doing = node_stages(stages)
    notes = {worker: worker.note or doing.get(worker.rank, "") for worker in workers}
    if len(workers) > MAX_ROWS:
        counts = Counter((worker.state, notes[worker]) for worker in workers)
        return [f"  {n:5d} {state:9} {note}".rstrip() for (state, note), n in counts.most_common()]
    return [
        f"  {worker.rank:3d} {worker.state:9} {worker.node:24.24} "
        f"{f'try {worker.restarts + 1}' if worker.restarts else '':7}{notes[worker]:31.31}".rstrip()
        for worker in workers
    ]


def live_lines(snapshot: RunSnapshot) -> list[str]:
    """The lines of the live display."""
    lines, progress = [headline(snapshot)], snapshot.progress
    if progress is not None:
        lines += [bar(progress.step, progress.steps), progress_line(progress)]
        if progress.validation is not None:
            lines.append(held_out_line(progress.validation))
    if (stages := _shown_stages(snapshot)) is not None:
        busy = _busy(stages)
        if progress is None and len(busy) == 1 and busy[0].total:
            lines.append(bar(busy[0].done, busy[0].total))
        lines.append(stages_line(stages))
    return lines + worker_lines(snapshot.workers, stages=stages)


def _shown_stages(snapshot: RunSnapshot) -> RunStages | None:
    """The stages while they tell more than the phase."""
    stages = snapshot.stages
    if stages is None or snapshot.phase not in (RunPhase.RUNNING, RunPhase.UPLOADING):
        return None
    return None if any(stage.name == TRAINING_STAGE for stage in stages.stages) else stages


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
    """Lines for a log file: one per change of phase or stage, and progress every few seconds."""

    def __init__(self, *, progress_every_s: float = 10.0) -> None:
        self._every_s = progress_every_s
        self._phase: RunPhase | None = None
        self._names: set[str] = set()
        self._text = ""
        self._step = 0
        self._evaluated = 0
        self._progress_at = float("-inf")

    def update(self, snapshot: RunSnapshot) -> None:
        if snapshot.phase != self._phase:
            self._phase = snapshot.phase
            say(headline(snapshot))
        is_due = snapshot.elapsed_s - self._progress_at >= self._every_s
        progress = snapshot.progress
        if progress is not None and progress.step != self._step:
            last = progress.step >= progress.steps
            if last or is_due:
                self._step, self._progress_at = progress.step, snapshot.elapsed_s
                say(progress_line(progress))
        figures = None if progress is None else progress.validation
        if figures is not None and figures.step != self._evaluated:
            self._evaluated = figures.step
            say(f"step {figures.step}: {held_out_line(figures)}")
        if text := self._new_stages(snapshot, is_due=is_due):
            self._progress_at = snapshot.elapsed_s
            say(text)

    def _new_stages(self, snapshot: RunSnapshot, *, is_due: bool) -> str:
        """What the ranks do, if it is another stage, or progress that is due; else empty."""
        stages = _shown_stages(snapshot)
        if stages is None:
            return ""
        names, text = {stage.name for stage in _busy(stages)}, stages_line(stages)
        if names == self._names and not (is_due and text != self._text):
            return ""
        self._names, self._text = names, text
        return text

    def say(self, text: str) -> None:
        say(text)

    def line(self, source: str, text: str) -> None:
        say(f"{source}| {text}")

    def close(self) -> None:
        return


class LogDisplay(PlainDisplay):
    """The job's log with its stages on standard output, messages on standard error."""

    def __init__(self, *, prefixed: bool) -> None:
        super().__init__()
        self._prefixed = prefixed

    def update(self, snapshot: RunSnapshot) -> None:
        is_due = snapshot.elapsed_s - self._progress_at >= self._every_s
        if text := self._new_stages(snapshot, is_due=is_due):
            self._progress_at = snapshot.elapsed_s
            self.line("0", text)

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
        self._workers: dict[int, WorkerStatus] = {}
        """By rank, as they were printed."""
        self._shown: Sequence[WorkerStatus] = ()
        self._progress: TrainProgress | None = None
        self._stages: RunStages | None = None

    def update(self, snapshot: RunSnapshot) -> None:
        self._update_state(snapshot)
        if snapshot.progress is not None and snapshot.progress != self._progress:
            self._progress = snapshot.progress
            self._print(event="progress", run=snapshot.run, **asdict(snapshot.progress))
        if snapshot.stages is not None and snapshot.stages != self._stages:
            self._stages = snapshot.stages
            self._print(event="stages", run=snapshot.run, **asdict(snapshot.stages))

    def _update_state(self, snapshot: RunSnapshot) -> None:
        """Print the phase, the pods that are new or have changed, and ranks without a pod."""
        if snapshot.phase == self._phase and snapshot.workers is self._shown:
            return
        self._shown = snapshot.workers
        now = {worker.rank: worker for worker in snapshot.workers}
        pods = [asdict(new) for rank, new in now.items() if self._workers.get(rank) != new]
        gone = sorted(self._workers.keys() - now.keys())
        if snapshot.phase == self._phase and not pods and not gone:
            return
        self._phase, self._workers = snapshot.phase, now
        more = {"gone": gone} if gone else {}
        self._print(event="state", run=snapshot.run, phase=snapshot.phase, pods=pods, **more)

    def say(self, text: str) -> None:
        self._print(event="note", text=text)

    def line(self, source: str, text: str) -> None:
        self._print(event="log", source=source, text=text)

    def close(self) -> None:
        return

    def _print(self, **event: Any) -> None:
        print(dump_json(event), flush=True)
