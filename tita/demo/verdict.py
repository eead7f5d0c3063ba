"""What the answers show: scores per condition, a weight chosen on validation, paired comparisons.

Everything here is a pure function of questions and answers. Accuracy is exact match after EvalAI's
normalisation; yes/no questions also get POPE's scores (arXiv 2305.10355), because a gain in F1 can
come from saying no more often without looking; the share of yes among the answers shows that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tita.bench.metrics import (
    bootstrap_difference,
    exact_match,
    mcnemar_exact,
    outcomes,
    parse_yes_no,
    pope_scores,
)
from tita.records import Question

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
