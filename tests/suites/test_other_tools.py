"""Files of lmms-eval and VLMEvalKit: written, and read back as results files."""

import json
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from tita.bench.chat_response import Reply
from tita.bench.questions import BenchmarkItem, read_items, write_items
from tita.bench.results_file import ResultsFile, answer_record, read_results
from tita.cli.main import tita_bench
from tita.errors import TitaError
from tita.storage.manifest import sha256_of
from tita.suites.other_tools import export_answers, import_answers

ANSWERS = {"7": "=1+1 is two", "8": "Yes, a \t tab\nand a line", "9": "naïve 答案"}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    items = [
        BenchmarkItem(id="7", text="What?\nA. x\nB. y", references=("B",), choices=("x", "y"),
                      metric="choice", category="math"),
        BenchmarkItem(id="8", text="Is it?", references=("yes",), metric="yes-no"),
        BenchmarkItem(id="9", text="Which?", references=("a", "b"), metric="exact"),
    ]  # fmt: skip
    write_items(path, items)
    return path


@pytest.fixture
def results(tmp_path: Path, questions: Path) -> Path:
    run = {"model_name": "m", "questions_sha256": sha256_of(questions), "weight": 0.3,
           "max_new_tokens": 8, "temperature": 0.0}  # fmt: skip
    with ResultsFile(tmp_path / "answers.jsonl", run=run) as file:
        # Answers come in any order.
        for item in reversed(list(read_items(questions))):
            file.append(answer_record(item, Reply(text=ANSWERS[item.id]), attempts=1, run=run))
    return tmp_path / "answers.jsonl"


def answers_in(path: Path) -> dict[str, str]:
    return {record["question_id"]: record["response"] for record in read_results(path)}


@pytest.mark.parametrize("name", ["m_Set.xlsx", "m_Set.tsv"])
def test_vlmevalkit_and_back(tmp_path: Path, questions: Path, results: Path, name: str) -> None:
    out = tmp_path / name
    assert export_answers(results, format="vlmevalkit", out=out, questions=questions) == 3
    if name.endswith("xlsx"):
        sheet = openpyxl.load_workbook(out).worksheets[0]
        header, *rows = sheet.iter_rows(values_only=True)
        assert header == ("index", "question", "answer", "category", "A", "B", "prediction")
        assert [row[0] for row in rows] == ["7", "8", "9"]
        assert rows[0][2:6] == ("B", "math", "x", "y")
        assert rows[0][6] == "=1+1 is two"  # no formula
        assert rows[1][2] == "Yes"
    back = tmp_path / "back.jsonl"
    assert import_answers(out, questions=questions, out=back, model="other") == 3
    assert answers_in(back) == ANSWERS
    (first,) = [r for r in read_results(back) if r["question_id"] == "8"]
    assert first["scores"] == {"yes-no": 1}


def test_lmms_eval_and_back(tmp_path: Path, questions: Path, results: Path) -> None:
    out = tmp_path / "logs" / "m.json"
    out.parent.mkdir()
    export_answers(results, format="lmms-eval", out=out, questions=questions, task="pope")
    log = json.loads(out.read_text())
    # What lmms-eval's model `from_log` reads.
    assert log["model_configs"]["task"] == "pope"
    assert log["args"]["limit"] is None
    assert {entry["doc_id"]: entry["resps"][0][0] for entry in log["logs"]} == dict(
        enumerate(ANSWERS.values())
    )
    assert import_answers(out, questions=questions, out=tmp_path / "b.jsonl", model="o") == 3
    assert answers_in(tmp_path / "b.jsonl") == ANSWERS


def test_samples_of_lmms_eval_are_found_by_number(tmp_path: Path, questions: Path) -> None:
    samples = tmp_path / "20260101_samples_x.jsonl"
    lines: list[dict[str, Any]] = [
        {"doc_id": n, "doc": {"image": None}, "target": "x", "resps": [[text]],
         "filtered_resps": [text.upper()]}
        for n, text in enumerate(ANSWERS.values())
    ]  # fmt: skip
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    import_answers(samples, questions=questions, out=tmp_path / "b.jsonl", model="o")
    assert answers_in(tmp_path / "b.jsonl") == ANSWERS


def test_refusals(tmp_path: Path, questions: Path, results: Path) -> None:
    with pytest.raises(TitaError, match="lmms-eval reads logs"):
        export_answers(results, format="lmms-eval", out=tmp_path / "x.json", questions=questions)
    with pytest.raises(TitaError, match="VLMEvalKit reads"):
        export_answers(results, format="vlmevalkit", out=tmp_path / "x.csv", questions=questions)
    other = tmp_path / "x.json"
    other.write_text(json.dumps([{"index": "77", "prediction": "a"}]))
    with pytest.raises(TitaError, match="predictions fit no question"):
        import_answers(other, questions=questions, out=tmp_path / "b.jsonl", model="o")
    broken = tmp_path / "x.xlsx"
    broken.write_text("no workbook")
    with pytest.raises(TitaError, match="not a workbook"):
        import_answers(broken, questions=questions, out=tmp_path / "c.jsonl", model="o")
    other.write_text(json.dumps({"results": {"pope": 1}}))
    with pytest.raises(TitaError, match="an entry is no object, but 'results'"):
        import_answers(other, questions=questions, out=tmp_path / "d.jsonl", model="o")
    text = results.read_text()
    for answer in ("x" * 32_768, "a \\u0001"):
        results.write_text(text.replace(ANSWERS["7"], answer))
        with pytest.raises(
            TitaError, match="the prediction of question 7 does not fit into a cell"
        ):
            export_answers(
                results, format="vlmevalkit", out=tmp_path / "x.xlsx", questions=questions
            )
    results.write_text(text)
    lines = results.read_text().splitlines()[:2]
    results.write_text("\n".join(lines) + "\n")
    with pytest.raises(TitaError, match="1 questions have no answer, the first is 7"):
        export_answers(results, format="vlmevalkit", out=tmp_path / "x.tsv", questions=questions)


def test_the_commands(tmp_path: Path, questions: Path, results: Path) -> None:
    table, back = tmp_path / "m_Set.xlsx", tmp_path / "back.jsonl"
    for command in (
        ("export", "--results", results, "--questions", questions, "--format", "vlmevalkit",
         "--out", table),
        ("import", "--predictions", table, "--questions", questions, "--out", back),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            tita_bench([str(part) for part in command])
        assert not ended.value.code
    assert answers_in(back) == ANSWERS
