"""Entry point of `make experiments`: two tasks, five seeds of training, tables of all methods.

Two further experiments are run on request: the terms of the image preference on the questions, and
two reward models at once on the captions.
"""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from tita.demo.experiment_tables import num_seeds, write_tables
from tita.demo.front_experiment import run_front
from tita.demo.methods import Condition, contrastive_methods
from tita.demo.rewards import RewardConfig, contrast_config, noise_config
from tita.demo.scenes import Split
from tita.demo.seeds import run_task
from tita.demo.tasks import Task, captions_task, questions_task
from tita.demo.term_experiment import run_terms
from tita.storage import open_store
from tita.terminal import say
from tita.vlm.loading import silence_transformers


class Experiment(StrEnum):
    """The experiments by name; the first two compare all methods on a task."""

    QUESTIONS = "questions"
    CAPTIONS = "captions"
    TERMS = "terms"
    FRONT = "front"


_COMPARISONS = (Experiment.QUESTIONS, Experiment.CAPTIONS)


_QUESTIONS: dict[Split, int] = {"train": 800, "validation": 200, "test": 667}
_CAPTIONS: dict[Split, int] = {"train": 2400, "validation": 600, "test": 800}
_QUICK: dict[Split, int] = {"train": 60, "validation": 20, "test": 20}
_MINUTES_BEFORE = {"questions": 1, "captions": 4, "terms": 0, "front": 6}
_MINUTES_PER_SEED = {"questions": 3, "captions": 3, "terms": 3, "front": 0}
"""Of one core."""


def reward_configs(task: Task, teacher: Condition) -> list[RewardConfig]:
    """Pairs of distorted images, and pairs of the best contrast."""
    return [
        noise_config(task.pairs, task.train),
        contrast_config(task.pairs, task.train, teacher),
    ]


def main(
    out: Annotated[Path, typer.Option(help="Folder of all results.")] = Path("experiments-out"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds of training.")] = 5,
    experiment: Annotated[
        list[Experiment] | None,
        typer.Option(help="One of the experiments; repeatable; default: questions and captions."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few questions and steps.")] = False,
) -> None:
    """Run what is missing of the experiments, and write their tables after every seed."""
    silence_transformers()
    # Faster for matrices this small, and reproducible.
    torch.set_num_threads(1)
    chosen = experiment or list(_COMPARISONS)
    minutes = sum(_MINUTES_BEFORE[name] + seeds * _MINUTES_PER_SEED[name] for name in chosen)
    say(
        f"experiments: {', '.join(chosen)}, {seeds} seeds; about {minutes} minutes of one core for "
        f"what is not in {out} yet"
    )
    store = open_store(str(out / "store"))
    for number in range(1, seeds + 1):
        for name in (each for each in _COMPARISONS if each in chosen):
            if number < min(seeds, num_seeds(out, name)):
                continue
            outcome = run_task(
                _make(name, quick=quick), reward_configs, seeds=range(1, number + 1), store=store,
                folder=out,
            )  # fmt: skip
            write_tables(outcome, out=out)
    if Experiment.TERMS in chosen:
        task = _make(Experiment.QUESTIONS, quick=quick)
        run_terms(task, seeds=range(1, seeds + 1), store=store, folder=out)
    if Experiment.FRONT in chosen:
        task = _make(Experiment.CAPTIONS, quick=quick)
        faithful = contrast_config(task.pairs, task.train, contrastive_methods()[-1].ways[0])
        run_front(task, faithful, seed=1, store=store, folder=out)


def _make(name: Experiment, *, quick: bool) -> Task:
    if name is Experiment.QUESTIONS:
        task = questions_task(_QUICK if quick else _QUESTIONS)
    else:
        task = captions_task(_QUICK if quick else _CAPTIONS)
    return replace(task, train={**task.train, "max_steps": 5}) if quick else task


if __name__ == "__main__":
    typer.run(main)
