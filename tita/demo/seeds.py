"""The experiments of `make experiments`: all methods on two tasks, over several seeds of training.

Every training run and the answers of every condition are kept in the folder of the experiments, so
that a run that was interrupted continues. Settings are chosen on the validation split, for each
seed by itself; the test split is asked only with those that were chosen, and their controls.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tita.data import read_questions
from tita.demo.answers import Asked, Asker, Questions, no_progress
from tita.demo.methods import (
    BASE,
    UNTRAINED,
    Condition,
    Method,
    best_of_method,
    contrastive_methods,
    guided_method,
    joint_method,
)
from tita.demo.rewards import RewardConfig
from tita.demo.steps import TrainedReward, hash_inputs, make_data, timed, train_reward
from tita.demo.tasks import Task
from tita.storage import Store
from tita.storage.manifest import build_manifest
from tita.terminal import Advance
from tita.vlm.loading import VLM, load_vlm

_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOutcome:
    """What one method gave on the test split, over seeds."""

    name: str
    passes: str
    baseline: str
    """As of a `Method`."""
    settings: tuple[str, ...]
    """The chosen condition of each seed."""
    validation: tuple[float, ...]
    """Its validation score of each seed."""
    scores: NDArray[np.float64]
    """[S, N]; S is 1 for a method that nothing was trained for."""
    details: Mapping[str, float | None]
    """Means over seeds of the task's further figures."""
    controls: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """Scores[S, N] of each control."""
    times_base: float = 0.0
    """Its time over the base's, on one machine, in batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOutcome:
    """All methods on one task."""

    task: Task
    seeds: tuple[int, ...]
    images: tuple[str, ...]
    """The image of each test question."""
    kinds: tuple[str, ...]
    """The kind of each test question."""
    methods: tuple[MethodOutcome, ...]
    size_ratio: float
    """Weights of the reward model over those of the base: r."""
    num_validation: int
    num_pairs: Mapping[str, int]
    """By name of the pairs."""

    def of_kind(self, kind: str) -> "TaskOutcome":
        """The same for the questions of one kind; `details` remain those of all questions."""
        chosen = np.array(self.kinds) == kind
        return replace(
            self,
            images=tuple(np.array(self.images)[chosen].tolist()),
            kinds=(kind,) * int(chosen.sum()),
            methods=tuple(
                replace(
                    method,
                    scores=method.scores[:, chosen],
                    controls={name: each[:, chosen] for name, each in method.controls.items()},
                )
                for method in self.methods
            ),
        )


@dataclass(slots=True)
class TaskRun:
    """One task: its data, base model and answers."""

    task: Task
    store: Store
    base: Path
    reward: Path
    data: str
    """Digest."""
    questions: Mapping[str, Questions]
    """By split."""
    base_vlm: VLM
    rewards: dict[str, VLM]
    """Those of the seed at work, and the one before DPO."""

    @classmethod
    def start(cls, task: Task, *, store: Store, folder: Path) -> "TaskRun":
        """Make data and models unless they are there."""
        with timed(f"{task.name}: data and models"):
            tree = f"data-{task.name}"
            data = make_data(task.make_scenes, scenes=task.scenes, seed=0, tree=tree, store=store)
            base, reward = task.models(folder / "models" / task.name)
        images = store.pull_tree(tree)
        questions = {
            split: Questions(
                items=list(read_questions(images / f"{split}.jsonl")), folder=images,
                max_new_tokens=task.max_new_tokens,
            )
            for split in ("validation", "test")
        }  # fmt: skip
        return cls(
            task, store, base, reward, data, questions, load_vlm(base),
            {UNTRAINED: load_vlm(reward)},
        )  # fmt: skip

    def asker(self, models: Sequence[str], *, advance: Advance) -> Asker:
        """Asks the base with the rewards of the seed at work.

        Args:
            models: digests of the reward models.
            advance: as of `Asker`.
        """
        own = [build_manifest(path).digest for path in (self.base, self.reward)]
        key = hash_inputs(self.task.name, self.data, own, list(models))
        return Asker(
            base=self.base_vlm, rewards=self.rewards, advance=advance, kept=self.store, key=key
        )

    def mean(self, split: str, asked: Asked) -> float:
        """The mean score of answers."""
        return float(self.scores(split, asked).mean())

    def scores(self, split: str, asked: Asked) -> NDArray[np.float64]:
        """The score[N] of every answer."""
        items = self.questions[split].items
        return np.array([self.task.score(each, asked.answers[each.id]) for each in items])


Configs: TypeAlias = Callable[[Task, Condition], Sequence[RewardConfig]]
"""Makes the reward models' recipes of a task and the contrast that is best on validation."""


