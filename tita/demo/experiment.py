"""The demo's experiment: answers under several conditions, their scores, and paired comparisons.

Accuracy is exact match after EvalAI's normalisation. Yes/no questions also get POPE's scores (arXiv
2305.10355): saying no more often can raise F1 without looking at the image, and the share of yes
among the answers shows that. All functions but `ask` are pure functions of questions and answers.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from scipy.stats import false_discovery_control

from tita.align import Engine, Guidance, Request, Sampling
from tita.align.forms import FORMS
from tita.bench.metrics import exact_match, parse_yes_no, pope_scores
from tita.bench.significance import bootstrap_difference, mcnemar_exact, outcomes
from tita.records import Question
from tita.terminal import Advance
from tita.vlm.images import open_image

T = TypeVar("T")

Answers = Mapping[str, str]
"""Answers by question id."""

WEIGHTS = (0.0, 0.1, 0.3, 0.5, 1.0)
"""The guidance weights that are compared: 0 is the base model alone, 1 the reward model alone."""
SIGNIFICANCE = 0.01
_BATCH_SIZE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One way to answer the questions."""

    name: str
    weight: float
    model: Literal["trained", "untrained", "reward alone"] = "trained"
    """The reward model that guides the base; with `reward alone`, it answers by itself."""
    shuffled: bool = False
    """Whether the reward model sees images of other questions."""
    form: str = "tita"
    best_of: int = 1
    """Sample this number of answers at temperature 1; the reward model chooses."""

    @property
    def is_guided(self) -> bool:
        """Whether this is guidance by the trained model, not a control; weight 0 is included."""
        return self.model == "trained" and not self.shuffled


CONDITIONS = (
    Condition(name="base", weight=0.0),
    *(Condition(name=f"guided, w = {weight:g}", weight=weight) for weight in WEIGHTS[1:]),
    Condition(name="reward model alone", weight=1.0, model="reward alone"),
    *(
        Condition(name=f"other images, w = {weight:g}", weight=weight, shuffled=True)
        for weight in WEIGHTS[1:]
    ),
    *(
        Condition(name=f"no DPO, w = {weight:g}", weight=weight, model="untrained")
        for weight in WEIGHTS[1:]
    ),
)
"""The conditions on the test split; at weight 0, the reward model makes no difference."""

BASELINES = (
    Condition(name="vcd", weight=FORMS["vcd"].weight, form="vcd"),
    Condition(name="m3id", weight=FORMS["m3id"].weight, form="m3id"),
    Condition(name="best of 4", weight=0.0, best_of=4),
)
"""The methods that papers compare with, as they define them: no weight is chosen here."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The answers of one condition."""

    answers: dict[str, str]
    seconds: float
    """In the engine, with the preparation of prompts: of the processor, or of a GPU."""


def ask(
    engine: Engine,
    questions: Sequence[Question],
    *,
    images: Path,
    condition: Condition,
    advance: Advance,
) -> Asked:
    """Return greedy answers by question id, and the time that they took.

    Args:
        engine: an engine with the models of `condition.model`.
        questions: questions with images below `images`.
        images: the image folder.
        condition: how to answer.
        advance: called with the number of new answers.
    """
    opened = [open_image(images / str(question.image)) for question in questions]
    reward_images = [(image,) for image in _derange(opened)]
    requests = [
        Request(
            question=question.text,
            images=(opened[index],),
            reward_images=reward_images[index] if condition.shuffled else None,
            guidance=Guidance.of(form=condition.form, weight=condition.weight),
            sampling=Sampling(max_new_tokens=8, temperature=float(condition.best_of > 1)),
        )
        for index, question in enumerate(questions)
    ]
    answers: dict[str, str] = {}
    # Other processes must not count. On a GPU, the processor only waits.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    for start in range(0, len(questions), _BATCH_SIZE):
        batch = slice(start, start + _BATCH_SIZE)
        outputs = (
            engine.best_of(requests[batch], condition.best_of)
            if condition.best_of > 1
            else engine.generate(requests[batch])
        )
        for question, output in zip(questions[batch], outputs, strict=True):
            answers[question.id] = output.text.strip()
        advance(len(outputs), note=condition.name)
    return Asked(answers, clock() - began)


