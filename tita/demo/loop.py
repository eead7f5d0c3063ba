"""Runs the demo: data, pairs, DPO, answers, report.

Pairs and DPO are the ordinary jobs; only data and models are small. A second run reuses the results
of jobs.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tita import __version__
from tita.data import read_questions
from tita.demo.answers import Asked, Asker, Questions, no_progress
from tita.demo.demo_report import (
    method_table,
    summary_sentences,
    summary_table,
    to_json,
    write_page,
)
from tita.demo.experiment import ALONE, DemoResult, MethodAnswers, accuracy, analyse, sweep
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
from tita.demo.models import ROLES, demo_model_path
from tita.demo.rewards import PAIRS, TRAIN, contrast_config, noise_config
from tita.demo.scenes import Split, make_scenes
from tita.demo.steps import TrainedReward, make_data, timed, train_reward
from tita.storage import Store, open_store
from tita.storage.directory import DirectoryStore
from tita.storage.manifest import build_manifest
from tita.terminal import emit, progress, say
from tita.vlm.loading import load_vlm


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Number of scenes, with three questions each, by split, and the recipe of `train-dpo`."""

    scenes: Mapping[Split, int]
    train: Mapping[str, Any]
    processes: int = 2
    """Per job."""
    rounds: int = 3
    """In which the time of the methods is measured."""


FULL = DemoConfig(scenes={"train": 800, "validation": 200, "test": 400}, train=TRAIN)
QUICK = DemoConfig(
    scenes={"train": 100, "validation": 30, "test": 60},
    train={**TRAIN, "max_steps": 10},
    processes=1,
    rounds=1,
)


