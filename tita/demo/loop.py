"""How much the demo does, and with which hyperparameters."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tita import __version__
from tita.data import read_questions
from tita.demo.demo_report import Result, Row, as_json, sentences, table, write_page
from tita.demo.experiment import (
    Answers,
    Condition,
    Verdict,
    accuracy,
    ask,
    by_category,
    choose_weight,
    compare,
    conditions,
)
from tita.demo.models import demo_model_path
from tita.demo.scenes import Split, make_scenes, write_scenes
from tita.errors import ExitCode, JobFailed
from tita.launch.local import run_local
from tita.records import Question
from tita.storage import Store, open_store
from tita.storage.directory import DirectoryStore
from tita.storage.manifest import describe
from tita.terminal import emit, progress, say

WEIGHTS = (0.0, 0.1, 0.3, 0.5, 1.0)
"""Guidance weights that are compared; 0 is the base alone, 1 the reward model alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much the demo does; three questions a scene."""

    num_train: int
    num_validation: int
    num_test: int
    pairs: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


# SeVa's noise is mild: it leaves the big, bright digits of 32 pixels readable.
_PAIRS = {"dtype": "float32", "max_new_tokens": 8, "batch_size": 128, "noise": "ddpm"}
_TRAIN = {
    "dtype": "float32",
    "gradient_checkpointing": False,
    "freeze_vision": False,
    "learning_rate": 5e-4,
    "epochs": 2,
    "batch_size": 8,
    "max_length": 64,
}
FULL = Plan(num_train=800, num_validation=200, num_test=400, pairs=_PAIRS, train=_TRAIN)
QUICK = Plan(
    num_train=100, num_validation=30, num_test=60, pairs=_PAIRS, train={**_TRAIN, "max_steps": 10}
)


T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What the first steps leave for the last ones."""

    images: Path
    run: str
    reward: Path
    facts: dict[str, Any]


def train_reward(plan: Plan, *, store: Store, seed: int) -> Trained:
    """Draw the data, build pairs with the base model, train the reward model on them."""
    base, reward = demo_model_path("base"), demo_model_path("reward")
    data = timed("data", lambda: _data(plan, store=store, seed=seed))
    models = {"base": describe(base).digest, "reward": describe(reward).digest}
    pairs_recipe = dict(plan.pairs) | {
        "model": str(base),
        "questions": "data/train.jsonl",
        "images": "data",
        "seed": seed,
    }
    pairs = f"demo-pairs-{_key(data, models['base'], plan.pairs, seed)}"
    timed("pairs", lambda: _job("build-pairs", recipe=pairs_recipe, run=pairs, store=store))
    train_recipe = dict(plan.train) | {
        "model": str(reward),
        "pairs": f"pairs/{pairs}/pairs.jsonl",
        "images": "data",
        "seed": seed,
    }
    run = f"demo-reward-{_key(pairs, models['reward'], plan.train, seed)}"
    timed("DPO", lambda: _job("train-dpo", recipe=train_recipe, run=run, store=store))
    facts = {"tita": __version__, "data": data, "models": models, "pairs": pairs, "run": run}
    return Trained(
        images=store.pull_tree("data"),
        run=run,
        reward=store.pull_tree(f"runs/{run}") / "model",
        facts=facts,
    )


def timed(name: str, work: Callable[[], T]) -> T:
    """Do one step of the demo, saying when it begins and how long it took."""
    say(f"== {name}")
    started = time.monotonic()
    result = work()
    say(f"== {name}: {time.monotonic() - started:.1f} s")
    return result


def _key(*parts: Any) -> str:
    """Eight hex digits that stand for everything that goes into a step."""
    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _data(plan: Plan, *, store: Store, seed: int) -> str:
    """The digest of the data in the store, drawn anew if it is not what `plan` asks for."""
    numbers: dict[Split, int] = {
        "train": plan.num_train,
        "validation": plan.num_validation,
        "test": plan.num_test,
    }
    wanted = {"scenes": dict(numbers), "seed": seed, "tita": __version__}
    there = store.read_manifest("data")
    if there is not None and dict(there.meta) == wanted:
        say("data: there already")
        return there.digest
    folder = Path(tempfile.mkdtemp(prefix="tita-demo-"))
    try:
        with progress("scenes", total=sum(numbers.values())) as advance:
            for split, number in numbers.items():
                write_scenes(folder, make_scenes(split, number=number, seed=seed), name=split)
                advance(number)
        return store.push_tree(folder, "data", meta=wanted).digest
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _job(job: str, *, recipe: Mapping[str, Any], run: str, store: Store) -> None:
    folder = {"build-pairs": "pairs", "train-dpo": "runs"}[job]
    if store.read_manifest(f"{folder}/{run}") is not None:
        say(f"{job}: {folder}/{run} is there already")
        return
    code = run_local(
        job, recipe=recipe, run=run, store=store.uri, procs_per_node=2, on_line=_pass_on
    )
    if code:
        raise _failed(job, code)


def _failed(job: str, code: int) -> JobFailed:
    error = JobFailed(f"{job} ended with exit code {code}", remedy="the lines above say why")
    error.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.FAILED
    return error


