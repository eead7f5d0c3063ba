"""Compares methods with the base on every set: figures, intervals, corrected p-values, cost."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tita.bench.judge import read_judgements
from tita.bench.methods import Method
from tita.bench.outcomes import shown_message
from tita.bench.questions import BenchmarkItem
from tita.bench.results_file import read_results
from tita.bench.scoring import CHAIR
from tita.bench.significance import holm
from tita.errors import TitaError
from tita.suites.catalog import SETS
from tita.suites.paired_totals import PairedFigure, compare_totals
from tita.suites.scorers import GROUP_SCORER, MEAN_SCORER, ScoredCounts, ScoredQuestion, Scorer

VALIDATION_SHARE = 0.3
"""Share of a set's units on which the weight is chosen."""
SIGNIFICANCE = 0.05
_GROUP_METRICS = ("mme", "circular")


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRun:
    """The answers of one method to one set."""

    method: Method
    scored: Mapping[str, ScoredCounts]
    """Questions that have a score, and what their answers count, by id."""
    num_answered: int
    cost: Mapping[str, float]
    """Means per question: `seconds`, `input tokens`, `output tokens`, and `price` if known."""
    currency: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)
    first_error: str = ""
    """Message of the first failed question; empty if none failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRuns:
    """The answers of all methods to one set."""

    name: str
    title: str
    source: str
    scorer: Scorer
    folder: Path
    images: Path
    runs: Mapping[str, MethodRun]
    """By method's name."""
    num_questions: int
    """Of the set, whether they were asked or not."""
    hallucination: bool = False
    unit_sizes: Mapping[str, int] = field(default_factory=dict)
    """Number of questions by unit, where the scorer needs whole units."""

    def num_missing(self, method: Method) -> int:
        """Number of questions without an answer of a method, or without a score of the answer."""
        run = self.runs.get(method.name)
        return self.num_questions - (len(run.scored) if run is not None else 0)

    def whole(self, identities: Sequence[str], scored: Mapping[str, ScoredCounts]) -> list[str]:
        """Of these questions, those of units of which no question is left out."""
        if not self.scorer.needs_whole_units:
            return [*identities]
        unit_of = {identity: self.scorer.unit(scored[identity][0]) for identity in identities}
        found = Counter(unit_of.values())
        sizes = self.unit_sizes
        return [each for each, unit in unit_of.items() if found[unit] >= sizes.get(unit, 0)]


def unit_sizes(items: Iterable[BenchmarkItem], scorer: Scorer) -> Counter[str]:
    """Number of questions by unit, where the scorer needs whole units; else empty."""
    if not scorer.needs_whole_units:
        return Counter()
    unanswered = (ScoredQuestion.of(item.record() | {"response": ""}) for item in items)
    return Counter(map(scorer.unit, unanswered))


def read_method_run(path: Path, method: Method, *, scorer: Scorer, folder: Path) -> MethodRun:
    """Read a results file, with the judgements in `<file>.judged.jsonl` if there are any.

    Args:
        folder: of the set.
    """
    judged = path.with_name(f"{path.stem}.judged.jsonl")
    reviews = read_judgements(judged).scores if judged.is_file() else {}
    questions: dict[str, ScoredQuestion] = {}
    records: dict[str, Mapping[str, Any]] = {}
    first_error = ""
    for record in read_results(path):
        identity = str(record["question_id"])
        if not record["success"]:
            first_error = first_error or shown_message(record.get("error_message"))
            continue
        questions[identity] = ScoredQuestion.of(record, review=reviews.get(identity))
        records[identity] = record
    cost = {
        name: _mean(_number(record.get(key)) for record in records.values())
        for name, key in (
            ("seconds", "response_time"),
            ("input tokens", "input_tokens"),
            ("output tokens", "output_tokens"),
        )
    }
    prices = [record["price"] for record in records.values() if record.get("price")]
    if prices:
        paid = [_price(record) for record in records.values() if record.get("price")]
        cost["price"] = _mean(paid)
    return MethodRun(
        method=method,
        scored=scorer.score(questions.values(), folder=folder),
        num_answered=len(questions),
        cost={name: value for name, value in cost.items() if not np.isnan(value)},
        currency=str(prices[0]["currency"]) if prices else "",
        prompts={identity: str(record.get("prompt", "")) for identity, record in records.items()},
        first_error=first_error,
    )


def _price(record: Mapping[str, Any]) -> float:
    price = record["price"]
    sides = (price[side] * _number(record.get(f"{side}_tokens")) for side in ("input", "output"))
    return float(sum(sides)) / 1e6


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return sum(known) / len(known) if known else float("nan")


