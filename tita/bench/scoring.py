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


def _plain(function: Callable[[str, Sequence[str]], float]) -> Callable[..., ScoredAnswer]:
    def score(answer: str, references: Sequence[str], _: Sequence[str]) -> ScoredAnswer:
        return ScoredAnswer(score=function(answer, references))

    return score


def _yes_no(parse: Callable[[str], bool | None]) -> Callable[..., ScoredAnswer]:
    def score(answer: str, references: Sequence[str], _: Sequence[str]) -> ScoredAnswer:
        is_yes = parse(answer)
        if is_yes is None:
            return ScoredAnswer(score=0.0)
        word = "yes" if is_yes else "no"
        wanted = references[0].strip().lower() if references else ""
        return ScoredAnswer(score=float(word == wanted), parsed=word)

    return score


def _choice(parse: Callable[[str, Sequence[str]], int | None]) -> Callable[..., ScoredAnswer]:
    def score(answer: str, references: Sequence[str], choices: Sequence[str]) -> ScoredAnswer:
        index = parse(answer, choices)
        if index is None:
            return ScoredAnswer(score=0.0)
        letter = LETTERS[index]
        return ScoredAnswer(score=float(letter in references), parsed=letter)

    return score


def _science_qa(answer: str, choices: Sequence[str]) -> int | None:
    return metrics.parse_science_qa(answer, num_choices=len(choices))


METRICS: Mapping[str, Metric] = {
    "exact": Metric(rule="equal after EvalAI's normalisation", score=_plain(metrics.exact_match)),
    "contains": Metric(
        rule="a reference stands in the answer as whole words, after EvalAI's normalisation",
        score=_plain(metrics.contains_match),
    ),
    "relaxed": Metric(
        rule="ChartQA's relaxed accuracy (arXiv 2203.10244): numbers within 5 %",
        score=_plain(metrics.relaxed_match),
    ),
    "anls": Metric(rule="ANLS, threshold 0.5 (arXiv 1905.13648)", score=_plain(metrics.anls)),
    "vqa": Metric(
        rule="soft VQA accuracy, leave-one-out over the annotators (arXiv 1612.00837)",
        score=_plain(metrics.vqa_accuracy),
    ),
    "ocr-vqa": Metric(
        rule="OCR-VQA's exact match: equal but for case", score=_plain(metrics.ocr_vqa_match)
    ),
    "gqa": Metric(
        rule="GQA's accuracy: equal but for case and a final period (arXiv 1902.09506)",
        score=_plain(metrics.gqa_match),
    ),
    "yes-no": Metric(
        rule="yes or no as first word or alone in the first sentence; else unparsed and wrong",
        score=_yes_no(metrics.parse_yes_no),
        parses=True,
    ),
    "pope": Metric(
        rule="POPE's own: no if the first sentence has No, no or not, else yes (arXiv 2305.10355)",
        score=_yes_no(metrics.parse_pope),
        parses=True,
    ),
    "mme": Metric(
        rule="MME's own: yes or no within the first four characters (arXiv 2306.13394)",
        score=_yes_no(metrics.parse_mme),
        parses=True,
    ),
    "choice": Metric(
        rule="option by its letter or its text (MMBench's heuristic matching, arXiv 2307.06281)",
        score=_choice(metrics.parse_choice),
        parses=True,
    ),
    "circular": Metric(
        rule="as `choice`; right only if every rotation is (CircularEval, arXiv 2307.06281)",
        score=_choice(metrics.parse_choice),
        parses=True,
    ),
    "science-qa": Metric(
        rule="LLaVA's for ScienceQA: the letter, 'A. ...' or 'The answer is A.' (arXiv 2209.09513)",
        score=_choice(_science_qa),
        parses=True,
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
