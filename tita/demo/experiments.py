"""Entry point of `make experiments`: two tasks, five seeds of training, tables of all methods."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from tita.demo.experiment_tables import write_tables
from tita.demo.methods import Condition
from tita.demo.rewards import RewardConfig, contrast_config, noise_config
from tita.demo.scenes import Split
from tita.demo.seeds import run_task
from tita.demo.tasks import Task, captions_task, questions_task
from tita.storage import open_store
from tita.terminal import say
from tita.vlm.loading import silence_transformers


class TaskName(StrEnum):
    """The tasks by name."""

    QUESTIONS = "questions"
    CAPTIONS = "captions"


_QUESTIONS: dict[Split, int] = {"train": 800, "validation": 200, "test": 667}
_CAPTIONS: dict[Split, int] = {"train": 2400, "validation": 600, "test": 800}
_QUICK: dict[Split, int] = {"train": 60, "validation": 20, "test": 20}
_MINUTES_BEFORE = {"questions": 1, "captions": 4}
_MINUTES_PER_SEED = {"questions": 3, "captions": 3}
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
    task: Annotated[
        list[TaskName] | None, typer.Option(help="One of the tasks; default: all.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few questions and steps.")] = False,
) -> None:
    """Run what is missing of the experiments, and write their tables after every seed."""
    silence_transformers()
    # Faster for matrices this small, and reproducible.
    torch.set_num_threads(1)
    tasks = [_make(each, quick=quick) for each in task or TaskName]
    minutes = sum(_MINUTES_BEFORE[t.name] + seeds * _MINUTES_PER_SEED[t.name] for t in tasks)
    say(
        f"experiments: {len(tasks)} tasks, {seeds} seeds; about {minutes} minutes of one core for "
        f"what is not in {out} yet"
    )
    store = open_store(str(out / "store"))
    for number in range(1, seeds + 1):
        for each in tasks:
            outcome = run_task(
                each, reward_configs, seeds=range(1, number + 1), store=store, folder=out
            )
            write_tables(outcome, out=out)


def _make(name: TaskName, *, quick: bool) -> Task:
    if name is TaskName.QUESTIONS:
        task = questions_task(_QUICK if quick else _QUESTIONS)
    else:
        task = captions_task(_QUICK if quick else _CAPTIONS)
    return replace(task, train={**task.train, "max_steps": 5}) if quick else task


if __name__ == "__main__":
    typer.run(main)