def run_task(
    task: Task,
    configs: Configs,
    *,
    seeds: Sequence[int],
    store: Store,
    folder: Path,
    processes: int = 1,
) -> TaskOutcome:
    """Run all methods on one task.

    Args:
        task: the task.
        configs: makes the recipes of the reward models.
        seeds: of the trainings.
        store: where results are looked for and written.
        folder: for models of the task's own.
        processes: per training run.

    Raises:
        JobFailed: a job ended without its result.
    """
    run = TaskRun.start(task, store=store, folder=folder)
    found: dict[str, list[Chosen]] = {}
    asker = run.asker((), advance=no_progress)
    with timed(f"{task.name}: methods without training"):
        free = [BASE, *contrastive_methods()]
        for method in free:
            found[method.name] = [_ask(run, asker, method)]
    vcd = found["vcd"][0].condition
    teachers = [found[name][0] for name in ("vcd", "m3id")]
    rewards = configs(task, max(teachers, key=lambda each: each.validation).condition)
    methods: list[Method] = []
    num_pairs: dict[str, int] = {}
    for seed in seeds:
        trained = [
            train_reward(
                config, base=run.base, reward=run.reward, data=f"data-{task.name}", seed=seed,
                pairs_seed=0, store=store, processes=processes,
            )
            for config in rewards
        ]  # fmt: skip
        num_pairs = {each.name: _count_pairs(each, store=store) for each in trained}
        for each in trained:
            run.rewards[each.name] = load_vlm(each.model)
        asker = run.asker([each.run for each in trained], advance=no_progress)
        methods = methods_with_rewards([each.name for each in trained], vcd)
        with timed(f"{task.name}: answers, seed {seed}"):
            for method in methods:
                found.setdefault(method.name, []).append(_ask(run, asker, method))
    with timed(f"{task.name}: time of each method"):
        times = _times(run, asker, found)
    return TaskOutcome(
        task=task,
        seeds=tuple(seeds),
        images=tuple(str(each.image) for each in run.questions["test"].items),
        kinds=tuple(str(each.category) for each in run.questions["test"].items),
        methods=tuple(
            _outcome(run, each, found[each.name], times[each.name]) for each in [*free, *methods]
        ),
        size_ratio=run.rewards[UNTRAINED].model.num_parameters()
        / run.base_vlm.model.num_parameters(),
        num_validation=len(run.questions["validation"].items),
        num_pairs=num_pairs,
    )


def methods_with_rewards(names: Sequence[str], vcd: Condition) -> list[Method]:
    """The methods that use reward models.

    Args:
        names: of the reward models; best of n and contrast together are asked with the last one.
        vcd: the chosen way of contrast, whose noise is that of contrast beside a reward.
    """
    last, step = names[-1], vcd.guidance.noise_step
    guided = [guided_method(name) for name in names]
    return [best_of_method(last), *guided, joint_method(last, noise_step=step)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One method with one seed: its chosen way, and the answers on the test split."""

    condition: Condition
    validation: float
    test: Asked
    controls: Mapping[str, Asked]


def _ask(run: TaskRun, asker: Asker, method: Method) -> Chosen:
    """Choose on validation, then ask the test split."""
    validation = {
        way.name: run.mean(
            "validation", asker.ask(run.questions["validation"], way, split="validation")
        )
        for way in method.ways
    }
    way = method.choose(lambda each: validation[each.name])
    test = run.questions["test"]
    controls = {name: make(way) for name, make in method.controls.items()}
    return Chosen(
        condition=way,
        validation=validation[way.name],
        test=asker.ask(test, way, split="test"),
        controls={name: asker.ask(test, each, split="test") for name, each in controls.items()},
    )


def _outcome(
    run: TaskRun, method: Method, chosen: Sequence[Chosen], times_base: float
) -> MethodOutcome:
    items = run.questions["test"].items
    details = [run.task.details(items, each.test.answers) for each in chosen]
    return MethodOutcome(
        name=method.name,
        passes=method.passes,
        baseline=method.baseline,
        settings=tuple(each.condition.name for each in chosen),
        validation=tuple(each.validation for each in chosen),
        scores=np.stack([run.scores("test", each.test) for each in chosen]),
        details={name: _mean([each[name] for each in details]) for name in details[0]},
        controls={
            name: np.stack([run.scores("test", each.controls[name]) for each in chosen])
            for name in chosen[0].controls
        },
        times_base=times_base,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _times(run: TaskRun, asker: Asker, found: Mapping[str, Sequence[Chosen]]) -> dict[str, float]:
    """The time of each method over the base's, with the models of the last seed."""
    names = list(found)
    key = hash_inputs([found[name][-1].condition.name for name in names], asker.key)
    path = f"times/{key}.json"
    if next(iter(run.store.list(path)), None) is not None:
        kept: dict[str, float] = json.loads(run.store.get(path))
        return kept
    conditions = [found[name][-1].condition for name in names]
    seconds = asker.seconds(run.questions["test"], conditions, rounds=_ROUNDS)
    times = {name: each / seconds[0] for name, each in zip(names, seconds, strict=True)}
    run.store.put(path, json.dumps(times).encode())
    return times


def _count_pairs(trained: TrainedReward, *, store: Store) -> int:
    lines = (store.pull_tree(f"pairs/{trained.pairs}") / "pairs.jsonl").read_text().splitlines()
    return len(lines)
