"""Scorers of evaluation sets: what an answer counts, and the figures that totals of counts make."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tita.bench.columns import answer_of
from tita.bench.metrics import parse_yes_no
from tita.bench.published_files import load_json
from tita.bench.scoring import METRICS, score_answer
from tita.errors import TitaError
from tita.storage.files import atomic_path
from tita.suites.paired_totals import Array, Counts, Totals


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredQuestion:
    """A question of an evaluation set with its answer."""

    id: str
    answer: str
    metric: str = ""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    category: str = ""
    group: str = ""
    image: str = ""
    """The first image."""
    review: tuple[float, float] | None = None
    """A judge's scores of answer and reference, from 0 to 1."""
    changed: tuple[tuple[int, int], ...] = ()
    """Start and end in the answer of tokens that guidance changed, if they were asked for."""

    @classmethod
    def of(
        cls, record: Mapping[str, Any], *, review: tuple[float, float] | None = None
    ) -> "ScoredQuestion":
        """From a line of a results file."""
        images = record.get("images") or [record.get("image") or ""]
        return cls(
            id=str(record["question_id"]),
            answer=answer_of(record),
            metric=str(record.get("metric", "")),
            references=tuple(record.get("references") or ()),
            choices=tuple(record.get("choices") or ()),
            category=str(record.get("category", "")),
            group=str(record.get("group", "")),
            image=str(images[0]),
            review=review,
            changed=tuple((int(start), int(end)) for start, end in record.get("changed") or ()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure of an evaluation set, in percent unless its name says otherwise."""

    value: Callable[[Totals], Array]
    """nan where it is not defined."""
    better: Literal[1, 0, -1] = 1
    """1: larger is better, -1: smaller is better, 0: neither."""


ScoredCounts = tuple[ScoredQuestion, Mapping[str, float]]
"""A question, and what its answer counts."""
QuestionCounts = Callable[[ScoredQuestion], Mapping[str, float] | None]
"""What one answer counts, `score` (0 to 1, larger is better) among it; None: it has no score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """How the answers of an evaluation set are scored."""

    load: Callable[[Path], QuestionCounts]
    """From the set's folder, which may have further files, to the function of an answer."""
    figures: Mapping[str, Figure]
    """By name; the first is the set's main one."""
    unit: Callable[[ScoredQuestion], str] = lambda question: question.id
    """Questions with one unit depend on each other and are resampled together."""
    of_unit: Callable[[Sequence[ScoredCounts]], dict[str, float]] = field(default=lambda _: {})
    """What the questions of a unit count together, beside the sum of what each counts."""
    needs_whole_units: bool = False
    """Whether a unit without the answer to one of its questions would count as right too often."""
    mean_of: Sequence[str] = ()
    """The figures that the main one is the mean of."""

    @property
    def main(self) -> str:
        """Name of the main figure."""
        return next(iter(self.figures))

    def score(
        self, questions: Iterable[ScoredQuestion], *, folder: Path
    ) -> dict[str, ScoredCounts]:
        """What every question that has a score counts, by question id.

        Args:
            folder: of the set, which may have a file of words.
        """
        count = self.load(folder)
        counted = ((question, count(question)) for question in questions)
        return {q.id: (q, counts) for q, counts in counted if counts is not None}

    def gather(self, scored: Iterable[ScoredCounts]) -> Counts:
        """The counts of the units that questions make."""
        units: dict[str, list[ScoredCounts]] = {}
        for question, counts in scored:
            units.setdefault(self.unit(question), []).append((question, counts))
        return Counts.of({name: self._unit(own) for name, own in units.items()})

    def _unit(self, questions: Sequence[ScoredCounts]) -> dict[str, float]:
        total = {"questions": float(len(questions))}
        for question, counted in questions:
            for name, value in counted.items():
                total[name] = total.get(name, 0.0) + value
            total["words"] = total.get("words", 0.0) + len(question.answer.split())
        return total | self.of_unit(questions)


def values_of(counts: Counts, figures: Mapping[str, Figure]) -> dict[str, float]:
    """The figures of one run; those that are not defined are left out."""
    totals = counts.totals()
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {name: float(figure.value(totals)) for name, figure in figures.items()}
    return {name: value for name, value in found.items() if not np.isnan(value)}


def ratio(part: str, whole: str, *, factor: float = 100.0) -> Callable[[Totals], Array]:
    """A total by another one, in percent; nan where the other is 0 or never counted."""

    def value(totals: Totals) -> Array:
        if whole not in totals:
            return np.array(np.nan)
        result: Array = factor * totals.get(part, np.zeros_like(totals[whole])) / totals[whole]
        return result

    return value


def f1_of(hits: str, said: str, labelled: str) -> Callable[[Totals], Array]:
    """F1 in percent, of hits, answers of the class and labels of the class; 0 without a hit."""

    def value(totals: Totals) -> Array:
        if labelled not in totals:
            return np.array(np.nan)
        zero = np.zeros_like(totals[labelled])
        result: Array = 200 * totals.get(hits, zero) / (totals.get(said, zero) + totals[labelled])
        return result

    return value


LENGTH = Figure(value=ratio("words", "questions", factor=1.0), better=0)
"""Mean number of words of an answer. Shorter answers make up less."""
YES_RATIO = Figure(value=ratio("said yes", "yes/no"), better=0)
"""Share of the answers to yes/no questions that are yes."""


def yes_no_counts(
    question: ScoredQuestion, parse: Callable[[str], bool | None] = parse_yes_no
) -> dict[str, float]:
    """Counts of a yes/no question; an answer that is neither is wrong and counted as unparsed."""
    said, label = parse(question.answer), question.references[0] == "yes"
    right = said is label
    return {
        "score": float(right),
        "yes/no": 1.0,
        "said yes": float(said is True),
        "said no": float(said is False),
        "unparsed": float(said is None),
        "labelled yes": float(label),
        "labelled no": float(not label),
        "yes hits": float(right and label),
        "no hits": float(right and not label),
    }


def metric_counts(question: ScoredQuestion) -> Mapping[str, float] | None:
    """Counts of a question with a metric of `tita.bench.scoring`, or with a judge's score."""
    if question.review is not None:
        return {"score": question.review[0]}
    if question.metric in ("yes-no", "pope") and question.references:
        return yes_no_counts(question)
    scored = score_answer(
        question.metric,
        question.answer,
        references=question.references,
        choices=question.choices,
    )
    return None if scored is None else {"score": scored.score}


def _all_right(questions: Sequence[ScoredCounts]) -> dict[str, float]:
    """A group counts as right if each of its questions has an answer and it is right."""
    first = questions[0][0]
    size = METRICS[first.metric].group_size(first.choices) if first.metric in METRICS else 1
    is_right = len(questions) >= size and all(counts["score"] == 1 for _, counts in questions)
    return {"units": 1.0, "all right": float(is_right)}


ACCURACY = Figure(value=ratio("score", "questions"))
MEAN_SCORER = Scorer(
    load=lambda _: metric_counts,
    figures={"score": ACCURACY, "yes ratio": YES_RATIO, "length in words": LENGTH},
)
"""The mean score of a question."""
GROUP_SCORER = Scorer(
    load=lambda _: metric_counts,
    unit=lambda question: question.group or question.id,
    of_unit=_all_right,
    figures={
        "groups right": Figure(value=ratio("all right", "units")),
        "accuracy": ACCURACY,
        "length in words": LENGTH,
    },
)
"""Groups of which every question is right: MMBench's CircularEval, MME's accuracy+."""

VOCABULARY = "vocabulary.json"
"""File with the words that captions are scored by, by the name of their set."""


def write_vocabulary(folder: Path, name: str, words: Mapping[str, Any]) -> None:
    """Write the words of a set into the folder of its questions, which may be that of others."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**_vocabularies(folder), name: words}, ensure_ascii=False, indent=1)
    with atomic_path(folder / VOCABULARY) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_vocabulary(folder: Path, name: str) -> dict[str, Any]:
    """The words of a set.

    Raises:
        TitaError: the folder does not have them.
    """
    words: dict[str, Any] | None = _vocabularies(folder).get(name)
    if words is None:
        raise TitaError(
            f"no words of the set {name}, by which its captions are scored",
            where=str(folder / VOCABULARY),
            remedy=f"copy the file from the folder where `tita-bench prepare {name}` wrote it",
        )
    return words


def _vocabularies(folder: Path) -> dict[str, Any]:
    path = folder / VOCABULARY
    content: dict[str, Any] = load_json(path) if path.is_file() else {}
    return content
