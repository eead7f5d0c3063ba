"""References and options in the forms that people write, and references that cannot be right."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tita.bench.questions import BenchmarkItem, read_items
from tita.bench.scoring import normalise_references, score_answer
from tita.errors import TitaError

COLOURS = ["red", "green", "blue", "black"]


def read(tmp_path: Path, *records: Any) -> list[BenchmarkItem]:
    path = tmp_path / "questions.jsonl"
    lines = ({"id": n, "text": "Which?", **record} for n, record in enumerate(records, start=1))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return list(read_items(path))


def score(item: BenchmarkItem, answer: str) -> float:
    scored = score_answer(item.metric, answer, references=item.references, choices=item.choices)
    assert scored is not None
    return scored.score


@pytest.mark.parametrize("metric", ["choice", "science-qa", "circular"])
@pytest.mark.parametrize(
    "reference",
    ["B", "b", "1", 1, 1.0, "green", "Green.", "(B)", "B.", "B)", "[b]", "B. green", "(B) green",
     "option B", "Answer: B"],
)  # fmt: skip
def test_a_right_option_in_any_form_is_its_letter(
    metric: str, reference: Any, tmp_path: Path
) -> None:
    row = {"choices": COLOURS, "answer": reference, "metric": metric, "group": "g"}
    (item,) = read(tmp_path, row)
    assert item.references == ("B",)
    assert [score(item, letter) for letter in "ABCD"] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"choices": COLOURS},
        {"options": COLOURS},
        {"choices": {"A": "red", "B": "green", "C": "blue", "D": "black"}},
        {"choices": {"B": "green", "A": "red", "D": "black", "C": "blue"}},
        {"choices": {"label": ["A", "B", "C", "D"], "text": COLOURS}},
        {"choices": json.dumps(COLOURS)},
        {"choices": "['red', 'green', 'blue', 'black']"},
        {"choices": "{'A': 'red', 'B': 'green', 'C': 'blue', 'D': 'black'}"},
        {"A": "red", "B": "green", "C": "blue", "D": "black"},
        {"A": "red", "B": "green", "C": "blue", "D": "black", "E": ""},
        {"option_a": "red", "option_b": "green", "option_c": "blue", "option_d": "black"},
        {"choice_a": "red", "choice_b": "green", "choice_c": "blue", "choice_d": "black"},
    ],
)
def test_options_in_any_form(options: dict[str, Any], tmp_path: Path) -> None:
    (item,) = read(tmp_path, {**options, "answer": "green", "metric": "choice"})
    assert item.choices == tuple(COLOURS)
    assert item.references == ("B",)


@pytest.mark.parametrize(
    ("label", "expected"),
    [("Yes", "yes"), ("yes.", "yes"), ("true", "yes"), (True, "yes"), (1, "yes"), ("1", "yes"),
     ("No", "no"), ("FALSE", "no"), (False, "no"), (0, "no"), ("n", "no")],
)  # fmt: skip
@pytest.mark.parametrize("metric", ["yes-no", "pope", "mme"])
@pytest.mark.parametrize("column", ["label", "answer", "answers"])
def test_yes_and_no_in_any_form_and_column(
    label: Any, expected: str, metric: str, column: str, tmp_path: Path
) -> None:
    value = [label] if column == "answers" else label
    (item,) = read(tmp_path, {column: value, "metric": metric, "group": "g"})
    assert item.references == (expected,)
    assert [score(item, text) for text in ("Yes", "No")] == [expected == "yes", expected == "no"]


def test_a_reference_loses_what_its_metric_removes_from_answers(tmp_path: Path) -> None:
    gqa, relaxed = read(
        tmp_path, {"answer": "Left.", "metric": "gqa"}, {"answer": "Paris.", "metric": "relaxed"}
    )
    assert score(gqa, "left") == score(gqa, "Left.") == 1
    assert score(relaxed, "Paris") == score(relaxed, "paris.") == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": COLOURS, "answer": "E", "metric": "choice"}, "'E' names none of the options"),
        ({"choices": COLOURS, "answer": 4, "metric": "choice"}, "its index counted from 0"),
        ({"choices": COLOURS, "answer": "purple", "metric": "choice"}, "write the option's letter"),
        ({"choices": COLOURS, "answer": "B. red", "metric": "choice"}, "names none of the options"),
        ({"choices": ["1", "2", "3"], "answer": "1", "metric": "choice"}, "names more than one"),
        ({"choices": ["x", "x"], "answer": "x", "metric": "choice"}, "names more than one"),
        ({"answer": "B", "metric": "choice"}, "the question has no options"),
        (
            {"choices": "red, green", "answer": "A", "metric": "choice"},
            "the only option 'red, green'",
        ),
        ({"choices": {"A": "x", "C": "y"}, "answer": "A", "metric": "choice"}, "the labels A, C"),
        ({"A": "x", "B": "y", "D": "z", "answer": "A", "metric": "choice"}, "have gaps"),
        ({"answer": "maybe", "metric": "yes-no"}, "neither yes nor no"),
        ({"answer": 2, "metric": "pope"}, "neither yes nor no"),
        ({"answers": ["yes", "no"], "metric": "yes-no"}, "both yes and no"),
        ({"answer": " ", "metric": "exact"}, "'answer' is empty"),
        ({"answer": ".", "metric": "gqa"}, "the reference is empty"),
        ({"answer": "yes", "metric": "mme"}, "the question has no `group`"),
        ({"answer": "yes", "metric": "nonsense"}, "choose one of exact, contains"),
    ],
)
def test_a_reference_that_cannot_be_right_is_a_fault_with_its_line(
    record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TitaError, match=re.escape(message)) as refused:
        read(tmp_path, {"answer": "x"}, record)
    assert "questions.jsonl:2: " in str(refused.value)
    assert refused.value.remedy


def test_empty_references_beside_others_are_dropped() -> None:
    assert normalise_references("exact", ["", "x"], where="") == ("x",)
    # An annotator's empty answer counts as one of ten.
    assert normalise_references("vqa", ["", "x"], where="") == ("", "x")
    with pytest.raises(TitaError, match="q:1: the reference is empty"):
        normalise_references("vqa", ["", " "], where="q:1")


@pytest.mark.slow
def test_run_and_eval_name_the_line_of_a_wrong_reference(
    tita_bench: Callable[..., Any], endpoint: Any, ask_file: Callable[..., Path], tmp_path: Path
) -> None:
    common = ("--base-url", endpoint.base_url, "--model", "m", "--out", tmp_path / "out.jsonl")
    questions = ask_file("say:red;", "say:B;", references=["b"], choices=COLOURS, metric="choice")
    asked = tita_bench("run", "--questions", questions, *common)
    assert asked.returncode == 0, asked.stderr
    # An older version wrote references as they were.
    lines = (tmp_path / "out.jsonl").read_text()
    older = tmp_path / "older"
    older.mkdir()
    (older / "r.jsonl").write_text(lines.replace('"references": ["B"]', '"references": ["(b)"]'))
    evaluated = tita_bench("eval", "--dir", older, "-o", "json")
    (run,) = json.loads(evaluated.stdout)["runs"]
    assert run["scores"][0]["values"]["score"] == 50
    (older / "r.jsonl").write_text(lines.replace('"references": ["B"]', '"references": ["teal"]'))
    refused = tita_bench("eval", "--dir", older)
    assert refused.returncode == 2
    assert "r.jsonl:1: the reference 'teal' names none of the options" in refused.stderr

    questions.write_text(questions.read_text().replace('["b"]', '["teal"]'))
    refused = tita_bench("run", "--questions", questions, *common)
    assert refused.returncode == 2
    assert f"{questions}:1: the reference 'teal' names none" in refused.stderr
    assert len(endpoint.asked()) == 2, "nothing is asked"


@pytest.mark.slow
def test_questions_without_a_metric_are_not_scored_and_that_is_said(
    tita_bench: Callable[..., Any], endpoint: Any, ask_file: Callable[..., Path], tmp_path: Path
) -> None:
    questions = ask_file("say:A;", "say:The;", "say:x;", "say:b;", references=["A"])
    common = ("--questions", questions, "--base-url", endpoint.base_url, "--model", "m")
    asked = tita_bench("run", *common, "--out", tmp_path / "a" / "r.jsonl")
    assert "4 of 4 questions have references but no metric" in asked.stderr
    evaluated = tita_bench("eval", "--dir", tmp_path / "a", "-o", "json")
    assert json.loads(evaluated.stdout)["runs"][0]["scores"] == []
    chosen = tita_bench("run", *common, "--metric", "exact", "--out", tmp_path / "b" / "r.jsonl")
    assert "no metric" not in chosen.stderr
    evaluated = tita_bench("eval", "--dir", tmp_path / "b", "-o", "json")
    assert json.loads(evaluated.stdout)["runs"][0]["scores"][0]["values"]["score"] == 25


def test_empty_answers_of_annotators_count_for_vqa_only(tmp_path: Path) -> None:
    ten = ["grey"] * 3 + [""] * 7
    vqa, exact, choice = read(
        tmp_path,
        {"answers": ten, "metric": "vqa"},
        {"answers": ten, "metric": "exact"},
        {"answers": ["", "B"], "choices": COLOURS, "metric": "choice"},
    )
    # Three of ten: (3 x 2/3 + 7) / 10. Three of three would be 2/3.
    assert score(vqa, "grey") == pytest.approx(0.9)
    assert score(vqa, "") == 0
    assert exact.references == ("grey",) * 3
    assert choice.references == ("B",)