def scorer_of(results: Path) -> tuple[str, Scorer]:
    """(name of the set, its scorer) of a results file on questions of any kind.

    Questions of several sets have no name, and a score each. Captions have none then.
    """
    kinds = {
        (str(record.get("suite", "")), str(record.get("metric", "")))
        for record in read_results(results)
    }
    suites, metrics = ({kind[place] for kind in kinds} for place in (0, 1))
    suite = suites.pop() if len(suites) == 1 else ""
    if suite in SETS:
        return suite, SETS[suite].scorer
    if metrics == {CHAIR}:
        return suite, SETS["chair"].scorer
    return suite, GROUP_SCORER if metrics & set(_GROUP_METRICS) else MEAN_SCORER


@dataclass(frozen=True, slots=True, kw_only=True)
class SetComparison:
    """One method against the base on one set."""

    set: SetRuns
    method: Method
    figures: Mapping[str, PairedFigure]
    num_units: int
    corrected_p: float | None = None
    """Of the main figure, corrected for the number of comparisons; None for a control."""

    @property
    def main(self) -> PairedFigure:
        """The set's main figure."""
        return self.figures[self.set.scorer.main]

    @property
    def sign(self) -> int:
        """1 if a larger main figure is better, else -1."""
        return self.set.scorer.figures[self.set.scorer.main].better

    @property
    def gain(self) -> float:
        """Difference of the main figure, positive if the method is better."""
        return self.sign * self.main.difference

    @property
    def is_significant(self) -> bool:
        """Whether the difference is larger than chance explains, after correction."""
        p = self.main.p_value if self.corrected_p is None else self.corrected_p
        return p < SIGNIFICANCE


def part_of(unit: str) -> str:
    """`validation` or `rest`, by a hash of the unit's name: the same for every run."""
    number = int.from_bytes(sha256(unit.encode()).digest()[:4], "big") / 2**32
    return "validation" if number < VALIDATION_SHARE else "rest"


def compare_method(
    runs: SetRuns, method: Method, *, part: str = "", against: str = "base"
) -> SetComparison | None:
    """Compare a method with another on the questions that both answered.

    Args:
        part: `validation` or `rest`; empty for all units.
        against: name of the other method.

    Returns:
        None if no question has a score in both, or the main figure is not defined.
    """
    a, b = runs.runs.get(against), runs.runs.get(method.name)
    if a is None or b is None:
        return None
    shared = [
        identity
        for identity, (question, _) in a.scored.items()
        if identity in b.scored and (not part or part_of(runs.scorer.unit(question)) == part)
    ]
    shared = runs.whole(shared, a.scored)
    left, right = (
        runs.scorer.gather(run.scored[identity] for identity in shared) for run in (a, b)
    )
    if not len(left.units):
        return None
    figures = compare_totals(
        left, right, {name: figure.value for name, figure in runs.scorer.figures.items()}
    )
    if runs.scorer.main not in figures:
        return None
    return SetComparison(set=runs, method=method, figures=figures, num_units=len(left.units))


def correct_for_number(comparisons: Sequence[SetComparison]) -> list[SetComparison]:
    """The comparisons with p-values corrected for their number by Holm's method."""
    corrected = holm([each.main.p_value for each in comparisons])
    return [replace(each, corrected_p=p) for each, p in zip(comparisons, corrected, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightChoice:
    """The method among several weights that a validation part chooses."""

    method: Method | None
    """None: no weight is better than 0 there."""
    gains: Mapping[str, float]
    """Mean gain over the sets on the validation part, in standard errors, by method's name."""


def choose_weight(sets: Sequence[SetRuns], methods: Sequence[Method]) -> WeightChoice:
    """Choose the weight by its mean gain on the validation part of all sets.

    Figures of different sets have different scales, so a gain is divided by the largest difference
    that chance explains in its set: half the width of its 95 % interval.
    """
    gains: dict[str, float] = {}
    for method in methods:
        found = [compare_method(runs, method, part="validation") for runs in sets]
        known = [
            each.gain / max((each.main.high - each.main.low) / 2, 1e-9)
            for each in found
            if each is not None and each.main.high > each.main.low
        ]
        if known:
            gains[method.name] = sum(known) / len(known)
    best = max(gains, key=lambda name: gains[name], default=None)
    chosen = None
    if best is not None and gains[best] > 0:
        chosen = next(method for method in methods if method.name == best)
    return WeightChoice(method=chosen, gains=gains)


def check_base_answered(sets: Sequence[SetRuns]) -> None:
    """Check that every set has answers of the base.

    Raises:
        TitaError: one has none.
    """
    for runs in sets:
        base = runs.runs.get("base")
        if base is None or not base.num_answered:
            reason = f" ({base.first_error})" if base is not None and base.first_error else ""
            raise TitaError(
                f"no answers of the base to {runs.title}{reason}",
                where=str(runs.folder),
                remedy="run the command again",
            )
