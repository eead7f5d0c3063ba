"""Writing a report beside its results, and into the store."""

from pathlib import Path

from tita.bench.evaluate import Evaluation, write_json
from tita.bench.pages import html_page, text_report


def write_report(
    evaluation: Evaluation, *, folder: Path, images: Path, publish: bool = False
) -> str:
    """Write `report.json`, `report.html` and `benchmark_report.txt`; returns the text."""
    text = text_report(evaluation.report)
    html_page(evaluation, images=images).write(folder / "report.html")
    (folder / "benchmark_report.txt").write_text(text, encoding="utf-8")
    write_json(folder / "report.json", evaluation.report)
    return text