def _derange(items: Sequence[T]) -> list[T]:
    """A permutation of the items that leaves none in its place (Sattolo 1986)."""
    order = list(items)
    generator = random.Random(0)
    for last in range(len(order) - 1, 0, -1):
        other = generator.randrange(last)
        order[last], order[other] = order[other], order[last]
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryScore:
    """Scores of one kind of question; the yes/no scores are None for other kinds."""

    num_questions: int
    accuracy: float
    f1: float | None = None
    yes_ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionScores:
    """Scores of one condition on the test split."""

    name: str
    weight: float | None
    """Guidance weight; None without guidance."""
    accuracy: float
    categories: Mapping[str, CategoryScore]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """`b` against `a` on the same questions; differences are fractions of all questions."""

    a: str
    b: str
    difference: float
    low: float
    high: float
    """`low` and `high` are the 95 % bootstrap interval."""
    wins: int
    losses: int
    p_value: float
    """McNemar's exact test, two-sided."""

    @property
    def significant(self) -> bool:
        return self.p_value < SIGNIFICANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Comparisons on the test split, at a weight chosen on the validation split."""

    weight: float
    against_base: PairedComparison
    against_reward: PairedComparison
    shuffled: PairedComparison
    """The base against guidance by a reward model that sees images of other questions."""
    untrained: PairedComparison
    """The base against guidance by the reward model before DPO."""

    @property
    def checks(self) -> dict[str, bool]:
        """The success criteria."""
        gain = self.against_base.difference
        return {
            "beats the base": gain > 0 and self.against_base.significant,
            "beats the reward model alone": self.against_reward.difference > 0,
            "loses more than half its gain on shuffled images": (
                gain > 0 and self.shuffled.difference < gain / 2
            ),
            "gains nothing without DPO": not (
                self.untrained.difference > 0 and self.untrained.significant
            ),
        }

    @property
    def reached(self) -> bool:
        return all(self.checks.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCost:
    """What a method brings on the test split, and what it costs."""

    name: str
    accuracy: float
    times_base: float
    """Its time over the base's, on one machine, in batches."""
    against_base: PairedComparison | None
    """None for the base itself."""
    corrected_p: float | None
    """The comparison's p-value, corrected for the number of methods (Benjamini-Hochberg 1995)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """The demo's result, as in `report.json`."""

    rows: Sequence[ConditionScores]
    validation: Mapping[float, float]
    """Accuracy on the validation split by weight."""
    verdict: Findings
    methods: Sequence[MethodCost]
    """The base, the baselines of papers, and guidance at the chosen weight."""
    num_questions: int
    facts: Mapping[str, Any]
    """Versions, seeds, digests and durations."""

    @property
    def guided(self) -> ConditionScores:
        """The scores of guidance at the chosen weight."""
        rows = [row for row in self.rows if row.name.startswith("guided")]
        return next(row for row in rows if row.weight == self.verdict.weight)


