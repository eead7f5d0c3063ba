"""Metrics by name: parse an answer and score it against its references."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tita.bench import metrics
from tita.bench.metrics import LETTERS
from tita.errors import TitaError


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredAnswer:
    """Score of one answer, and how the answer was parsed."""

    score: float
    parsed: str | None = None
    """`yes`, `no` or the letter of an option; None if the answer could not be parsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A rule that scores one answer."""

    rule: str
    """The rule in words, with its source; part of every score's protocol."""
    score: Callable[[str, Sequence[str], Sequence[str]], ScoredAnswer]
    """Function of (answer, references, choices)."""
    parses: bool = False
    """Whether the metric parses answers, so that unparsed ones are counted."""


def _match_metric(rule: str, match: Callable[[str, Sequence[str]], float]) -> Metric:
    def score(answer: str, references: Sequence[str], _: Sequence[str]) -> ScoredAnswer:
        return ScoredAnswer(score=match(answer, references))

    return Metric(rule=rule, score=score)


def _yes_no_metric(rule: str, parse: Callable[[str], bool | None]) -> Metric:
    def score(answer: str, references: Sequence[str], _: Sequence[str]) -> ScoredAnswer:
        is_yes = parse(answer)
        if is_yes is None:
            return ScoredAnswer(score=0.0)
        word = "yes" if is_yes else "no"
        wanted = references[0].strip().lower() if references else ""
        return ScoredAnswer(score=float(word == wanted), parsed=word)

    return Metric(rule=rule, score=score, parses=True)


def _choice_metric(rule: str, parse: Callable[[str, Sequence[str]], int | None]) -> Metric:
    def score(answer: str, references: Sequence[str], choices: Sequence[str]) -> ScoredAnswer:
        index = parse(answer, choices)
        if index is None:
            return ScoredAnswer(score=0.0)
        letter = LETTERS[index]
        return ScoredAnswer(score=float(letter in references), parsed=letter)

    return Metric(rule=rule, score=score, parses=True)


METRICS: Mapping[str, Metric] = {
    "exact": _match_metric("equal after EvalAI's normalisation", metrics.exact_match),
    "contains": _match_metric(
        "a reference stands in the answer as whole words, after EvalAI's normalisation",
        metrics.contains_match,
    ),
    "relaxed": _match_metric(
        "ChartQA's relaxed accuracy (arXiv 2203.10244): numbers within 5 %", metrics.relaxed_match
    ),
    "anls": _match_metric("ANLS, threshold 0.5 (arXiv 1905.13648)", metrics.anls),
    "vqa": _match_metric(
        "soft VQA accuracy, leave-one-out over the annotators (arXiv 1612.00837)",
        metrics.vqa_accuracy,
    ),
    "ocr-vqa": _match_metric("OCR-VQA's exact match: equal but for case", metrics.ocr_vqa_match),
    "gqa": _match_metric(
        "GQA's accuracy: equal but for case and a final period (arXiv 1902.09506)",
        metrics.gqa_match,
    ),
    "yes-no": _yes_no_metric(
        "yes or no as first word or alone in the first sentence; else unparsed and wrong",
        metrics.parse_yes_no,
    ),
    "pope": _yes_no_metric(
        "POPE's own: no if the first sentence has No, no or not, else yes (arXiv 2305.10355)",
        metrics.parse_pope,
    ),
    "mme": _yes_no_metric(
        "MME's own: yes or no within the first four characters (arXiv 2306.13394)",
        metrics.parse_mme,
    ),
    "choice": _choice_metric(
        "option by its letter or its text (MMBench's heuristic matching, arXiv 2307.06281)",
        metrics.parse_choice,
    ),
    "circular": _choice_metric(
        "as `choice`; right only if every rotation is (CircularEval, arXiv 2307.06281)",
        metrics.parse_choice,
    ),
    "science-qa": _choice_metric(
        "LLaVA's for ScienceQA: the letter, 'A. ...' or 'The answer is A.' (arXiv 2209.09513)",
        metrics.parse_science_qa,
    ),
}

JUDGED = ("judge-mm-vet", "judge-llava-bench")
"""Metrics that a judge model scores (`tita-bench judge`)."""


def check_metric(name: str, *, where: str) -> None:
    """Check the name of a metric; the empty name is valid.

    Raises:
        TitaError: the metric is unknown.
    """
    if name and name not in METRICS and name not in JUDGED:
        raise TitaError(
            f"unknown metric {name!r}", where=where, remedy=f"choose one of {', '.join(METRICS)}"
        )


def score_answer(
    metric: str, answer: str, *, references: Sequence[str], choices: Sequence[str] = ()
) -> ScoredAnswer | None:
    """Score one answer; None if there are no references or the metric is judged."""
    if not references or metric not in METRICS:
        return None
    return METRICS[metric].score(answer, references, choices)
