"""Writing a report beside its results, and reading a single results file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tita.bench.columns import Run, read_columns
from tita.bench.evaluate import Evaluation, write_json
from tita.bench.judge import read_judgements
from tita.bench.pages import html_page, text_report
from tita.errors import TitaError


def runs_of(path: Path) -> list[Run]:
    """The runs of one results file, with the judgements that lie beside it.

    Raises:
        TitaError: the file is not there or holds no results.
    """
    if not path.is_file():
        raise TitaError("no such results file", where=str(path), remedy="check the path")
    judged = path.with_name(f"{path.stem}.judged.jsonl")
    runs = read_columns(path, judgements=read_judgements(judged) if judged.is_file() else None)
    if not runs:
        raise TitaError("no results in it", where=str(path))
    return runs


def write_report(
    evaluation: Evaluation,
    *,
    folder: Path,
    images: Path,
    history: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write `report.json`, `report.html` and `benchmark_report.txt`; returns the text."""
    text = text_report(evaluation.report)
    html_page(evaluation, images=images, history=history).write(folder / "report.html")
    (folder / "benchmark_report.txt").write_text(text, encoding="utf-8")
    write_json(folder / "report.json", evaluation.report)
    return text