def run_demo(out: Path, *, config: DemoConfig, seed: int = 0) -> DemoResult:
    """Run all steps and write `report.json` and `report.html` to `out`.

    Args:
        out: folder for the store and the reports; finished steps in it are reused.
        config: size of the demo.
        seed: seed of data and training.

    Raises:
        TitaError: the folder cannot be written, or the input of a step is invalid.
        JobFailed: a job ended without its result.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    store = open_store(str(out / "store"))
    with timed("data"):
        data = make_data(
            lambda split, number: make_scenes(split, number=number, seed=seed),
            scenes=config.scenes, seed=seed, tree="data", store=store,
        )  # fmt: skip
    answers = _Answers.start(store)
    untrained = (BASE, *contrastive_methods())
    with timed("contrast"), answers.progress("contrast", untrained):
        free = [answers.choose(method) for method in untrained]
    trained = _train_rewards(config, answers.best_contrast(free), seed=seed, store=store)
    with timed("answers"):
        for each in trained:
            answers.asker.rewards[each.name] = load_vlm(str(each.model))
        result = _answer(answers, free, trained, rounds=config.rounds)
    facts = {**_facts(data, trained), "seed": seed, "seconds": round(time.monotonic() - started, 1)}
    result = dataclasses.replace(result, facts=facts)
    names = {"base": "base", "aligned": result.guided.name, "reward alone": ALONE}
    write_page(
        out / "report.html",
        result=result,
        questions=answers.test.items,
        images=answers.test.folder,
        answers={label: answers.swept[name].answers for label, name in names.items()},
    )
    DirectoryStore(out).put("report.json", to_json(result).encode())
    emit(summary_table(result))
    print("What it costs, what it brings:")
    emit(method_table(result))
    for sentence in summary_sentences(result):
        print(sentence)
    say(f"report: {out / 'report.html'}")
    return result


def _facts(data: str, trained: Sequence[TrainedReward]) -> dict[str, Any]:
    """What the result depends on."""
    models = {role: build_manifest(demo_model_path(role)).digest for role in ROLES}
    facts: dict[str, Any] = {"tita": __version__, "data": data, "models": models}
    for each in trained:
        facts |= {each.name: each.pairs, f"{each.name}, run": each.run}
    return facts


def _train_rewards(
    config: DemoConfig, teacher: Condition, *, seed: int, store: Store
) -> list[TrainedReward]:
    """A reward model on pairs of distorted images, and one on pairs of contrast."""
    return [
        train_reward(
            each, base=demo_model_path("base"), reward=demo_model_path("reward"), data="data",
            seed=seed, store=store, processes=config.processes,
        )
        for each in (
            noise_config(PAIRS, config.train), contrast_config(PAIRS, config.train, teacher)
        )
    ]  # fmt: skip


@dataclass(slots=True)
class _Answers:
    """Asks both splits, each condition once."""

    asker: Asker
    validation: Questions
    test: Questions
    scores: dict[str, float]
    """On validation, by condition."""
    swept: dict[str, Asked]
    """On test, by condition of `sweep`."""

    @classmethod
    def start(cls, store: Store) -> "_Answers":
        images = store.pull_tree("data")
        validation, test = (
            Questions(items=list(read_questions(images / f"{split}.jsonl")), folder=images)
            for split in ("validation", "test")
        )
        base = load_vlm(str(demo_model_path("base")), store=store)
        untrained = load_vlm(str(demo_model_path("reward")), store=store)
        asker = Asker(base=base, rewards={UNTRAINED: untrained}, advance=no_progress)
        return cls(asker, validation, test, {}, {})

    @contextmanager
    def progress(
        self, label: str, methods: Sequence[Method], conditions: Sequence[Condition] = ()
    ) -> Iterator[None]:
        """Show progress until these methods are chosen, and the test split is asked so."""
        total = (len(methods) + len(conditions)) * len(self.test.items)
        for each in methods:
            total += len(each.ways) * len(self.validation.items)
            total += len(each.controls) * len(self.test.items)
        with progress(label, total=total) as self.asker.advance:
            yield
        self.asker.advance = no_progress

    def best_contrast(self, free: Sequence[MethodAnswers]) -> Condition:
        """The contrast with the best validation score."""
        contrasts = [each.chosen for each in free if each.method is not BASE]
        return max(contrasts, key=lambda each: self.scores[each.name])

    def choose(self, method: Method) -> MethodAnswers:
        """Choose a way on validation, and ask the test split so, with the controls."""
        for way in method.ways:
            asked = self.asker.ask(self.validation, way, split="validation")
            self.scores[way.name] = accuracy(self.validation.items, asked.answers)
        chosen = method.choose(lambda way: self.scores[way.name])
        return MethodAnswers(
            method=method,
            chosen=chosen,
            test=self.asker.ask(self.test, chosen, split="test"),
            controls={
                name: self.asker.ask(self.test, make(chosen), split="test")
                for name, make in method.controls.items()
            },
        )


def _answer(
    answers: _Answers,
    free: Sequence[MethodAnswers],
    trained: Sequence[TrainedReward],
    *,
    rounds: int,
) -> DemoResult:
    """Answers of all methods, and of the best reward model at all weights."""
    guiding = [guided_method(each.name) for each in trained]
    vcd = next(each.chosen for each in free if each.method.name == "vcd")
    # Of equal sizes for all reward models.
    others: list[Callable[[str], Method]] = [
        best_of_method,
        partial(joint_method, noise_step=vcd.guidance.noise_step),
    ]
    first = trained[0].name
    with answers.progress("answers", [*guiding, *(make(first) for make in others)], sweep(first)):
        guided = [answers.choose(method) for method in guiding]
        best = max(guided, key=lambda each: answers.scores[each.chosen.name]).chosen
        best_of, joint = (answers.choose(make(best.reward)) for make in others)
        for condition in sweep(best.reward):
            asked = answers.asker.ask(answers.test, condition, split="test")
            answers.swept[condition.name] = asked
    methods = [*free, best_of, *guided, joint]
    chosen = [each.chosen for each in methods]
    seconds = answers.asker.seconds(answers.test, chosen, rounds=rounds)
    timed_methods = [
        dataclasses.replace(each, times_base=spent / seconds[0])
        for each, spent in zip(methods, seconds, strict=True)
    ]
    return analyse(
        answers.swept,
        timed_methods,
        answers.test.items,
        chosen=best,
        validation=answers.scores,
    )
