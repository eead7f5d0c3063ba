"""A judge model scores open answers, as MM-Vet and LLaVA-Bench define it.

Judging is a run of its own: its questions are prompts for the judge, one per answer, and every line
of its results file names the results file that is judged. So resume, retries and cost work as in
any run.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tita.bench.questions import BenchmarkItem
from tita.bench.results_file import read_results
from tita.bench.scoring import JUDGED
from tita.errors import TitaError

MM_VET, LLAVA_BENCH = JUDGED
_SCORE = re.compile(r"[01](?:\.\d+)?")
_PAIR = re.compile(r"\s*(\d+(?:\.\d+)?)[\s,]+(\d+(?:\.\d+)?)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgements:
    """A judge's scores of the answers in one results file."""

    judge: Mapping[str, str]
    """`model` and `prompt` of the judge; part of every report."""
    scores: Mapping[str, tuple[float, float]]
    """(answer's score, reference's score) by question id, from 0 to 1; the latter may be nan."""


def judge_items(results: Path) -> Iterator[BenchmarkItem]:
    """One question for the judge per answer that has a judged metric.

    Raises:
        TitaError: the file has no such answer.
    """
    num_items = 0
    for record in read_results(results):
        metric = str(record.get("metric", ""))
        if metric in JUDGED and record["success"]:
            num_items += 1
            yield BenchmarkItem(
                id=str(record["question_id"]),
                text=_prompt(record, metric=metric),
                suite="judgement",
                category=metric,
            )
    if not num_items:
        raise TitaError(
            "no answers with a judged metric",
            where=str(results),
            remedy=f"set the metric of the questions to {' or '.join(JUDGED)}",
        )


def read_judgements(path: Path) -> Judgements:
    """The scores in the results file of a judge; reviews without a valid score are skipped."""
    scores, model, metric = {}, "", MM_VET
    for record in read_results(path):
        model, metric = str(record["model_name"]), str(record.get("category", metric))
        if not record["success"]:
            continue
        given = parse_review(str(record["response"]), metric=metric)
        if given is not None:
            scores[str(record["question_id"])] = given
    return Judgements(judge={"model": model, "prompt": judge_prompt(metric)}, scores=scores)


def parse_review(review: str, *, metric: str) -> tuple[float, float] | None:
    """(score of the answer, score of the reference), each between 0 and 1; None if invalid.

    MM-Vet's judge writes one number from 0.0 to 1.0 (arXiv 2308.02490); the reference's score is
    nan. LLaVA-Bench's judge writes two numbers from 1 to 10 in its first line, the reference's
    first.
    """
    if metric == MM_VET:
        first = review.strip().split(" ", maxsplit=1)[0].split("\n", maxsplit=1)[0]
        score = float(first) if _SCORE.fullmatch(first) else math.nan
        return (score, math.nan) if 0 <= score <= 1 else None
    pair = _PAIR.fullmatch(review.strip().split("\n", maxsplit=1)[0])
    if pair is None or not (0 < float(pair[1]) <= 10 and 0 < float(pair[2]) <= 10):
        return None
    return float(pair[2]) / 10, float(pair[1]) / 10


def judge_prompt(metric: str) -> str:
    """The fixed part of the judge's prompt, as published with the benchmark."""
    name = {MM_VET: "mm_vet.txt", LLAVA_BENCH: "llava_bench.txt"}[metric]
    folder = resources.files("tita.bench") / "judge_prompts"
    return folder.joinpath(name).read_text(encoding="utf-8").rstrip("\n")


def _prompt(record: dict[str, Any], *, metric: str) -> str:
    question, answer = record.get("question") or record["prompt"], record["response"]
    references = record.get("references") or [""]
    if metric == MM_VET:
        truth = references[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        # The published prompt has the empty line too.
        return f"{judge_prompt(metric)}\n\n{' | '.join((question, truth, answer, ''))}"
    # references: the answer of the text-only GPT-4, then the context that it was given.
    context = references[1] if len(references) > 1 else ""
    return (
        f"[Context]\n{context}\n\n[Question]\n{question}\n\n"
        f"[Assistant 1]\n{references[0]}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{judge_prompt(metric)}\n\n"
    )
