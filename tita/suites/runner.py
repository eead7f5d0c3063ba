"""`tita-bench suite`: prepare the sets of a folder, ask every method, judge, compare, report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tita.bench.judge import judge_items
from tita.bench.methods import BASE, Method, guided
from tita.bench.questions import read_items
from tita.bench.tasks import BenchmarkTask
from tita.bench.worker_pool import RequestStats
from tita.errors import TitaError
from tita.suites.catalog import find_sets
from tita.suites.comparison import SetRuns, read_method_run, unit_sizes
from tita.suites.set_runs import QUESTIONS, ImageIndex, PreparedSet, prepare_set, tasks_of
from tita.terminal import say

Ask = Callable[[BenchmarkTask], RequestStats]
"""Asks the questions of a task that its results file has no answer to."""
Judge = Callable[[Path], RequestStats]
"""Has a judge review a results file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuitePlan:
    """What is asked."""

    sets: Sequence[PreparedSet]
    methods: Sequence[Method]
    limit: int | None = None


def plan_suite(
    suite: str,
    *,
    source: Path,
    out: Path,
    methods: Sequence[Method],
    limit: int | None = None,
    only: Sequence[str] = (),
    has_judge: bool = False,
) -> SuitePlan:
    """Find the sets of a suite in a folder and write their question files.

    Args:
        only: names of the sets to take; empty for all.
        has_judge: whether a judge model is given; without, sets that need one are left out.

    Raises:
        TitaError: no set is left, a set is damaged, or an image is missing.
    """
    found = find_sets(source, suite=suite)
    unknown = sorted(set(only) - {each.set.name for each in found})
    if unknown:
        raise TitaError(
            f"the set {unknown[0]!r} is not in the folder",
            where=str(source),
            remedy=f"choose from {', '.join(each.set.name for each in found)}",
        )
    chosen = [each for each in found if not only or each.set.name in only]
    judged = [each.set.title for each in chosen if each.set.judged]
    if judged and not has_judge:
        say(f"left out, because no judge is given (--judge): {', '.join(judged)}")
        chosen = [each for each in chosen if not each.set.judged]
    if not chosen:
        raise TitaError("no set is left", where=str(source), remedy="give --judge")
    index = ImageIndex(source)
    prepared = []
    for each in chosen:
        ready = prepare_set(each, source=source, out=out, index=index)
        say(f"{ready.set.title}: {ready.num_questions} questions from {each.folder}")
        prepared.append(ready)
    return SuitePlan(sets=prepared, methods=methods, limit=limit)


def suite_methods(
    weights: Sequence[float],
    *,
    controls: bool,
    local: bool,
    before_dpo: str,
    explain: bool = False,
) -> list[Method]:
    """The base, guidance by each weight, and with `controls` what can be run of the controls.

    Args:
        local: whether models run in this process, where a reward model can see other images.
        before_dpo: the reward model before DPO: a path, or its name on the server; empty without.
        explain: whether to ask which tokens guidance changed.
    """
    positive = [weight for weight in weights if weight]
    methods = [BASE, *(replace(guided(weight), explain=explain) for weight in positive)]
    if not controls:
        return methods
    if local:
        methods += [guided(weight, control="other images") for weight in positive]
    if before_dpo:  # in the end: locally, other models are loaded for it
        name = "" if local else before_dpo
        methods += [guided(weight, control="before DPO", reward=name) for weight in positive]
    if not local:
        say(
            "the control with other images needs --local-model: a request has one image for base "
            "and reward model"
        )
    if not before_dpo:
        say("the control before DPO needs --before-dpo: the reward model before DPO")
    if not any(method.control for method in methods):
        raise TitaError(
            "no control can be run",
            where="--controls",
            remedy="give --before-dpo NAME, or run with --local-model",
        )
    return methods


def run_suite(plan: SuitePlan, ask: Ask, *, judge: Judge | None = None) -> list[RequestStats]:
    """Ask all questions by all methods; a second run asks those without an answer."""
    limits = {each.set.name: plan.limit for each in plan.sets}
    tasks = tasks_of(plan.sets, plan.methods, limits=limits)
    stats = []
    for number, task in enumerate(tasks, start=1):
        method = task.generation.method or BASE
        say(f"{number}/{len(tasks)}: {task.out.parent.name}, {method.name}")
        stats.append(ask(task))
        if judge is not None and _has_open_answers(task.out):
            stats.append(judge(task.out))
    return stats


def _has_open_answers(results: Path) -> bool:
    try:
        return next(judge_items(results), None) is not None
    except TitaError:
        return False


def read_suite(plan: SuitePlan) -> list[SetRuns]:
    """The answers of all methods to all sets."""
    sets = []
    for each in plan.sets:
        runs = {
            method.name: read_method_run(
                each.results(method), method, scorer=each.set.scorer, folder=each.folder
            )
            for method in plan.methods
            if each.results(method).is_file()
        }
        sets.append(
            SetRuns(
                name=each.set.name, title=each.set.title, source=each.set.source,
                scorer=each.set.scorer, folder=each.folder, images=each.images, runs=runs,
                num_questions=each.num_questions, hallucination=each.set.hallucination,
                unit_sizes=unit_sizes(read_items(each.folder / QUESTIONS), each.set.scorer),
            )
        )  # fmt: skip
    return sets