def _pass_on(rank: int, line: str) -> None:
    """A job's output for people: progress in words, all else as it came."""
    try:
        told = json.loads(line)["progress"]
    except (ValueError, KeyError, TypeError):
        say(f"  {line}")
        return
    say(
        f"  step {told['step']}/{told['steps']}: loss {told['loss']:.3f}, "
        f"margin {told['reward_margin']:.2f}, accuracy {told['reward_accuracy']:.2f}, "
        f"{told['samples_per_s']:.0f} pairs/s, {told['seconds_left']:.0f} s left"
    )


def run_demo(out: Path, *, plan: Plan, seed: int = 0) -> Result:
    """Go round the loop and write `report.json` and `report.html` into `out`.

    Args:
        out: folder for the store and the reports; steps found done in it are not done again.
        plan: how much to do.
        seed: of data and training.

    Raises:
        TitaError: the folder cannot be written, or a step was given something unfit.
        JobFailed: a step ended without its result.
    """
    # Several threads make the small matrices of these models slower, by a factor on a busy machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    store = open_store(str(out / "store"))
    trained = train_reward(plan, store=store, seed=seed)
    answers, questions = timed("answers", lambda: _answer(trained, store=store))
    facts = trained.facts | {"seed": seed, "seconds": round(time.monotonic() - started, 1)}
    result = _judge(answers, questions, facts=facts)
    _report(out, result=result, trained=trained, answers=answers, questions=questions["test"])
    return result


def _answer(
    trained: Trained, *, store: Store
) -> tuple[dict[tuple[str, str], Answers], dict[str, list[Question]]]:
    """Answers by (split, condition): all conditions on `test`, guidance alone on `validation`."""
    questions = {
        split: list(read_questions(trained.images / f"{split}.jsonl"))
        for split in ("validation", "test")
    }
    engines = _engines(trained, store=store)
    every = conditions(WEIGHTS)
    plain = [c for c in every if c.model == "trained" and not c.shuffled]
    asked = [("validation", c) for c in plain] + [("test", c) for c in every]
    total = sum(len(questions[split]) for split, _ in asked)
    answers: dict[tuple[str, str], Answers] = {}
    with progress("answers", total=total) as advance:
        for split, condition in asked:
            answers[split, condition.name] = ask(
                engines[condition.model],
                questions[split],
                images=trained.images,
                condition=condition,
                advance=advance,
            )
    return answers, questions


def _engines(trained: Trained, *, store: Store) -> dict[str, Any]:
    from tita.align import Engine
    from tita.vlm import Models, load_vlm

    base = load_vlm(str(demo_model_path("base")), store=store)
    reward = load_vlm(str(trained.reward), store=store)
    untrained = load_vlm(str(demo_model_path("reward")), store=store)
    return {
        "trained": Engine(Models(base, reward)),
        "untrained": Engine(Models(base, untrained)),
        "reward alone": Engine(Models(reward, reward)),
    }


def _judge(
    answers: Mapping[tuple[str, str], Answers],
    questions: Mapping[str, Sequence[Question]],
    *,
    facts: dict[str, Any],
) -> Result:
    every = conditions(WEIGHTS)
    plain = {c.weight: c.name for c in every if c.model == "trained" and not c.shuffled}
    validation = {weight: answers["validation", name] for weight, name in plain.items()}
    weight = choose_weight(questions["validation"], validation)
    test = questions["test"]

    def named(condition: Condition) -> tuple[str, Answers]:
        return condition.name, answers["test", condition.name]

    at = {(c.model, c.shuffled): c for c in every if c.weight == weight}
    base = named(every[0])
    guided = named(at["trained", False])
    alone = named(next(c for c in every if c.model == "reward alone"))
    verdict = Verdict(
        weight=weight,
        against_base=compare(test, a=base, b=guided),
        against_reward=compare(test, a=alone, b=guided),
        shuffled=compare(test, a=base, b=named(at["trained", True])),
        untrained=compare(test, a=base, b=named(at["untrained", False])),
    )
    rows = [
        Row(
            name=condition.name,
            weight=None if condition.model == "reward alone" else condition.weight,
            accuracy=accuracy(test, answers["test", condition.name]),
            categories=by_category(test, answers["test", condition.name]),
        )
        for condition in every
    ]
    return Result(
        rows=rows,
        validation={w: accuracy(questions["validation"], a) for w, a in validation.items()},
        verdict=verdict,
        num_questions=len(test),
        facts=facts,
    )


def _report(
    out: Path,
    *,
    result: Result,
    trained: Trained,
    answers: Mapping[tuple[str, str], Answers],
    questions: Sequence[Question],
) -> None:
    guided = next(
        row.name
        for row in result.rows
        if row.weight == result.verdict.weight and row.name.startswith("guided")
    )
    write_page(
        out / "report.html",
        result=result,
        questions=questions,
        images=trained.images,
        base=answers["test", "base"],
        aligned=answers["test", guided],
        reward=answers["test", "reward model alone"],
    )
    DirectoryStore(out).put("report.json", as_json(result).encode())
    emit(table(result))
    for sentence in sentences(result.verdict):
        print(sentence)
    say(f"report: {out / 'report.html'}")
