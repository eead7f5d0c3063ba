"""Metrics: pure functions, each naming the paper or the code whose rule it follows."""

from tita.bench.metrics.choice import circular_accuracy, parse_choice, parse_science_qa
from tita.bench.metrics.match import (
    anls,
    contains_match,
    edit_distance,
    exact_match,
    gqa_match,
    ocr_vqa_match,
    relaxed_match,
    vqa_accuracy,
)
from tita.bench.metrics.paired import (
    Difference,
    Outcomes,
    bootstrap_difference,
    mcnemar_exact,
    outcomes,
)
from tita.bench.metrics.yes_no import (
    MmeScores,
    YesNoScores,
    mme_scores,
    parse_mme,
    parse_pope,
    parse_yes_no,
    pope_scores,
)
from tita.data.normalise import normalise

__all__ = [
    "Difference",
    "MmeScores",
    "Outcomes",
    "YesNoScores",
    "anls",
    "bootstrap_difference",
    "circular_accuracy",
    "contains_match",
    "edit_distance",
    "exact_match",
    "gqa_match",
    "mcnemar_exact",
    "mme_scores",
    "normalise",
    "ocr_vqa_match",
    "outcomes",
    "parse_choice",
    "parse_mme",
    "parse_pope",
    "parse_science_qa",
    "parse_yes_no",
    "pope_scores",
    "relaxed_match",
    "vqa_accuracy",
]
