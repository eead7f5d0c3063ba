"""Scores of questions that failed, and of groups: `eval`, `compare` and the gates agree."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tita.bench.chat_response import Reply
from tita.bench.columns import BenchmarkRun
from tita.bench.compare import check_gates, compare
from tita.bench.evaluate import evaluate, read_runs
from tita.bench.questions import BenchmarkItem, write_items
from tita.bench.results_file import answer_record
from tita.bench.tasks import BenchmarkTask
from tita.bench.units import unit_names, unit_scores
from tita.errors import TitaError

Answers = Sequence[str | None]
"""One answer per question; None is a failed request, "skip" a question that was not asked."""


def write(path: Path, items: Sequence[BenchmarkItem], answers: Answers, **run: Any) -> Path:
    fields = {
        "model_name": "m",
        "weight": 0.0,
        "questions_sha256": "d",
        "num_questions": len(items),
    }
    with path.open("w") as file:
        for item, text in zip(items, answers, strict=True):
            if text == "skip":
                continue
            reply = None if text is None else Reply(text=text, response_time_s=0.1)
            record = answer_record(
                item, reply, error="" if reply else "HTTP 500: x", attempts=1, run=fields | run
            )
            file.write(json.dumps(record) + "\n")
    return path


def mmbench(num: int = 4) -> list[BenchmarkItem]:
    """`num` questions of four options in four rotations; the right letters are A, D, C, B."""
    return [
        BenchmarkItem(
            id=f"{n}-{turn}", text="Which?", references=("ADCB"[turn],), metric="circular",
            choices=("w", "x", "y", "z"), suite="mmbench", group=str(n),
        )
        for n in range(num)
        for turn in range(4)
    ]  # fmt: skip


def mme(num: int = 4) -> list[BenchmarkItem]:
    """`num` images with two questions each; the first is a yes."""
    return [
        BenchmarkItem(
            id=f"{n}-{label}", text="Is it?", references=(label,), metric="mme", suite="mme",
            category="existence", group=f"existence/{n}",
        )
        for n in range(num)
        for label in ("yes", "no")
    ]  # fmt: skip


def right(items: Sequence[BenchmarkItem]) -> list[str | None]:
    return [item.references[0] for item in items]


def run_of(path: Path) -> BenchmarkRun:
    (run,) = read_runs(path)
    return run


def values_of(path: Path) -> dict[str, Any]:
    (run,) = evaluate(path.parent).report["runs"]
    values: dict[str, Any] = run["scores"][0]["values"]
    return values


# Nine of sixteen rotations, so that of four questions one is answered in all of its rotations.
NINE = (1, 2, 3, 5, 6, 7, 9, 10, 11)


def without(items: Sequence[BenchmarkItem], missing: Sequence[int], *, by: str | None) -> Answers:
    return [by if n in missing else text for n, text in enumerate(right(items))]


@pytest.mark.parametrize("by", [None, "skip"])
def test_a_rotation_without_an_answer_is_not_right(by: str | None, tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", mmbench(), without(mmbench(), NINE, by=by))
    values = values_of(path)
    assert values["score"] == 25
    assert values["vanilla"] == 100
    assert (values["groups"], values["incomplete groups"]) == (4, 3)


@pytest.mark.parametrize("by", [None, "skip"])
def test_an_image_with_one_answer_has_no_accuracy_plus(by: str | None, tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", mme(), without(mme(), (1, 3, 5, 7), by=by))
    values = values_of(path)
    assert (values["accuracy"], values["accuracy_plus"]) == (100, 0)
    assert values["incomplete groups"] == 4


def test_complete_groups_score_as_published(tmp_path: Path) -> None:
    wrong = [("A" if n == 3 else text) for n, text in enumerate(right(mmbench()))]
    assert values_of(write(tmp_path / "r.jsonl", mmbench(), wrong))["score"] == 75
    both = ["yes"] * 8
    values = values_of(write(tmp_path / "r.jsonl", mme(), both))
    assert (values["accuracy"], values["accuracy_plus"]) == (50, 0)
    assert values_of(write(tmp_path / "r.jsonl", mme(), right(mme())))["score"] == 200


def test_eval_and_compare_agree_on_groups(tmp_path: Path) -> None:
    items = mmbench()
    # One wrong rotation in each question.
    wrong = ["B" if n % 4 == 0 else text for n, text in enumerate(right(items))]
    a = write(tmp_path / "a.jsonl", items, right(items))
    b = write(tmp_path / "b.jsonl", items, wrong, weight=0.3)
    first, second = evaluate(tmp_path).report["runs"]
    scores = [run["scores"][0]["values"]["score"] for run in (first, second)]
    summary = compare(run_of(a), run_of(b)).summary
    assert scores == [100, 0]
    assert (summary["overall"]["a"], summary["overall"]["b"]) == (1, 0)
    assert "below -30" in check_gates(summary, fail_below=-30, fail_slower=None)[0]


def test_the_unit_of_a_paired_test_is_the_group(tmp_path: Path) -> None:
    items = mmbench(8)
    wrong = ["B" if n < 4 else text for n, text in enumerate(right(items))]
    a = write(tmp_path / "a.jsonl", items, right(items))
    b = write(tmp_path / "b.jsonl", items, wrong, weight=0.3)
    overall = compare(run_of(a), run_of(b)).summary["overall"]
    # The first question is lost in three of its rotations: one unit, not three.
    assert (overall["wins"], overall["losses"], overall["ties"]) == (0, 1, 7)
    assert overall["num_pairs"] == 8
    assert overall["mcnemar_p"] == 1


def test_questions_of_one_group_are_one_unit_under_any_metric(tmp_path: Path) -> None:
    items = [
        BenchmarkItem(id=f"q{n}", text="?", references=("x",), metric="exact", group=str(n // 2))
        for n in range(8)
    ]
    a = write(tmp_path / "a.jsonl", items, ["x", "y"] * 4)
    b = write(tmp_path / "b.jsonl", items, ["x"] * 8, weight=0.3)
    overall = compare(run_of(a), run_of(b)).summary["overall"]
    assert (overall["a"], overall["b"], overall["num_pairs"]) == (0.5, 1, 4)
    assert overall["wins"] == 4


def test_mme_is_paired_by_image_and_sums_to_half_of_its_score(tmp_path: Path) -> None:
    items = mme()
    answers = ["yes", "yes", *right(items)[2:]]
    a = write(tmp_path / "a.jsonl", items, right(items))
    b = write(tmp_path / "b.jsonl", items, answers, weight=0.3)
    overall = compare(run_of(a), run_of(b)).summary["overall"]
    score = evaluate(tmp_path).report["runs"][1]["scores"][0]["values"]["score"]
    assert overall["b"] == pytest.approx(score / 200)
    # Image 0: accuracy 1/2, accuracy+ 0; the others 1 and 1. MME's score is 87.5 + 75.
    assert score == 87.5 + 75
    assert overall["num_pairs"] == 4


def test_failures_come_first_and_fail_a_gate(tmp_path: Path) -> None:
    items = mmbench()
    a = write(tmp_path / "a.jsonl", items, right(items))
    b = write(tmp_path / "b.jsonl", items, without(items, NINE, by=None), weight=0.3)
    summary = compare(run_of(a), run_of(b)).summary
    assert summary["missing"] == {"a": 0, "b": pytest.approx(9 / 16)}
    assert summary["overall"]["mean"] == -0.75, "eval says 100 and 25"
    (text,) = check_gates(summary, fail_below=-100, fail_slower=None)
    assert "m w=0.3 has no answer to 56.2 % of its questions, more than 2 %" in text
    assert check_gates(summary, fail_below=-100, fail_slower=None, max_missing=0.6) == []
    assert check_gates(summary, fail_below=None, fail_slower=None) == [], "no gate was asked for"


def test_an_interrupted_run_is_incomplete(tmp_path: Path) -> None:
    items = mmbench()
    path = write(tmp_path / "r.jsonl", items, [*right(items)[:12], *["skip"] * 4])
    (run,) = evaluate(tmp_path).report["runs"]
    assert (run["num_questions"], run["num_answered"], run["num_not_asked"]) == (16, 12, 4)
    assert run["success_rate"] == 0.75
    assert compare(run_of(path), run_of(path)).summary["missing"]["a"] == 0.25


def test_a_group_that_one_run_was_not_asked_is_not_compared(tmp_path: Path) -> None:
    items = mmbench()
    a = write(tmp_path / "a.jsonl", items, right(items))
    b = write(tmp_path / "b.jsonl", items, [*right(items)[:8], *["skip"] * 8], weight=0.3)
    overall = compare(run_of(a), run_of(b)).summary["overall"]
    assert (overall["a"], overall["b"], overall["num_pairs"]) == (1, 1, 2)


def test_units_keep_the_order_of_their_questions(tmp_path: Path) -> None:
    items = mmbench(3)
    order = [8, 0, 4, 9, 1, 5, 10, 2, 6, 11, 3, 7]
    shuffled = [items[n] for n in order]
    answers = ["A" if item.id.startswith("1-") else item.references[0] for item in shuffled]
    run = run_of(write(tmp_path / "r.jsonl", shuffled, answers))
    units = unit_scores(run, np.ones(12, dtype=bool))
    assert [name for _, name in unit_names(run, units)] == ["group 2", "group 0", "group 1"]
    assert units.values.tolist() == [1, 1, 0]


def test_max_never_cuts_a_group(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    write_items(questions, mmbench())

    def asked(limit: int) -> int:
        task = BenchmarkTask(
            questions=questions, images=tmp_path, out=tmp_path / "r.jsonl", limit=limit
        )
        return len(task.items())

    assert [asked(limit) for limit in (4, 5, 7, 8, 16, 99)] == [4, 4, 4, 8, 16, 16]
    with pytest.raises(TitaError, match="give a larger --max"):
        asked(3)


@pytest.mark.slow
def test_compare_shows_failures_first_and_exits_with_69(
    tmp_path: Path, tita_bench: Callable[..., Any]
) -> None:
    items = mmbench()
    a = write(tmp_path / "a.jsonl", items, right(items))
    b = write(tmp_path / "b.jsonl", items, without(items, NINE, by=None), weight=0.3)
    done = tita_bench("compare", a, b)
    assert done.returncode == 69, done.stderr
    assert done.stdout.startswith(
        "INCOMPLETE: m w=0.3 (b.jsonl) has no answer to 9 of 16 questions: 9 x HTTP 500\n"
    )
    gated = tita_bench("compare", a, b, "--fail-below", "-80")
    assert gated.returncode == 10
    assert "gate: m w=0.3 has no answer to 56.2 %" in gated.stderr
    passing = tita_bench("compare", a, b, "--fail-below", "-80", "--max-missing", "0.6")
    assert passing.returncode == 0, passing.stderr
    evaluated = tita_bench("eval", "--dir", tmp_path)
    assert evaluated.returncode == 0
    assert evaluated.stdout.splitlines()[2].startswith("INCOMPLETE: m w=0.3 (b.jsonl)")
    html = (tmp_path / "report.html").read_text()
    assert html.index("INCOMPLETE: m w=0.3") < html.index(">Runs<")
