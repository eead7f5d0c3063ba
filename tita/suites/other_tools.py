"""Answers in the layouts of lmms-eval and VLMEvalKit; their predictions as results files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tita.bench.chat_response import Reply
from tita.bench.choice_answers import LETTERS
from tita.bench.columns import answer_of
from tita.bench.published_files import load_json, load_lines, read_table
from tita.bench.questions import BenchmarkItem, read_items
from tita.bench.results_file import ResultsFile, answer_record, count_by_suite, read_results
from tita.errors import TitaError
from tita.storage.files import atomic_path
from tita.storage.manifest import sha256_of

Format = Literal["lmms-eval", "vlmevalkit"]
FORMATS: tuple[Format, ...] = ("lmms-eval", "vlmevalkit")
_MAX_CELL = 32_767
"""Maximum number of characters in a cell of Excel."""


def export_answers(
    results: Path, *, format: Format, out: Path, questions: Path, task: str = ""
) -> int:
    """Write the answers of a results file in another tool's layout; returns their number.

    lmms-eval: a log for its model `from_log`, which scores the answers as task `task`. Documents
    are numbered in the order of the data set, so the question file must have that order.
    VLMEvalKit: `<model>_<dataset>.xlsx` or `.tsv` with `index` and `prediction`, for its mode
    `eval`; `index` is the question's id.

    Raises:
        TitaError: a question has no answer, or the file name does not fit the format.
    """
    if format not in FORMATS:
        raise TitaError(f"no format {format!r}", remedy=f"choose one of {', '.join(FORMATS)}")
    answers = {
        str(record["question_id"]): record for record in read_results(results) if record["success"]
    }
    items = list(read_items(questions))
    missing = [item.id for item in items if item.id not in answers]
    if missing:
        raise TitaError(
            f"{len(missing)} questions have no answer, the first is {missing[0]}",
            where=str(results),
            remedy="ask them with `tita-bench run`",
        )
    records = [answers[item.id] for item in items]
    if format == "lmms-eval":
        if not task or out.suffix != ".json":
            raise TitaError(
                "lmms-eval reads logs of a task from .json files",
                where=str(out),
                remedy="give --task NAME and a file that ends in .json",
            )
        content = _lmms_eval_log(items, records, task=task)
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    else:
        _write_table(out, [_vlmevalkit_row(i, r) for i, r in zip(items, records, strict=True)])
    return len(items)


def _lmms_eval_log(
    items: Sequence[BenchmarkItem], records: Sequence[Mapping[str, Any]], *, task: str
) -> dict[str, Any]:
    model = str(records[0]["model_name"])
    logs = [
        {
            "doc_id": number,
            "doc": {"question_id": item.id},
            "target": ", ".join(item.references),
            "resps": [[answer_of(record)]],
            "filtered_resps": [answer_of(record)],
        }
        for number, (item, record) in enumerate(zip(items, records, strict=True))
    ]
    return {
        "args": {"model": "tita", "model_args": f"model={model}", "limit": None},
        "model_configs": {"task": task},
        "logs": logs,
    }


def _vlmevalkit_row(item: BenchmarkItem, record: Mapping[str, Any]) -> dict[str, str]:
    answer = item.references[0] if item.references else ""
    return {
        "index": item.id,
        "question": item.text,
        # VLMEvalKit compares with Yes and No.
        "answer": answer.capitalize() if answer in ("yes", "no") else answer,
        "category": item.category,
        **dict(zip(LETTERS, item.choices, strict=False)),
        "prediction": answer_of(record),
    }


def _write_table(out: Path, rows: Sequence[Mapping[str, str]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "prediction"))
    columns.append("prediction")
    if out.suffix == ".tsv":
        import csv

        with (
            atomic_path(out) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            table = csv.DictWriter(file, columns, delimiter="\t")
            table.writeheader()
            table.writerows(rows)
        return
    if out.suffix != ".xlsx":
        raise TitaError(
            "VLMEvalKit reads .xlsx or .tsv",
            where=str(out),
            remedy="name it <model>_<dataset>.xlsx",
        )
    import openpyxl
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    for row in rows:
        for name, text in row.items():
            # openpyxl cuts a longer text, and has no cells with control characters.
            if len(text) > _MAX_CELL or ILLEGAL_CHARACTERS_RE.search(text):
                raise TitaError(
                    f"the {name} of question {row['index']} does not fit into a cell of a workbook",
                    where=str(out),
                    remedy="give a .tsv file",
                )
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(columns)
    for row in rows:
        # A text that begins with "=" would become a formula.
        cells = [openpyxl.cell.WriteOnlyCell(sheet, value=row.get(name, "")) for name in columns]
        for cell in cells:
            cell.data_type = "s"
        sheet.append(cells)
    with atomic_path(out) as temporary:
        book.save(temporary)


def import_answers(predictions: Path, *, questions: Path, out: Path, model: str) -> int:
    """Write another tool's predictions as a results file; returns the number of answers.

    Args:
        predictions: VLMEvalKit's `.xlsx` or `.tsv` with `index` and `prediction`, lmms-eval's
            `*_samples_*.jsonl` or log, or a `.json` of objects.

    Raises:
        TitaError: the file has another format, or predictions fit no question.
    """
    items = list(read_items(questions))
    by_id = {item.id: item for item in items}
    run = {
        "model_name": model,
        "questions_sha256": sha256_of(questions),
        "weight": None,
        "max_new_tokens": None,
        "temperature": None,
        "imported": predictions.name,
    }
    num_questions = count_by_suite(items)
    unknown: list[str] = []
    num = 0
    with ResultsFile(out, run=run) as results:
        for identity, number, text in _predictions(predictions):
            item = by_id.get(identity)
            if item is None and number is not None and 0 <= number < len(items):
                item = items[number]
            if item is None:
                unknown.append(identity or str(number))
                continue
            if item.id not in results.done:
                record = answer_record(
                    item, Reply(text=text), attempts=1, run=run, num_questions=num_questions
                )
                results.append(record)
                num += 1
    if unknown:
        raise TitaError(
            f"{len(unknown)} predictions fit no question, the first is {unknown[0]!r}",
            where=str(predictions),
            remedy="give the question file of the same set, with the same ids",
        )
    return num


def _predictions(path: Path) -> Iterator[tuple[str, int | None, str]]:
    """(question id or "", number in the data set, answer) of every prediction."""
    if path.suffix in (".xlsx", ".tsv"):
        rows = _xlsx_rows(path) if path.suffix == ".xlsx" else (row for _, row in read_table(path))
        for row in rows:
            if "index" not in row or "prediction" not in row:
                raise TitaError(
                    "no columns `index` and `prediction`",
                    where=str(path),
                    remedy="give VLMEvalKit's file of predictions",
                )
            yield row["index"], None, row["prediction"]
        return
    if path.suffix == ".jsonl":
        entries: Any = load_lines(path)
    else:
        content = load_json(path)
        entries = content["logs"] if isinstance(content, dict) and "logs" in content else content
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise TitaError(
                f"an entry is no object, but {str(entry)[:40]!r}",
                where=str(path),
                remedy="give samples or a log of lmms-eval, or a list of objects",
            )
        yield _of_entry(entry, where=str(path))


def _of_entry(entry: Mapping[str, Any], *, where: str) -> tuple[str, int | None, str]:
    for name in ("prediction", "response", "answer", "text"):
        if isinstance(entry.get(name), str) and "resps" not in entry:
            identity = next((entry[k] for k in ("question_id", "index", "id") if k in entry), "")
            return str(identity), None, str(entry[name])
    # lmms-eval: [["text"]], or ["text"] after its filters.
    answer = entry.get("resps") or entry.get("filtered_resps")
    while isinstance(answer, list) and answer:
        answer = answer[0]
    if not isinstance(answer, str):
        raise TitaError(
            "an entry has no prediction", where=where, remedy="give samples of lmms-eval"
        )
    doc = entry.get("doc") or {}
    identity = next((doc[k] for k in ("question_id", "index", "id") if k in doc), "")
    number = entry.get("doc_id")
    return str(identity), number if isinstance(number, int) else None, answer


def _xlsx_rows(path: Path) -> Iterator[dict[str, str]]:
    import zipfile

    import openpyxl

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise TitaError(f"not a workbook ({error})", where=str(path)) from None
    rows = book.worksheets[0].iter_rows(values_only=True)
    header = [str(cell) for cell in next(rows, ())]
    for row in rows:
        yield {
            name: "" if cell is None else str(cell) for name, cell in zip(header, row, strict=False)
        }
    book.close()
