"""Judged scores: published prompts, valid and invalid reviews."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tita.bench.archive import fetch
from tita.bench.chat_response import Reply
from tita.bench.evaluate import evaluate
from tita.bench.judge import LLAVA_BENCH, MM_VET, judge_items, parse_review
from tita.bench.load_shape import ClientOptions
from tita.bench.publish import publish
from tita.bench.questions import BenchmarkItem
from tita.bench.registry import resolve_endpoint
from tita.bench.results_file import answer_record
from tita.bench.tasks import judge_answers
from tita.errors import TitaError
from tita.storage import open_store


@pytest.mark.parametrize(
    ("review", "score"),
    [("0.5", 0.5), ("1.0\n", 1.0), ("0.3 because", 0.3), ("1.5", None), ("half", None), ("", None)],
)
def test_mm_vet_reviews(review: str, score: float | None) -> None:
    parsed = parse_review(review, metric=MM_VET)
    if score is None:
        assert parsed is None
    else:
        assert parsed is not None
        assert parsed[0] == score
        assert math.isnan(parsed[1])


@pytest.mark.parametrize(
    ("review", "scores"),
    [
        ("8 6\nBoth are good.", (0.6, 0.8)),
        ("7.5, 9", (0.9, 0.75)),
        ("Assistant 1: 8", None),
        ("8 11", None),
        ("8", None),
        ("", None),
    ],
)
def test_llava_bench_reviews_have_the_references_score_first(
    review: str, scores: tuple[float, float] | None
) -> None:
    assert parse_review(review, metric=LLAVA_BENCH) == scores


def write(path: Path, *records: tuple[BenchmarkItem, str], **run: object) -> None:
    lines = (
        json.dumps(answer_record(item, Reply(text=text), attempts=1, run={"model_name": "m"} | run))
        for item, text in records
    )
    path.write_text("".join(f"{line}\n" for line in lines))


def item(number: int, metric: str, *references: str) -> BenchmarkItem:
    return BenchmarkItem(
        id=f"q{number}", text=f"What {number}?", references=references, metric=metric
    )


def test_judge_prompts_are_as_published(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(
        path,
        (item(1, MM_VET, "a<OR>b"), "it is a"),
        (item(2, LLAVA_BENCH, "gpt says", "a caption"), "we say"),
        (item(3, "exact", "x"), "x"),
    )
    first, second = judge_items(path)
    assert first.text.splitlines()[-1] == "What 1? | a <OR> b | it is a | "
    assert first.text.splitlines()[-2] == ""
    assert first.text.splitlines()[2] == "Question | Ground truth | Prediction | Correctness"
    assert second.text.startswith(
        "[Context]\na caption\n\n[Question]\nWhat 2?\n\n[Assistant 1]\ngpt says\n\n"
        "[End of Assistant 1]\n\n[Assistant 2]\nwe say\n\n[End of Assistant 2]\n\n[System]\n"
        "We would like to request your feedback on the performance of two AI assistants"
    )
    write(path, (item(3, "exact", "x"), "x"))
    with pytest.raises(TitaError, match="no answers with a judged metric"):
        list(judge_items(path))


def test_llava_bench_is_the_ratio_of_sums(tmp_path: Path) -> None:
    items = [item(n, LLAVA_BENCH, "gpt", "caption") for n in range(3)]
    write(tmp_path / "r.jsonl", *((each, "answer") for each in items))
    reviews = zip(judge_items(tmp_path / "r.jsonl"), ("10 5", "8 8", "no score"), strict=True)
    write(tmp_path / "j.jsonl", *reviews, model_name="judge", judges="r.jsonl")
    (run,) = evaluate(tmp_path).report["runs"]
    (score,) = run["scores"]
    assert score["num_scored"] == 2
    assert score["values"]["score"] == pytest.approx(100 * 13 / 18)
    assert score["protocol"]["rule"] == "judged by judge"


def test_a_report_is_published_with_its_one_judge(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    write(folder / "r.jsonl", (item(1, MM_VET, "a"), "a"))
    reviews = zip(judge_items(folder / "r.jsonl"), ("0.5",), strict=True)
    write(folder / "r.judged.jsonl", *reviews, model_name="judge", judges="r.jsonl")
    store = open_store(str(tmp_path / "store"))
    entry = publish(evaluate(folder), folder=folder, images=folder, store=store)
    (run,) = evaluate(fetch(entry, store=store, into=tmp_path / "fetched")).report["runs"]
    assert run["scores"][0]["values"]["score"] == 50
    shutil.copy(folder / "r.judged.jsonl", folder / "another.jsonl")
    with pytest.raises(TitaError, match=r"another\.jsonl and r\.judged\.jsonl both judge r\.jsonl"):
        evaluate(folder)


def test_answers_without_a_judge_have_no_score(tmp_path: Path) -> None:
    write(tmp_path / "r.jsonl", (item(1, MM_VET, "a"), "a"))
    (run,) = evaluate(tmp_path).report["runs"]
    assert run["scores"] == []


def test_a_judge_that_names_its_digest_goes_on_after_an_interruption(
    start_endpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """As `tita serve` does: the judge is the same one, and not another model."""
    answers, reviews = tmp_path / "r.jsonl", tmp_path / "r.judged.jsonl"
    write(answers, *((item(n, MM_VET, "x"), "say:0.5") for n in range(3)))
    judge = resolve_endpoint("m", base_url=start_endpoint("--models").base_url)

    def judged() -> tuple[int, int]:
        stats = judge_answers(answers, judge, out=reviews, options=ClientOptions())
        return stats.num_kept, stats.num_asked

    assert judged() == (0, 3)
    first, *_ = lines = reviews.read_text().splitlines(keepends=True)
    assert {json.loads(line)["model_digest"] for line in lines} == {"model-1"}
    reviews.write_text(first)
    assert judged() == (1, 2)
    changed = first.replace('"model-1"', '"model-0"')
    reviews.write_text(changed)
    with pytest.raises(TitaError, match="answers with model_digest 'model-0', not 'model-1'"):
        judged()
