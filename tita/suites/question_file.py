"""Several methods on one question file: `tita-bench sweep --methods`."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tita.bench.methods import BASE, Method, guided
from tita.bench.tasks import BenchmarkTask
from tita.errors import TitaError
from tita.suites.comparison import (
    SetRuns,
    check_base_answered,
    read_method_run,
    scorer_of,
    unit_sizes,
)
from tita.suites.scorers import VOCABULARY
from tita.suites.suite_report import SuiteReport, make_report
from tita.suites.verdict import find, headline, notes


def method_tasks(
    task: BenchmarkTask, methods: Sequence[Method], *, out: Path
) -> list[BenchmarkTask]:
    """One task per method, each with its own results file in a folder."""
    return [
        replace(
            task,
            out=out / f"{method.slug}.jsonl",
            generation=replace(task.generation, method=method),
        )
        for method in methods
    ]


def methods_report(
    tasks: Sequence[BenchmarkTask],
    methods: Sequence[Method],
    *,
    out: Path,
    front: str | None = None,
) -> SuiteReport:
    """Compare the methods on the questions of one file.

    Args:
        front: two figures, separated by a comma, whose front is shown.

    Raises:
        TitaError: the base has no answers, or `front` names no two figures.
    """
    questions = tasks[0].questions
    words = questions.parent / VOCABULARY
    if words.is_file() and words.parent != out:
        shutil.copy(words, out / VOCABULARY)
    runs = _read_runs(tasks, methods, folder=out)
    check_base_answered([runs])
    return make_report([runs], methods, front_of=_figures(front, runs))


def weight_choice(tasks: Sequence[BenchmarkTask]) -> str:
    """The weight that a part of the questions chooses, and its gain on the rest, in words.

    Without a score in the answers there is nothing to choose by, and the text says so.
    """
    methods = [guided(task.generation.weight) if task.generation.weight else BASE for task in tasks]
    runs = _read_runs(tasks, methods, folder=tasks[0].questions.parent)
    if not runs.runs[BASE.name].scored:
        return "No weight is chosen: no answer has a score.\n"
    findings = find([runs], methods)
    return "\n".join([headline(findings), *notes(findings)]) + "\n"


def _read_runs(
    tasks: Sequence[BenchmarkTask], methods: Sequence[Method], *, folder: Path
) -> SetRuns:
    """The answers that there are, as those of one set; `folder` may have the words of captions."""
    name, scorer = scorer_of(tasks[0].out)
    items = list(tasks[0].read())
    return SetRuns(
        name=name or tasks[0].questions.stem,
        title=name or tasks[0].questions.stem,
        source="",
        scorer=scorer,
        folder=folder,
        images=tasks[0].images,
        runs={
            method.name: read_method_run(task.out, method, scorer=scorer, folder=folder)
            for task, method in zip(tasks, methods, strict=True)
            if task.out.is_file()
        },
        num_questions=len(items),
        unit_sizes=unit_sizes(items, scorer),
    )


def _figures(front: str | None, runs: SetRuns) -> tuple[str, str] | None:
    if front is None:
        return None
    names = [name.strip() for name in front.split(",")]
    # Of a length, neither more nor less is better.
    known = [name for name, figure in runs.scorer.figures.items() if figure.better]
    if len(names) != 2 or not all(name in known for name in names):
        raise TitaError(
            f"{front!r} names no two figures",
            where="--front",
            remedy=f"choose two of {', '.join(known)}",
        )
    return names[0], names[1]
