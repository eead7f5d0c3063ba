"""The demo's experiment: scores of the answers under all conditions, and paired comparisons.

Accuracy is exact match after EvalAI's normalisation. Yes/no questions also get POPE's scores (arXiv
2305.10355): saying no more often can raise F1 without looking at the image, and the share of yes
among the answers shows that. All functions are pure functions of questions and answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tita.align import Guidance
from tita.bench.metrics import exact_match, parse_yes_no, pope_scores
from tita.bench.significance import bootstrap_difference, holm, mcnemar_exact, outcomes
from tita.demo.answers import Asked
from tita.demo.methods import UNTRAINED, WEIGHTS, Condition, Method
from tita.records import Question

Answers = Mapping[str, str]
"""Answers by question id."""

SIGNIFICANCE = 0.01
ALONE = "reward model alone"


def guided(weight: float, *, reward: str) -> Condition:
    """Guidance by a trained reward model, as in the plot by weight."""
    return Condition(
        name=f"guided, w = {weight:g}", guidance=Guidance(weight=weight), reward=reward
    )


def sweep(reward: str) -> tuple[Condition, ...]:
    """One reward model at all weights, with its controls; 0 is the base alone, 1 the reward alone.

    At weight 0 the reward model makes no difference.
    """
    found = [Condition(name="base"), Condition(name=ALONE, reward=reward, alone=True)]
    for weight in (*WEIGHTS, 1.0):
        one = guided(weight, reward=reward)
        found += [
            one,
            replace(one, name=f"other images, w = {weight:g}", shuffled=True),
            replace(one, name=f"no DPO, w = {weight:g}", reward=UNTRAINED),
        ]
    return tuple(found)


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
    """Comparisons on the test split, of the pairs and at the weight chosen on validation."""

    weight: float
    against_base: PairedComparison
    against_reward: PairedComparison
    shuffled: PairedComparison
    """The base against guidance by a reward model that sees images of other questions."""
    untrained: PairedComparison
    """The base against guidance by the reward model before DPO."""
    pairs: str = ""
    """Name of the reward model's pairs."""

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
class MethodResult:
    """What a method brings on the test split, and what it costs."""

    name: str
    setting: str
    """The condition that validation chose, or the only one."""
    passes: str
    """Forward passes per token, in those of the base; r is the reward's size by the base's."""
    times_base: float
    """Its time over the base's, on one machine, in batches."""
    accuracy: float
    categories: Mapping[str, CategoryScore]
    against_base: PairedComparison | None = None
    """None for the base itself."""
    corrected_p: float | None = None
    """The comparison's p-value, corrected for the number of methods (Holm)."""
    controls: Mapping[str, PairedComparison] = field(default_factory=dict)
    """By name: against the base, or against VCD for what contrasts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """The demo's result, as in `report.json`."""

    rows: Sequence[ConditionScores]
    """The sweep of the chosen reward model."""
    validation: Mapping[str, float]
    """Accuracy on the validation split by condition."""
    verdict: Findings
    methods: Sequence[MethodResult]
    num_questions: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Versions, seeds, digests and durations."""

    @property
    def guided(self) -> ConditionScores:
        """The scores of guidance at the chosen weight."""
        name = f"guided, w = {self.verdict.weight:g}"
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodAnswers:
    """One method with the chosen condition, and its answers on the test split."""

    method: Method
    chosen: Condition
    test: Asked
    controls: Mapping[str, Asked] = field(default_factory=dict)
    times_base: float = 1.0


def analyse(
    swept: Mapping[str, Asked],
    methods: Sequence[MethodAnswers],
    questions: Sequence[Question],
    *,
    chosen: Condition,
    validation: Mapping[str, float],
) -> DemoResult:
    """Score and compare on the test split.

    Args:
        swept: answers of `sweep` by condition name.
        methods: the base first; with one named `vcd` if any contrasts beside a reward model.
        questions: of the test split.
        chosen: the guidance that validation chose.
        validation: see `DemoResult`.
    """
    answers = {name: each.answers for name, each in swept.items()}
    weight = chosen.guidance.weight

    def compare_on_test(a: str, b: str) -> PairedComparison:
        return compare(questions, a=(a, answers[a]), b=(b, answers[b]))

    return DemoResult(
        rows=[
            ConditionScores(
                name=condition.name,
                weight=None if condition.alone else condition.guidance.weight,
                accuracy=accuracy(questions, answers[condition.name]),
                categories=by_category(questions, answers[condition.name]),
            )
            for condition in sweep(chosen.reward)
        ],
        validation=validation,
        verdict=Findings(
            weight=weight,
            against_base=compare_on_test("base", f"guided, w = {weight:g}"),
            against_reward=compare_on_test(ALONE, f"guided, w = {weight:g}"),
            shuffled=compare_on_test("base", f"other images, w = {weight:g}"),
            untrained=compare_on_test("base", f"no DPO, w = {weight:g}"),
            pairs=chosen.reward,
        ),
        methods=compare_methods(methods, questions),
        num_questions=len(questions),
    )


def compare_methods(
    methods: Sequence[MethodAnswers], questions: Sequence[Question]
) -> list[MethodResult]:
    """Every method against the base, and its controls against what it is without its reward."""
    by_name = {each.method.name: each for each in methods}
    base = by_name["base"]

    def against(baseline: MethodAnswers, name: str, asked: Asked) -> PairedComparison:
        left = (baseline.method.name, baseline.test.answers)
        return compare(questions, a=left, b=(name, asked.answers))

    compared = {
        name: against(base, name, each.test) for name, each in by_name.items() if each is not base
    }
    corrected = dict(zip(compared, holm([c.p_value for c in compared.values()]), strict=True))
    return [
        MethodResult(
            name=name,
            setting=each.chosen.name,
            passes=each.method.passes,
            times_base=each.times_base,
            accuracy=accuracy(questions, each.test.answers),
            categories=by_category(questions, each.test.answers),
            against_base=compared.get(name),
            corrected_p=corrected.get(name),
            controls={
                control: against(by_name[each.method.baseline], f"{name}, {control}", asked)
                for control, asked in each.controls.items()
            },
        )
        for name, each in by_name.items()
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
