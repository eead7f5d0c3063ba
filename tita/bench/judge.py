"""A judge model scores open answers, as MM-Vet, LLaVA-Bench and MMHal-Bench define it.

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
from tita.records import IMAGE_MARK

MM_VET, LLAVA_BENCH, MM_VET_V2, MMHAL = JUDGED
_PROMPT_FILE = "judge_prompt.txt"
"""In the folder of results: a prompt that is published without a licence to copy it."""
_NUM_RATINGS = 7
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
                text=_prompt(record, metric=metric, folder=results.parent),
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
    prompt = judge_prompt(metric, folder=path.parent)
    return Judgements(judge={"model": model, "prompt": prompt}, scores=scores)


def judgement_files(path: Path) -> list[Path]:
    """A judge's file, and the file of its prompt if it has one."""
    prompt = path.with_name(_PROMPT_FILE)
    return [path, prompt] if prompt.is_file() else [path]


def parse_review(review: str, *, metric: str) -> tuple[float, float] | None:
    """(score of the answer, score of the reference), each between 0 and 1; None if invalid.

    MM-Vet's judge writes one number from 0.0 to 1.0 (arXiv 2308.02490); the reference's score is
    nan. LLaVA-Bench's judge writes two numbers from 1 to 10 in its first line, the reference's
    first. MMHal-Bench's writes `Rating: N`, 0 to 6 (arXiv 2309.14525); a review that has none or
    several is invalid here, where the published script gives it 0.
    """
    if metric in (MM_VET, MM_VET_V2):
        first = review.strip().split(" ", maxsplit=1)[0].split("\n", maxsplit=1)[0]
        score = float(first) if _SCORE.fullmatch(first) else math.nan
        return (score, math.nan) if 0 <= score <= 1 else None
    if metric == MMHAL:
        found = [n for n in range(_NUM_RATINGS) if f"rating: {n}" in review.lower()]
        return (found[0] / (_NUM_RATINGS - 1), math.nan) if len(found) == 1 else None
    pair = _PAIR.fullmatch(review.strip().split("\n", maxsplit=1)[0])
    if pair is None or not (0 < float(pair[1]) <= 10 and 0 < float(pair[2]) <= 10):
        return None
    return float(pair[2]) / 10, float(pair[1]) / 10


def judge_prompt(metric: str, *, folder: Path) -> str:
    """The fixed part of the judge's prompt, as published with the benchmark.

    Args:
        folder: of the results; it has the prompts that are not part of the package.

    Raises:
        TitaError: it has not.
    """
    if metric == MMHAL:
        path = folder / _PROMPT_FILE
        if not path.is_file():
            raise TitaError(
                "the prompt of MMHal-Bench's judge is not in the folder of results",
                where=str(path),
                remedy="copy it from the folder of the question file",
            )
        return path.read_text(encoding="utf-8")
    name = {LLAVA_BENCH: "llava_bench.txt"}.get(metric, "mm_vet.txt")
    prompts = resources.files("tita.bench") / "judge_prompts"
    text = prompts.joinpath(name).read_text(encoding="utf-8").rstrip("\n")
    return _with_images(text) if metric == MM_VET_V2 else text


def write_judge_prompt(folder: Path, text: str) -> None:
    """Write a published prompt into the folder of a question file and its results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _PROMPT_FILE).write_text(text, encoding="utf-8")


def _with_images(prompt: str) -> str:
    """MM-Vet's prompt as version 2 has it (arXiv 2408.00765): images have a mark, rows an edge."""
    head, *lines = prompt.splitlines()
    first, rest = head.split(". ", maxsplit=1)
    mark = "<image> in the question indicates where an image is."
    rows = [_edged(line) for line in lines if line.strip()]
    return "\n".join([f"{first}. {mark} {rest}", "", *rows])


def _edged(row: str) -> str:
    question, bar, others = row.partition(" | ")
    if question.startswith("---"):
        return f"| {row} |"
    image = "" if question == "Question" else "<image>"
    return f"| {question}{image}{bar}{others} |"


def _prompt(record: dict[str, Any], *, metric: str, folder: Path) -> str:
    question, answer = record.get("question") or record["prompt"], record["response"]
    references = record.get("references") or [""]
    if metric in (MM_VET, MM_VET_V2):
        truth = references[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        if metric == MM_VET_V2:
            shown = question if IMAGE_MARK in question else f"{question}{IMAGE_MARK}"
            cells = [cell.replace("\n", "<br>") for cell in (shown, truth, answer)]
            return f"{judge_prompt(metric, folder=folder)}\n| {' | '.join([*cells, ''])}"
        # The published prompt has the empty line too.
        return (
            f"{judge_prompt(metric, folder=folder)}\n\n{' | '.join((question, truth, answer, ''))}"
        )
    if metric == MMHAL:
        objects = references[1] if len(references) > 1 else ""
        return judge_prompt(metric, folder=folder).format(objects, question, references[0], answer)
    # references: the answer of the text-only GPT-4, then the context that it was given.
    context = references[1] if len(references) > 1 else ""
    return (
        f"[Context]\n{context}\n\n[Question]\n{question}\n\n"
        f"[Assistant 1]\n{references[0]}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{judge_prompt(metric, folder=folder)}\n\n"
    )
