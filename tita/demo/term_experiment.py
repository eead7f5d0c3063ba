"""What the terms of the image preference do at fixed weights, over several seeds of training.

A reward model is trained on the same pairs without them, with mDPO's anchor (arXiv 2406.11839), and
with the image term once and twice. Tables show the accuracy by guidance weight, of existence
questions alone, and the share of yes among their answers: of right answers it is a half.
"""

from collections.abc import Sequence
from pathlib import Path

from tita.demo.answers import no_progress
from tita.demo.experiment_tables import markdown, mean_and_spread
from tita.demo.methods import WEIGHTS, guided_method
from tita.demo.rewards import RewardConfig
from tita.demo.seeds import TaskRun
from tita.demo.steps import timed, train_reward
from tita.demo.tasks import Task
from tita.storage import Store
from tita.storage.directory import DirectoryStore
from tita.terminal import say
from tita.vlm.loading import load_vlm

FIGURES = ("all", "existence", "yes")


def term_configs(task: Task) -> list[RewardConfig]:
    """The same pairs with more and more terms of the image."""
    weights = {
        "DPO": None,
        "DPO, anchor": 0.0,
        "DPO, anchor, image term": 1.0,
        "DPO, anchor, image term twice": 2.0,
    }
    return [
        RewardConfig(
            name=name,
            pairs=task.pairs,
            train=task.train
            if weight is None
            else {**task.train, "image_preference": {"weight": weight, "anchor": 1.0}},
        )
        for name, weight in weights.items()
    ]


def run_terms(task: Task, *, seeds: Sequence[int], store: Store, folder: Path) -> None:
    """Train and ask all of them, and write `terms.md`.

    Args:
        task: the questions.
        seeds: of the trainings.
        store: where results are looked for and written.
        folder: for the table.

    Raises:
        JobFailed: a job ended without its result.
    """
    run = TaskRun.start(task, store=store, folder=folder)
    found: dict[str, dict[float, list[dict[str, float]]]] = {}
    for config in term_configs(task):
        by_weight = found.setdefault(config.name, {weight: [] for weight in WEIGHTS})
        for seed in seeds:
            trained = train_reward(
                config, base=run.base, reward=run.reward, data=f"data-{task.name}", seed=seed,
                pairs_seed=0, store=store, processes=1,
            )  # fmt: skip
            run.rewards[config.name] = load_vlm(trained.model)
            asker = run.asker([trained.run], advance=no_progress)
            with timed(f"terms: {config.name}, seed {seed}"):
                for way in guided_method(config.name).ways:
                    asked = asker.ask(run.questions["test"], way, split="test")
                    details = task.details(run.questions["test"].items, asked.answers)
                    figures = {"all": 100 * run.mean("test", asked), **details}
                    by_weight[way.guidance.weight].append(
                        {name: float(figures[name] or 0) for name in FIGURES}
                    )
    text = "\n\n".join(
        [
            f"## Terms of the image preference\n\n{len(seeds)} seeds of training, "
            f"{len(run.questions['test'].items)} test questions; means (least to most).",
            markdown(_rows(found)),
        ]
    )
    DirectoryStore(folder).put("terms.md", (text + "\n").encode())
    say(f"experiments: {len(seeds)} seeds in {folder / 'terms.md'}")


def _rows(found: dict[str, dict[float, list[dict[str, float]]]]) -> list[dict[str, str]]:
    return [
        {"reward model": name, "w": f"{weight:g}"}
        | {f"{figure} %": mean_and_spread([each[figure] for each in figures]) for figure in FIGURES}
        for weight in WEIGHTS
        for name, by_weight in found.items()
        for figures in [by_weight[weight]]
    ]
