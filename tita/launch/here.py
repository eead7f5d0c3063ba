"""A run on this machine, in the same view as one on a cluster."""

import time
from collections.abc import Mapping
from typing import Any

from tita.errors import ExitCode
from tita.launch.local import run_local
from tita.launch.progress import read_progress
from tita.launch.shape import Shape
from tita.launch.states import Phase, Snapshot, Worker
from tita.launch.verdict import words_for
from tita.launch.views import View, open_view
from tita.records import TrainProgress
from tita.terminal import Output


def show_local(
    job: str,
    *,
    recipe: Mapping[str, Any],
    run: str,
    store: str,
    shape: Shape,
    output: Output = Output.TABLE,
) -> int:
    """Run `job` here, show it, and return its exit code."""
    view = open_view(output)
    shown = _Shown(view, job=job, run=run, shape=shape)
    try:
        shown.update(Phase.STARTING, state="starting")
        code = run_local(
            job,
            recipe=recipe,
            run=run,
            store=store,
            nodes=shape.nodes,
            procs_per_node=shape.procs_per_node,
            on_line=shown.line,
        )
        phase = Phase.FAILED if code else Phase.DONE
        shown.update(phase, state=str(phase))
    finally:
        view.close()
    if code == ExitCode.OK:
        view.say(f"{run} is done")
    else:
        view.say(f"{run} ended with exit code {int(code)}: {words_for(code)}")
    return code


class _Shown:
    """What the lines of the nodes say of the run."""

    def __init__(self, view: View, *, job: str, run: str, shape: Shape) -> None:
        self._view = view
        self._job, self._run, self._shape = job, run, shape
        self._progress: TrainProgress | None = None
        self._started = time.monotonic()

    def line(self, rank: int, text: str) -> None:
        progress = read_progress(text)
        if progress is None:
            self._view.line(str(rank), text)
        else:
            self._progress = progress
        self.update(self._phase(), state="running")

    def update(self, phase: Phase, *, state: str) -> None:
        workers = tuple(
            Worker(name=f"{self._run}-{rank}", rank=rank, state=state, node="here")
            for rank in range(self._shape.nodes)
        )
        self._view.update(
            Snapshot(
                run=self._run,
                job=self._job,
                phase=phase,
                workers=workers,
                progress=self._progress,
                elapsed_s=time.monotonic() - self._started,
            )
        )

    def _phase(self) -> Phase:
        if self._progress is None:
            return Phase.RUNNING
        done = self._progress.step >= self._progress.steps
        return Phase.UPLOADING if done else Phase.TRAINING
