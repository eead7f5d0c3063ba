"""Metrics by name: normalise references, parse an answer, and score it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tita.bench import metrics
from tita.bench.choice_answers import LETTERS, parse_choice
from tita.bench.references import (
    InvalidReference,
    ReferenceRule,
    annotator_references,
    apply_rule,
    choice_references,
    period_free_references,
    text_references,
    yes_no_references,
)
from tita.errors import TitaError


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredAnswer:
    """Score of one answer, and how the answer was parsed."""

    score: float
    parsed: str | None = None
    """`yes`, `no` or the letter of an option; None if the answer could not be parsed."""


class GroupRule(StrEnum):
    """How the questions of a group make one score."""

    MEAN = "mean"
    """The mean of the answered questions."""
    ALL = "all"
    """1 if every question of the group has an answer and it is right, else 0."""
    MME = "mme"
    """The mean of accuracy and accuracy+ of one image: half of MME's score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A rule that scores one answer."""

    rule: str
    """The rule in words, with its source; part of every score's protocol."""
    score: Callable[[str, Sequence[str], Sequence[str]], ScoredAnswer]
    """Function of (answer, references, choices)."""
    references: ReferenceRule
    """The form of its references."""
    parses: bool = False
    """Whether the metric parses answers, so that unparsed ones are counted."""
    group: GroupRule = GroupRule.MEAN

    def group_size(self, choices: Sequence[str]) -> int:
        """Number of questions of a complete group: one per option in MMBench, two in MME."""
        if self.group is GroupRule.ALL:
            return max(1, len(choices))
        return metrics.MME_QUESTIONS_PER_IMAGE if self.group is GroupRule.MME else 1


def _match_metric(
    rule: str,
    match: Callable[[str, Sequence[str]], float],
    references: ReferenceRule = text_references,
) -> Metric:
    def score(answer: str, references: Sequence[str], _: Sequence[str]) -> ScoredAnswer:
        return ScoredAnswer(score=match(answer, references))

    return Metric(rule=rule, score=score, references=references)


def _yes_no_metric(
    rule: str, parse: Callable[[str], bool | None], group: GroupRule = GroupRule.MEAN
) -> Metric:
    def score(answer: str, references: Sequence[str], _: Sequence[str]) -> ScoredAnswer:
        is_yes = parse(answer)
        if is_yes is None:
            return ScoredAnswer(score=0.0)
        word = "yes" if is_yes else "no"
        return ScoredAnswer(score=float(word == references[0]), parsed=word)

    return Metric(rule=rule, score=score, references=yes_no_references, parses=True, group=group)


def _choice_metric(
    rule: str,
    parse: Callable[[str, Sequence[str]], int | None],
    group: GroupRule = GroupRule.MEAN,
) -> Metric:
    def score(answer: str, references: Sequence[str], choices: Sequence[str]) -> ScoredAnswer:
        index = parse(answer, choices)
        if index is None:
            return ScoredAnswer(score=0.0)
        letter = LETTERS[index]
        return ScoredAnswer(score=float(letter in references), parsed=letter)

    return Metric(rule=rule, score=score, references=choice_references, parses=True, group=group)


METRICS: Mapping[str, Metric] = {
    "exact": _match_metric("equal after EvalAI's normalisation", metrics.exact_match),
    "contains": _match_metric(
        "a reference stands in the answer as whole words, after EvalAI's normalisation",
        metrics.contains_match,
    ),
    "relaxed": _match_metric(
        "ChartQA's relaxed accuracy (arXiv 2203.10244): numbers within 5 %",
        metrics.relaxed_match,
        period_free_references,
    ),
    "anls": _match_metric("ANLS, threshold 0.5 (arXiv 1905.13648)", metrics.anls),
    "vqa": _match_metric(
        "soft VQA accuracy, leave-one-out over the annotators (arXiv 1612.00837)",
        metrics.vqa_accuracy,
        annotator_references,
    ),
    "vqa-official": _match_metric(
        "soft VQA accuracy as VQA v2's evaluation code: unanimous answers are not normalised "
        "(arXiv 1612.00837)",
        metrics.vqa_official_accuracy,
        annotator_references,
    ),
    "ocr-vqa": _match_metric("OCR-VQA's exact match: equal but for case", metrics.ocr_vqa_match),
    "gqa": _match_metric(
        "GQA's accuracy: equal but for case and a final period (arXiv 1902.09506)",
        metrics.gqa_match,
        period_free_references,
    ),
    "real-world-qa": _match_metric(
        "RealWorldQA's open answers as lmms-eval: equal but for case and a final period",
        metrics.gqa_match,
        period_free_references,
    ),
    "mmmu-open": _match_metric(
        "MMMU's open answers: a number or text after the last lead (arXiv 2311.16502)",
        metrics.mmmu_open_match,
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
        GroupRule.MME,
    ),
    "choice": _choice_metric(
        "option by its letter or its text (MMBench's heuristic matching, arXiv 2307.06281, "
        "without articles, labels and rejected options)",
        parse_choice,
    ),
    "circular": _choice_metric(
        "as `choice`; right only if every rotation is answered and right "
        "(CircularEval, arXiv 2307.06281)",
        parse_choice,
        GroupRule.ALL,
    ),
    "science-qa": _choice_metric(
        "LLaVA's for ScienceQA: the letter, 'A. ...' or 'The answer is A.' (arXiv 2209.09513)",
        metrics.parse_science_qa,
    ),
}

JUDGED = ("judge-mm-vet", "judge-llava-bench", "judge-mm-vet-v2", "judge-mmhal")
"""Metrics that a judge model scores (`tita-bench judge`)."""
CHAIR, AMBER_CAPTION = SUITE_METRICS = ("chair", "amber-caption")
"""Metrics of captions, which `tita-bench suite` scores: they need the words of a whole set."""


def check_metric(name: str, *, where: str) -> None:
    """Check the name of a metric; the empty name is valid.

    Raises:
        TitaError: the metric is unknown.
    """
    known = (*METRICS, *JUDGED, *SUITE_METRICS)
    if name and name not in known:
        raise TitaError(
            f"unknown metric {name!r}", where=where, remedy=f"choose one of {', '.join(known)}"
        )


def hides_options(metric: str, text: str, choices: Sequence[str]) -> bool:
    """Whether a question scored by the letters of options does not show them to the model."""
    if metric not in METRICS or METRICS[metric].references is not choice_references:
        return False
    shown = " ".join(text.lower().split())
    return not all(" ".join(choice.lower().split()) in shown for choice in choices)


def normalise_references(
    metric: str, references: Sequence[str], *, choices: Sequence[str] = (), where: str
) -> tuple[str, ...]:
    """The references in the form that the metric compares with.

    Args:
        where: the question's file and line, for errors.

    Raises:
        InvalidReference: no answer can be right with them.
    """
    if not references or metric not in METRICS:
        return tuple(references)
    try:
        return apply_rule(METRICS[metric].references, tuple(references), tuple(choices))
    except InvalidReference as error:
        what = f"{error.what} (metric {metric})"
        raise InvalidReference(what, where=where, remedy=error.remedy) from None


def score_answer(
    metric: str, answer: str, *, references: Sequence[str], choices: Sequence[str] = ()
) -> ScoredAnswer | None:
    """Score one answer; None if there are no references or the metric is judged.

    Args:
        references: as `normalise_references` returns them.
    """
    if not references or metric not in METRICS:
        return None
    return METRICS[metric].score(answer, references, choices)
