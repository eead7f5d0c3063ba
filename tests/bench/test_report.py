"""Reports: statistics, protocols, older results files, comparison and gates."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench.conftest import FIRST_FIELDS
from tita.bench.benchmark_report import comparison_text, html_page, write_report
from tita.bench.chat_response import Reply
from tita.bench.columns import read_columns
from tita.bench.compare import check_gates, compare, disagreement_cards, pair_runs
from tita.bench.evaluate import evaluate, read_runs, score_tables
from tita.bench.page_images import ImageFolder
from tita.bench.questions import BenchmarkItem, write_items
from tita.bench.registry import load_registry
from tita.bench.report_warnings import report_warnings
from tita.bench.results_file import answer_record
from tita.bench.tasks import BenchmarkTask
from tita.errors import TitaError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a results file from (item, answer or None for a failed question) and run fields."""

    def results(name: str, *answers: tuple[BenchmarkItem, str | None], **run: Any) -> Path:
        path = tmp_path / name
        fields = {"model_name": "m", "weight": None, "questions_sha256": "d1"} | run
        with path.open("w") as file:
            for number, (item, text) in enumerate(answers, start=1):
                reply = None
                if text is not None:
                    reply = Reply(
                        text=text, input_tokens=100, output_tokens=3, total_tokens=103,
                        response_time_s=number / 10, first_token_s=number / 20,
                        last_token_s=number / 10,
                    )  # fmt: skip
                record = answer_record(
                    item, reply, error="" if reply else "HTTP 500: x", attempts=1, run=fields
                )
                file.write(json.dumps(record) + "\n")
        return path

    return results


def yes_no(number: int, label: str, **fields: Any) -> BenchmarkItem:
    return BenchmarkItem(
        id=f"q{number}", text="Is it?\nYes or no.", references=(label,), metric="yes-no", **fields
    )


def exact(number: int, reference: str, **fields: Any) -> BenchmarkItem:
    return BenchmarkItem(
        id=f"q{number}", text="What?", references=(reference,), metric="exact", **fields
    )


def test_figures_of_one_run(write: Write, tmp_path: Path) -> None:
    answers = ["Yes", "Yes", "No", "who knows", None]
    labels = ["yes", "no", "no", "yes", "yes"]
    items = [yes_no(n, label, category="abc"[n % 3]) for n, label in enumerate(labels)]
    write("any name.jsonl", *zip(items, answers, strict=True))
    (run,) = evaluate(tmp_path).report["runs"]
    assert (run["num_questions"], run["num_answered"]) == (5, 4)
    assert run["success_rate"] == 0.8
    assert run["errors"] == {"HTTP 500": 1}
    times = run["response_time"]
    assert times["mean"] == pytest.approx(0.25)
    assert times["p50"] == pytest.approx(0.25)
    assert times["p99"] == pytest.approx(0.1 + 0.3 * 0.99)
    assert run["time_to_first_token"]["mean"] == pytest.approx(0.125)
    assert run["time_per_output_token"]["mean"] == pytest.approx(0.125 / 2)
    assert (run["input_tokens"], run["output_tokens"]) == (400, 12)
    assert run["cost"] is None, "no price, no cost"
    (score,) = run["scores"]
    assert score["num_scored"] == 4
    values = score["values"]
    assert values["accuracy"] == values["score"] == 50
    assert values["yes_ratio"] == 50, "of the answers: two of four say yes"
    assert (values["precision"], values["recall"], values["unparsed"]) == (50, 50, 1)
    assert score["by_category"].keys() == {"a", "b", "c"}
    assert score["protocol"]["num_questions"] == 5
    assert score["protocol"]["prompt"] == "Yes or no."
    assert score["protocol"]["questions_sha256"] == "d1"


def test_cost_is_from_the_price_of_each_line_or_the_registry(write: Write, tmp_path: Path) -> None:
    price = {"input": 2.0, "output": 10.0, "currency": "CNY"}
    write("a.jsonl", (exact(1, "x"), "x"), price=price)
    write("b.jsonl", (exact(1, "x"), "x"), model_name="vendor/other")
    registry = tmp_path / "models.yaml"
    registry.write_text(
        "models:\n  other:\n    id: vendor/other\n    price: {input: 4, output: 0, currency: EUR}\n"
    )
    first, second = evaluate(tmp_path, registry=load_registry(registry)).report["runs"]
    expected = {"amount": pytest.approx((200 + 30) / 1e6), "currency": "CNY", "num_questions": 1}
    assert first["cost"] == expected
    assert second["cost"]["amount"] == pytest.approx(400 / 1e6)