def analyse(
    asked: Mapping[tuple[str, str], Asked],
    questions: Mapping[str, Sequence[Question]],
    *,
    facts: Mapping[str, Any],
) -> DemoResult:
    """Choose the weight on the validation split, then score and compare on the test split.

    Args:
        asked: answers by split and condition name.
        questions: questions by split.
        facts: see `DemoResult`.
    """
    answers = {key: each.answers for key, each in asked.items()}
    validation = {
        condition.weight: answers["validation", condition.name]
        for condition in CONDITIONS
        if condition.is_guided
    }
    weight = choose_weight(questions["validation"], validation)
    test = questions["test"]

    def compare_on_test(a: str, b: str) -> PairedComparison:
        return compare(test, a=(a, answers["test", a]), b=(b, answers["test", b]))

    return DemoResult(
        rows=[
            ConditionScores(
                name=condition.name,
                weight=None if condition.model == "reward alone" else condition.weight,
                accuracy=accuracy(test, answers["test", condition.name]),
                categories=by_category(test, answers["test", condition.name]),
            )
            for condition in CONDITIONS
        ],
        validation={w: accuracy(questions["validation"], a) for w, a in validation.items()},
        verdict=Findings(
            weight=weight,
            against_base=compare_on_test("base", f"guided, w = {weight:g}"),
            against_reward=compare_on_test("reward model alone", f"guided, w = {weight:g}"),
            shuffled=compare_on_test("base", f"other images, w = {weight:g}"),
            untrained=compare_on_test("base", f"no DPO, w = {weight:g}"),
        ),
        methods=_methods(asked, test, chosen=f"guided, w = {weight:g}"),
        num_questions=len(test),
        facts=facts,
    )


def _methods(
    asked: Mapping[tuple[str, str], Asked], test: Sequence[Question], *, chosen: str
) -> list[MethodCost]:
    """The base, the baselines, and guidance, on the test split."""
    names = [*(condition.name for condition in BASELINES), chosen]
    base = asked["test", "base"]
    compared = [
        compare(test, a=("base", base.answers), b=(name, asked["test", name].answers))
        for name in names
    ]
    corrected = false_discovery_control([each.p_value for each in compared])
    alone = MethodCost(
        name="base", accuracy=accuracy(test, base.answers), times_base=1.0, against_base=None,
        corrected_p=None,
    )  # fmt: skip
    return [alone] + [
        MethodCost(
            name=name,
            accuracy=accuracy(test, asked["test", name].answers),
            times_base=asked["test", name].seconds / base.seconds,
            against_base=comparison,
            corrected_p=float(p_value),
        )
        for name, comparison, p_value in zip(names, compared, corrected, strict=True)
    ]


def scores(questions: Sequence[Question], answers: Answers) -> list[float]:
    """Return 1.0 or 0.0 for each question, in order."""
    return [exact_match(answers[question.id], question.references) for question in questions]


def accuracy(questions: Sequence[Question], answers: Answers) -> float:
    """Return the fraction of correct answers."""
    correct = scores(questions, answers)
    return sum(correct) / len(correct)


def by_category(questions: Sequence[Question], answers: Answers) -> dict[str, CategoryScore]:
    """Return the scores of each kind of question, in alphabetical order."""
    found = {}
    for kind in sorted({question.category or "other" for question in questions}):
        own = [question for question in questions if (question.category or "other") == kind]
        labels = [parse_yes_no(question.references[0]) for question in own]
        known = [label for label in labels if label is not None]
        score = CategoryScore(num_questions=len(own), accuracy=accuracy(own, answers))
        if len(known) == len(labels):
            pope = pope_scores([parse_yes_no(answers[question.id]) for question in own], known)
            score = replace(score, f1=pope.f1, yes_ratio=pope.yes_ratio)
        found[kind] = score
    return found


def choose_weight(questions: Sequence[Question], answers: Mapping[float, Answers]) -> float:
    """Return the weight between 0 and 1 with the highest accuracy, the smallest of equals."""
    guided = sorted(weight for weight in answers if 0 < weight < 1)
    return max(guided, key=lambda weight: (accuracy(questions, answers[weight]), -weight))


def compare(
    questions: Sequence[Question], *, a: tuple[str, Answers], b: tuple[str, Answers]
) -> PairedComparison:
    """Compare `b` with `a`, each a name and its answers."""
    left, right = scores(questions, a[1]), scores(questions, b[1])
    interval = bootstrap_difference(left, right)
    counts = outcomes(left, right)
    return PairedComparison(
        a=a[0],
        b=b[0],
        difference=interval.mean,
        low=interval.low,
        high=interval.high,
        wins=counts.wins,
        losses=counts.losses,
        p_value=mcnemar_exact(counts.losses, counts.wins),
    )
