"""Asking the models: the same questions under every condition that the demo compares."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from tita.bench.metrics import exact_match, parse_yes_no, pope_scores
from tita.bench.significance import bootstrap_difference, mcnemar_exact, outcomes
from tita.records import Question
from tita.terminal import Advance

if TYPE_CHECKING:
    from tita.align import Engine, Request


T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One way of answering."""

    name: str
    weight: float
    model: Literal["trained", "untrained", "reward alone"] = "trained"
    """Which reward model guides, or that it answers by itself."""
    shuffled: bool = False
    """Whether the reward model sees the images of other questions."""


def conditions(weights: Sequence[float]) -> list[Condition]:
    """All conditions of the test split; weight 0 is the base alone, whatever guides it."""
    guided = [weight for weight in weights if weight > 0]
    return [
        Condition(name="base", weight=0.0),
        *(Condition(name=f"guided, w = {weight:g}", weight=weight) for weight in guided),
        Condition(name="reward model alone", weight=1.0, model="reward alone"),
        *(
            Condition(name=f"other images, w = {weight:g}", weight=weight, shuffled=True)
            for weight in guided
        ),
        *(
            Condition(name=f"no DPO, w = {weight:g}", weight=weight, model="untrained")
            for weight in guided
        ),
    ]


def ask(
    engine: "Engine",
    questions: Sequence[Question],
    *,
    images: Path,
    condition: Condition,
    advance: Advance,
    batch_size: int = 128,
    seed: int = 0,
) -> dict[str, str]:
    """Greedy answers by question id.

    Args:
        engine: holds the models that `condition.model` names.
        questions: each with an image below `images`.
        condition: how to answer.
        advance: called with the number of answers that came.
        batch_size: questions in one batch.
        seed: of the order in which images are shuffled.
    """
    requests = _requests(questions, images=images, condition=condition, seed=seed)
    answers: dict[str, str] = {}
    for start in range(0, len(questions), batch_size):
        batch = slice(start, start + batch_size)
        for question, answer in zip(
            questions[batch], engine.generate(requests[batch]), strict=True
        ):
            answers[question.id] = answer.text.strip()
        advance(len(questions[batch]), note=condition.name)
    return answers


def _requests(
    questions: Sequence[Question], *, images: Path, condition: Condition, seed: int
) -> "list[Request]":
    from tita.align import Guidance, Request, Sampling
    from tita.vlm import open_image

    opened = [open_image(images / str(question.image)) for question in questions]
    others = _deranged(opened, seed=seed) if condition.shuffled else None
    return [
        Request(
            question=question.text,
            images=(opened[index],),
            reward_images=None if others is None else (others[index],),
            guidance=Guidance(weight=condition.weight),
            sampling=Sampling(max_new_tokens=8),
        )
        for index, question in enumerate(questions)
    ]


def _deranged(items: Sequence[T], *, seed: int) -> list[T]:
    """The items in an order in which none stands where it stood (Sattolo 1986)."""
    order = list(items)
    generator = random.Random(seed)
    for last in range(len(order) - 1, 0, -1):
        other = generator.randrange(last)
        order[last], order[other] = order[other], order[last]
    return order


Answers = Mapping[str, str]
"""Answer by question id."""

SIGNIFICANCE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryScore:
    """Scores of one kind of question; the yes/no scores are None for the other kinds."""

    num_questions: int
    accuracy: float
    f1: float | None = None
    yes_ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`b` against `a` on the same questions; differences are fractions of all questions."""

    a: str
    b: str
    difference: float
    low: float
    high: float
    """Bounds of the 95 % bootstrap interval."""
    wins: int
    losses: int
    p_value: float
    """McNemar's exact test, two-sided."""

    @property
    def significant(self) -> bool:
        return self.p_value < SIGNIFICANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether guidance did what it claims, on the test split, at a weight chosen elsewhere."""

    weight: float
    against_base: Comparison
    against_reward: Comparison
    shuffled: Comparison
    """Base against guidance by a reward model that sees other questions' images."""
    untrained: Comparison
    """Base against guidance by the reward model before DPO."""

    @property
    def checks(self) -> dict[str, bool]:
        """The bar, line by line."""
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


def scores(questions: Sequence[Question], answers: Answers) -> list[float]:
    """1.0 or 0.0 for each question, in their order."""
    return [exact_match(answers[question.id], question.references) for question in questions]


def accuracy(questions: Sequence[Question], answers: Answers) -> float:
    """Share of questions answered right."""
    right = scores(questions, answers)
    return sum(right) / len(right)


def by_category(questions: Sequence[Question], answers: Answers) -> dict[str, CategoryScore]:
    """Scores of each kind of question, kinds in alphabetical order."""
    kinds = sorted({question.category or "other" for question in questions})
    return {
        kind: _category_score([q for q in questions if (q.category or "other") == kind], answers)
        for kind in kinds
    }


def _category_score(questions: Sequence[Question], answers: Answers) -> CategoryScore:
    labels = [parse_yes_no(question.references[0]) for question in questions]
    known = [label for label in labels if label is not None]
    share = accuracy(questions, answers)
    if len(known) < len(labels):
        return CategoryScore(num_questions=len(questions), accuracy=share)
    pope = pope_scores([parse_yes_no(answers[question.id]) for question in questions], known)
    return CategoryScore(
        num_questions=len(questions), accuracy=share, f1=pope.f1, yes_ratio=pope.yes_ratio
    )


def choose_weight(questions: Sequence[Question], answers: Mapping[float, Answers]) -> float:
    """The guided weight, neither 0 nor 1, with the highest accuracy; the smaller one of equals."""
    guided = sorted(weight for weight in answers if 0 < weight < 1)
    return max(guided, key=lambda weight: (accuracy(questions, answers[weight]), -weight))


def compare(
    questions: Sequence[Question], *, a: tuple[str, Answers], b: tuple[str, Answers]
) -> Comparison:
    """`b` against `a`, each a name with its answers."""
    left, right = scores(questions, a[1]), scores(questions, b[1])
    interval = bootstrap_difference(left, right)
    counts = outcomes(left, right)
    return Comparison(
        a=a[0],
        b=b[0],
        difference=interval.mean,
        low=interval.low,
        high=interval.high,
        wins=counts.wins,
        losses=counts.losses,
        p_value=mcnemar_exact(counts.losses, counts.wins),
    )
