"""The demo: data, pairs, DPO, answers, report, each step reused where its inputs are the same."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tita.data import read_questions
from tita.demo.answers import Condition, ask, conditions
from tita.demo.models import demo_model_path
from tita.demo.plan import WEIGHTS, Plan
from tita.demo.present import Result, Row, as_json, sentences, table, write_page
from tita.demo.steps import Trained, timed, train_reward
from tita.demo.verdict import Answers, Verdict, accuracy, by_category, choose_weight, compare
from tita.records import Question
from tita.storage import Store, open_store
from tita.storage.directory import DirectoryStore
from tita.terminal import emit, progress, say


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
    from tita.vlm import load_vlm

    base = load_vlm(str(demo_model_path("base")), store=store)
    reward = load_vlm(str(trained.reward), store=store)
    untrained = load_vlm(str(demo_model_path("reward")), store=store)
    return {
        "trained": Engine(base, reward),
        "untrained": Engine(base, untrained),
        "reward alone": Engine(reward, reward),
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