def test_different_protocols_never_share_a_column(write: Write, tmp_path: Path) -> None:
    write("a.jsonl", (exact(1, "x"), "x"), model_name="one", weight=0.0)
    write("b.jsonl", (exact(1, "x"), "y"), model_name="two", weight=0.3)
    write("c.jsonl", (exact(1, "x"), "y"), questions_sha256="d2")
    write("d.jsonl", (exact(1, "x"), "y"), max_new_tokens=5)
    write("e.jsonl", (exact(1, "x"), "y"), (exact(2, "x"), "y"))
    tables = score_tables(evaluate(tmp_path).report)
    titles = [[row["run"]["title"] for row in table["rows"]] for table in tables]
    apart = [["m (c.jsonl)"], ["m (d.jsonl)"], ["m (e.jsonl)"]]
    assert sorted(titles, key=len) == [*apart, ["one w=0", "two w=0.3"]]


def test_older_files_have_times_and_are_joined_to_references(write: Write, tmp_path: Path) -> None:
    path = write("old.jsonl", (exact(1, "red"), "The red."), (exact(2, "blue"), "green"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    old = [{key: line[key] for key in FIRST_FIELDS} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    (run,) = evaluate(tmp_path).report["runs"]
    assert run["response_time"]["num"] == 2
    assert run["time_to_first_token"] is None
    assert run["scores"] == []
    write_items(tmp_path / "questions.jsonl", [exact(1, "red"), exact(2, "blue")])
    (run,) = evaluate(tmp_path).report["runs"]
    assert run["scores"][0]["values"]["score"] == 50
    assert len(run["scores"][0]["protocol"]["questions_sha256"]) == 64


def test_eval_scores_the_answers_again(write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", (exact(1, "red"), "red"))
    path.write_text(path.read_text().replace('{"exact": 1.0}', '{"exact": 0.0}'))
    assert '"exact": 0.0' in path.read_text()
    (run,) = evaluate(tmp_path).report["runs"]
    assert run["scores"][0]["values"]["score"] == 100


def test_a_question_with_two_lines_counts_once(write: Write, tmp_path: Path) -> None:
    item = exact(1, "red")
    write("a.jsonl", (item, "blue"), (item, "red"), (item, None))
    (run,) = evaluate(tmp_path).report["runs"]
    assert (run["num_questions"], run["num_answered"]) == (1, 1)
    assert run["scores"][0]["values"]["score"] == 100


def test_mme_sums_over_tasks(write: Write, tmp_path: Path) -> None:
    def mme(number: int, task: str, image: str, label: str) -> BenchmarkItem:
        return BenchmarkItem(
            id=str(number), text="Is it?", references=(label,), metric="mme", category=task,
            group=f"{task}/{image}", suite="mme",
        )  # fmt: skip

    write(
        "a.jsonl",
        (mme(1, "existence", "a", "yes"), "Yes"),
        (mme(2, "existence", "a", "no"), "No"),
        (mme(3, "existence", "b", "yes"), "Yes"),
        (mme(4, "existence", "b", "no"), "Yes"),
        (mme(5, "code_reasoning", "a", "yes"), "Yes"),
        (mme(6, "code_reasoning", "a", "no"), "No"),
    )
    (score,) = evaluate(tmp_path).report["runs"][0]["scores"]
    assert score["by_category"]["existence"]["score"] == 75 + 50
    assert score["values"]["cognition"] == 200
    assert score["values"]["perception"] == 125
    assert score["values"]["score"] == 325


def test_circular_beside_vanilla(write: Write, tmp_path: Path) -> None:
    def turn(number: int, group: str, right: str) -> BenchmarkItem:
        return BenchmarkItem(
            id=str(number), text="Which?", references=(right,), choices=("cat", "dog"),
            metric="circular", group=group,
        )  # fmt: skip

    write(
        "a.jsonl", (turn(1, "x", "A"), "A"), (turn(2, "x", "B"), "B"),
        (turn(3, "y", "A"), "A"), (turn(4, "y", "B"), "A"),
    )  # fmt: skip
    (score,) = evaluate(tmp_path).report["runs"][0]["scores"]
    assert (score["values"]["vanilla"], score["values"]["score"]) == (75, 50)


def test_a_run_is_compared_with_the_base_that_it_can_be_compared_with(
    write: Write, tmp_path: Path
) -> None:
    answers = [(exact(n, "x"), "x") for n in range(3)]
    write("a.jsonl", *answers, weight=0.0, max_new_tokens=8)
    write("b.jsonl", *answers, weight=0.0, max_new_tokens=16)
    write("c.jsonl", *answers, weight=0.3, max_new_tokens=16)
    html = html_page(evaluate(tmp_path), images=tmp_path).html()
    assert "Against weight 0" in html


def test_report_files_agree(write: Write, tmp_path: Path) -> None:
    write("a.jsonl", (exact(1, "x"), "x"), (exact(2, "x"), "y"), model_name="one", weight=0.0)
    write("b.jsonl", (exact(1, "x"), "x"), (exact(2, "x"), "x"), model_name="one", weight=0.5)
    evaluation = evaluate(tmp_path)
    text = write_report(evaluation, folder=tmp_path, images=tmp_path)
    assert text == (tmp_path / "benchmark_report.txt").read_text()
    assert "one w=0.5" in text
    assert json.loads((tmp_path / "report.json").read_text()) == evaluation.report
    html = (tmp_path / "report.html").read_text()
    for part in ("one w=0.5", "guidance weight", "Against weight 0", "Disagreements of", "d1"):
        assert part in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_an_empty_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(TitaError, match="no results files"):
        evaluate(tmp_path)


@pytest.fixture
def pair(write: Write) -> tuple[Path, Path]:
    """A is right on 60 of 100, B on those and on 20 more, but loses 5."""
    items = [exact(n, "x") for n in range(100)]
    a = ["x" if n < 60 else "y" for n in range(100)]
    b = ["x" if 5 <= n < 80 else "y" for n in range(100)]
    order = random.Random(0).sample(range(100), 100)
    first = write("a.jsonl", *zip(items, a, strict=True), weight=0.0)
    second = write("b.jsonl", *((items[n], b[n]) for n in order), weight=0.3)
    return first, second


def test_comparison_is_paired_in_any_order(pair: tuple[Path, Path], tmp_path: Path) -> None:
    ((a, b),) = pair_runs(*map(read_runs, pair))
    comparison = compare(a, b)
    entry = comparison.summary["scores"]["exact"]
    assert (entry["a"], entry["b"]) == (0.6, 0.75)
    assert entry["mean"] == pytest.approx(0.15)
    assert 0.05 < entry["low"] < 0.10 < 0.20 < entry["high"] < 0.26
    assert (entry["wins"], entry["losses"], entry["ties"]) == (20, 5, 75)
    assert entry["mcnemar_p"] == pytest.approx(0.004077, rel=1e-3)
    assert len(comparison.flipped) == 25
    assert set(comparison.flipped[:5]) == {f"q{n}" for n in range(5)}
    cards = disagreement_cards(comparison, images=ImageFolder(tmp_path), limit=12)
    assert [card.tone for card in cards] == ["bad"] * 5 + ["good"] * 7


def test_comparison_by_category(write: Write) -> None:
    items = [exact(n, "x", category="ab"[n % 2]) for n in range(40)]
    first = write("a.jsonl", *((item, "x") for item in items), weight=0.0)
    second = write(
        "b.jsonl", *((i, "x" if i.category == "a" else "y") for i in reversed(items)), weight=0.3
    )
    ((a, b),) = pair_runs(read_runs(first), read_runs(second))
    by_category = compare(a, b).summary["by_category"]
    assert {name: entry["mean"] for name, entry in by_category.items()} == {"a": 0.0, "b": -1.0}


def test_gates(pair: tuple[Path, Path]) -> None:
    ((a, b),) = pair_runs(*map(read_runs, pair))
    better, worse = compare(a, b).summary, compare(b, a).summary
    assert check_gates(better, fail_below=10, fail_slower=1.1) == []
    assert "below +20" in check_gates(better, fail_below=20, fail_slower=None)[0]
    assert "-15.00 is below -5" in check_gates(worse, fail_below=-5, fail_slower=None)[0]
    assert "above 0.9" in check_gates(better, fail_below=None, fail_slower=0.9)[0]


def test_gates_fail_without_scores(write: Write) -> None:
    item = BenchmarkItem(id="1", text="free")
    path = write("a.jsonl", (item, "text"))
    (run,) = read_columns(path)
    assert (
        "no question could be scored"
        in check_gates(compare(run, run).summary, fail_below=-100, fail_slower=None)[0]
    )


def test_different_protocols_are_not_compared(write: Write) -> None:
    a = write("a.jsonl", (exact(1, "x"), "x"))
    b = write("b.jsonl", (exact(1, "x"), "x"), questions_sha256="d2")
    with pytest.raises(TitaError, match="differ in questions_sha256"):
        compare(*pair_runs(read_runs(a), read_runs(b))[0])
    c = write("c.jsonl", (exact(2, "x"), "x"))
    with pytest.raises(TitaError, match="share no question"):
        compare(*pair_runs(read_runs(a), read_runs(c))[0])


def test_a_run_without_any_image_says_so_first(write: Write, tmp_path: Path) -> None:
    asked = [(exact(n, "x"), "x") for n in range(3)]
    path = write("a.jsonl", *asked, (exact(3, "x"), None))
    evaluation = evaluate(tmp_path)
    (run,) = evaluation.report["runs"]
    assert (run["num_with_image"], run["num_without_image"]) == (0, 4)
    line = "NO IMAGES: m (a.jsonl) asked 4 questions, all without an image"
    text = write_report(evaluation, folder=tmp_path, images=tmp_path)
    assert [each[: len(line)] for each in text.splitlines()[2:4]] == [
        "INCOMPLETE: m (a.jsonl) has no answer to 1 of 4 questions: 1 x HTTP 500"[: len(line)],
        line,
    ]
    assert line in (tmp_path / "report.html").read_text()
    ((a, b),) = pair_runs(read_runs(path), read_runs(path))
    assert line in comparison_text(compare(a, b))


def test_a_run_with_some_images_has_no_such_warning(write: Write, tmp_path: Path) -> None:
    write("a.jsonl", (exact(1, "x"), "x"), (exact(2, "x", images=("a.png", "b.png")), "x"))
    evaluation = evaluate(tmp_path)
    (run,) = evaluation.report["runs"]
    assert (run["num_with_image"], run["num_without_image"]) == (1, 1)
    text = write_report(evaluation, folder=tmp_path, images=tmp_path)
    assert "NO IMAGES" not in text
    header, row = text.splitlines()[2:4]
    assert row[header.index("without image") :].split()[0] == "1"


def test_lines_of_older_tools_do_not_say_whether_there_was_an_image(
    write: Write, tmp_path: Path
) -> None:
    path = write("old.jsonl", (exact(1, "red", images=("a.png",)), "red"))
    line = json.loads(path.read_text())
    path.write_text(json.dumps({key: line[key] for key in FIRST_FIELDS}) + "\n")
    (run,) = evaluate(tmp_path).report["runs"]
    assert (run["num_with_image"], run["num_without_image"]) == (0, 0)
    assert report_warnings({"runs": [run]}) == []
    write_items(tmp_path / "questions.jsonl", [exact(1, "red", images=("a.png",))])
    (run,) = evaluate(tmp_path).report["runs"]
    assert run["num_with_image"] == 1, "joined to its question"


def test_options_that_the_question_does_not_show_are_reported(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def item(number: int, text: str) -> BenchmarkItem:
        return BenchmarkItem(
            id=str(number), text=text, references=("A",), choices=("a cat", "a dog"),
            metric="choice", images=("a.png",),
        )  # fmt: skip

    items = [item(1, "Which?"), item(2, "Which?\nA. A  cat\nB. a dog"), item(3, "Which? A. a cat")]
    write("a.jsonl", *((each, "A") for each in items))
    (run,) = evaluate(tmp_path).report["runs"]
    assert run["num_hidden_options"] == 2
    (line,) = report_warnings({"runs": [run]})
    assert line.startswith("OPTIONS NOT SHOWN: m (a.jsonl) asked 2 questions for an option")
    (tmp_path / "a.png").touch()
    write_items(tmp_path / "q.jsonl", items)
    BenchmarkTask(questions=tmp_path / "q.jsonl", images=tmp_path, out=tmp_path / "out").items()
    assert "2 of 3 questions do not show their options" in capsys.readouterr().err
