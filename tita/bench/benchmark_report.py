"""Writes `report.html`, `benchmark_report.txt`, `report.json`, and the page of a comparison."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tita.bench.columns import BenchmarkRun
from tita.bench.compare import RunComparison, compare, disagreement_cards
from tita.bench.evaluate import Evaluation, score_tables
from tita.bench.load_report import (
    INTERVALS,
    SERVER_COUNTS,
    SERVER_TIMES,
    add_conditions,
    add_load,
    error_rows,
    figures_csv,
    filled_columns,
    length_rows,
    load_rows,
    server_count_rows,
    server_time_rows,
    sweep_captions,
    time_tables,
)  # fmt: skip
from tita.bench.page_images import ImageFolder
from tita.bench.plots import add_history, add_latency, add_weights, score_title
from tita.bench.report_warnings import report_warnings, run_warnings
from tita.bench.wrong_answers import add_wrong_answers
from tita.errors import TitaError
from tita.json_text import dump_json
from tita.report import Page
from tita.storage.files import atomic_path, naming_full_disk
from tita.terminal import say


def html_page(
    evaluation: Evaluation, *, images: Path, history: Sequence[Mapping[str, Any]] = ()
) -> Page:
    """The HTML report on all runs of a folder.

    Args:
        images: folder that image paths are relative to.
        history: index entries of earlier reports in the store, oldest first.
    """
    report = evaluation.report
    page = Page(
        f"Benchmark {report['id']}",
        subtitle=f"{report['created'][:19]}, {len(report['runs'])} runs, tita {report['tita']}",
    )
    for text in report_warnings(report):
        page.text(text)
    errors = error_rows(report)
    if errors:
        page.heading("Errors")
        page.table(errors)
    page.heading("Runs")
    rows = [_overview_row(run) for run in report["runs"]]
    page.table(rows, columns=filled_columns(rows), digits_of={"success %": 1})
    _add_scores(page, report)
    add_load(page, report)
    add_latency(page, evaluation.runs)
    add_weights(page, report)
    _add_comparisons(page, evaluation.runs)
    add_history(page, history)
    found = ImageFolder(images)
    _add_disagreements(page, evaluation.runs, images=found)
    add_wrong_answers(page, evaluation.runs, images=found)
    add_conditions(page, report)
    add_complaint(page, found)
    return page


def text_report(report: Mapping[str, Any]) -> str:
    """The report as plain text."""
    lines = [f"Benchmark {report['id']}  {report['created'][:19]}  tita {report['tita']}", ""]
    warnings = report_warnings(report)
    lines += [*warnings, ""] if warnings else []
    errors = error_rows(report)
    if errors:
        lines += ["Errors", *text_table(errors), ""]
    rows = [_overview_row(run) for run in report["runs"]]
    lines += text_table([{name: row[name] for name in filled_columns(rows)} for row in rows])
    rows = load_rows(report)
    lines += ["", "Load"]
    lines += text_table([{name: row[name] for name in filled_columns(rows)} for row in rows])
    lines += [f"  {caption}" for caption in sweep_captions(report)]
    tables = time_tables(report)
    for title, rows in tables:
        lines += ["", title, *text_table(rows)]
    if tables:
        lines += [f"  {INTERVALS}"]
    for title, rows in (
        ("Tokens per request", length_rows(report)),
        (SERVER_TIMES, server_time_rows(report)),
        (SERVER_COUNTS, server_count_rows(report)),
    ):
        if rows:
            lines += ["", title, *text_table(rows)]
    for table in score_tables(report):
        lines += ["", score_title(table["protocol"]), *text_table(_score_rows(table))]
        lines += [f"  {text}" for text in _protocol_lines(table["protocol"])]
    return "\n".join(lines) + "\n"


def _overview_row(run: Mapping[str, Any]) -> dict[str, Any]:
    cost = run["cost"]
    # Figures of several loads in one have no meaning.
    (load,) = run["loads"] if len(run["loads"]) == 1 else ({},)
    return {
        "run": run["title"],
        "file": run["file"],
        "suite": run["suite"] or "",
        "questions": run["num_questions"],
        "without image": run["num_without_image"] or None,
        "success %": 100 * run["success_rate"],
        "mean ms": run["response_time"] and run["response_time"]["mean"] * 1000,
        "p95 ms": run["response_time"] and run["response_time"]["p95"] * 1000,
        "TTFT p95": _p95_ms(load.get("time_to_first_token")),
        "ITL p95": _p95_ms(load.get("time_per_output_token")),
        "requests/s": load.get("requests_per_s"),
        "tokens in": run["input_tokens"],
        "tokens out": run["output_tokens"],
        "cost": f"{cost['amount']:.4f} {cost['currency']}" if cost else None,
        "checkpoint": str(run["links"].get("reward_sha256", ""))[:12],
    }


def _p95_ms(times: Mapping[str, Any] | None) -> float | None:
    return times["p95"] * 1000 if times else None


def _add_scores(page: Page, report: Mapping[str, Any]) -> None:
    tables = score_tables(report)
    page.heading("Scores")
    if not tables:
        page.text("No question has a reference, so nothing could be scored.")
    for table in tables:
        page.heading(score_title(table["protocol"]), level=3)
        rule = "; ".join(_protocol_lines(table["protocol"]))
        page.table(_score_rows(table), caption=rule, digits=1)
        rows = _category_rows(table)
        if rows:
            page.table(rows, columns=columns_of(rows), caption="by category", digits=1)


def _category_rows(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per run and one column per category; one row per run and category for parts."""
    kinds = {kind for row in table["rows"] for kind in row["by_category"]}
    if len(kinds) < 2:
        return []
    if all(len(row["values"]) == 1 for row in table["rows"]):
        return [
            {
                "run": row["run"]["title"],
                **{kind: values["score"] for kind, values in row["by_category"].items()},
            }
            for row in table["rows"]
        ]
    return [
        {"run": row["run"]["title"], "category": kind, **values}
        for row in table["rows"]
        for kind, values in row["by_category"].items()
    ]


def _score_rows(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {
            "run": row["run"]["title"],
            "file": row["run"]["file"],
            "scored": row["num_scored"],
            **row["values"],
        }
        for row in table["rows"]
    ]
    if len({row["run"] for row in rows}) == len(rows):
        rows = [{name: row[name] for name in row if name != "file"} for row in rows]
    return [{name: row.get(name) for name in columns_of(rows)} for row in rows]


def _protocol_lines(protocol: Mapping[str, Any]) -> list[str]:
    digest = (protocol["questions_sha256"] or "not known")[:12]
    lines = [
        f"Rule: {protocol['rule']}",
        f"Prompt ends: {protocol['prompt']}",
        f"Questions sha256 {digest}, max new tokens {protocol['max_new_tokens']}, "
        f"temperature {protocol['temperature']}",
    ]
    if protocol["judge_prompt"]:
        lines.append(f"Judge's prompt: {protocol['judge_prompt']}")
    return lines


def _add_comparisons(page: Page, runs: Sequence[BenchmarkRun]) -> None:
    """Paired comparisons of each guidance weight with weight 0."""
    rows = []
    for run in runs:
        found = (_try_compare(base, run) for base in runs if _is_base_of(base, run))
        # Runs of another length or temperature cannot be compared.
        comparison = next((each for each in found if each is not None), None)
        if comparison is not None:
            rows += [{"run": run.title, **row} for row in comparison_rows(comparison.summary)]
    if rows:
        page.heading("Against weight 0")
        page.table(
            rows,
            caption="A is weight 0, B the run; paired, 95 % bootstrap interval.",
            digits_of=_POINT_DIGITS,
        )


def _is_base_of(base: BenchmarkRun, run: BenchmarkRun) -> bool:
    same = ("model_name", "suite", "questions_sha256")
    return (
        base is not run
        and base.protocol["weight"] == 0
        and bool(run.protocol["weight"] or run.protocol["weights"])
        and all(base.protocol[name] == run.protocol[name] for name in same)
    )


def _add_disagreements(page: Page, runs: Sequence[BenchmarkRun], *, images: ImageFolder) -> None:
    """Gallery of questions on which the run of the lowest weight and the best other run differ."""
    ordered = sorted(runs, key=lambda run: run.total_weight or 0.0)
    for index, first in enumerate(ordered):
        found = [_try_compare(first, other) for other in ordered[index + 1 :]]
        scored = [c for c in found if c is not None and c.summary["overall"] and c.flipped]
        if scored:
            best = max(scored, key=lambda c: float(c.summary["overall"]["b"]))
            page.heading(f"Disagreements of {best.a.title} and {best.b.title}")
            page.gallery(disagreement_cards(best, images=images))
            return


def _try_compare(a: BenchmarkRun, b: BenchmarkRun) -> RunComparison | None:
    try:
        return compare(a, b)
    except TitaError:
        return None


_POINT_COLUMNS = {"A": "a", "B": "b", "difference": "mean", "low": "low", "high": "high"}
"""Columns of `comparison_rows` in points of 100, and their keys in the summary."""
_POINT_DIGITS = dict.fromkeys(_POINT_COLUMNS, 1)


def comparison_page(comparisons: Sequence[RunComparison], *, images: Path) -> Page:
    """The HTML report on two results files, with one comparison per suite."""
    a, b = comparisons[0].a, comparisons[0].b
    found = ImageFolder(images)
    page = Page(f"{b.title} against {a.title}", subtitle="Differences are B - A.")
    for comparison in comparisons:
        for text in _comparison_warnings(comparison):
            page.text(text)
    page.table(
        [{"": side, "run": run.title, "file": run.path.name} for side, run in (("A", a), ("B", b))]
    )
    for comparison in comparisons:
        page.heading(_comparison_title(comparison))
        page.table(
            comparison_rows(comparison.summary),
            caption="Scores in points of 100, 95 % bootstrap interval.",
            digits_of=_POINT_DIGITS,
        )
        page.table(
            difference_rows(comparison.summary),
            caption="Times in milliseconds, cost per question.",
        )
        for text in difference_notes(comparison.summary):
            page.text(text)
        add_latency(page, (comparison.a, comparison.b))
        cards = disagreement_cards(comparison, images=found)
        page.text(f"{len(comparison.flipped)} questions flipped; {len(cards)} are shown.")
        page.gallery(cards)
    add_complaint(page, found)
    return page


def add_complaint(page: Page, images: ImageFolder) -> None:
    """Say on the page and in the terminal which images were not found."""
    complaint = images.complaint()
    if complaint:
        page.text(complaint)
        say(complaint)


def difference_notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the differences must know: other loads, other endpoints or machines."""
    notes = []
    if summary["loads_differ"]:
        compared = "are compared" if summary["response_time"] else "are not compared"
        notes.append(f"Times of different loads {compared}: {summary['loads_differ']}.")
    a, b = (", ".join(sorted(names)) for names in summary["endpoints"])
    if a != b:
        notes.append(f"A: {a or 'conditions not recorded'}. B: {b or 'conditions not recorded'}.")
    return notes


def comparison_text(comparison: RunComparison) -> str:
    """A comparison as plain text."""
    warnings = _comparison_warnings(comparison)
    lines = [*warnings, ""] if warnings else []
    lines += [
        f"A: {comparison.a.title} ({comparison.a.path.name})",
        f"B: {comparison.b.title} ({comparison.b.path.name})",
        _comparison_title(comparison),
        "",
    ]
    for rows in (comparison_rows(comparison.summary), difference_rows(comparison.summary)):
        if rows:
            lines += [*text_table(rows), ""]
    lines += difference_notes(comparison.summary)
    flipped = ", ".join(comparison.flipped[:20])
    more = ", ..." if len(comparison.flipped) > 20 else ""
    lines.append(f"Flipped: {len(comparison.flipped)} questions. {flipped}{more}".rstrip())
    return "\n".join(lines) + "\n"


def _comparison_warnings(comparison: RunComparison) -> list[str]:
    """What is missing in either run, one line each."""
    summary = comparison.summary
    lines = run_warnings([summary["a"], summary["b"]])
    for side, run in (("A", comparison.a), ("B", comparison.b)):
        only = len(run.rows) - summary["num_shared"]
        if only:
            lines.append(f"{only} questions of {side} were not asked in the other run")
    return lines


def _comparison_title(comparison: RunComparison) -> str:
    suite = comparison.a.protocol["suite"] or "questions"
    return f"{suite}: {comparison.summary['num_shared']} shared"


def comparison_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Score differences as rows of a table, in points of 100."""
    entries = dict(summary["scores"])
    if len(summary["by_category"]) > 1:
        entries |= summary["by_category"]
    if len(entries) > 1:
        entries["all"] = summary["overall"]
    return [
        {
            "questions": name,
            **{column: 100 * entry[key] for column, key in _POINT_COLUMNS.items()},
            **{key: entry[key] for key in ("wins", "losses", "ties")},
            "McNemar p": entry.get("mcnemar_p"),
        }
        for name, entry in entries.items()
        if entry is not None
    ]


def difference_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Differences of times and cost as rows of a table."""
    scale = {"response_time": 1000, "time_to_first_token": 1000, "time_per_output_token": 1000}
    titles = {"time_per_output_token": "inter-token latency"}
    return [
        {
            "": titles.get(name, name.replace("_", " ")) + (", ms" if name in scale else ""),
            **{
                key: None if entry[key] is None else entry[key] * scale.get(name, 1)
                for key in ("a", "b", "mean", "low", "high")
            },
            "ratio": entry["ratio"],
        }
        for name in (*scale, "cost")
        if (entry := summary[name]) is not None
    ]


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Column names of all rows, in the order of first use."""
    return list(dict.fromkeys(name for row in rows for name in row))


def text_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table with aligned columns; None is a dash, floats have three decimals."""
    names = columns_of(rows)
    cells = [names]
    for row in rows:
        values = [row.get(name) for name in names]
        cells.append(
            ["-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in values]
        )
    widths = [max(len(line[index]) for line in cells) for index in range(len(names))]
    return [
        "  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    ]


def write_report(
    evaluation: Evaluation,
    *,
    folder: Path,
    images: Path,
    history: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write `report.json`, `report.html`, `benchmark_report.txt` and `figures.csv`.

    Returns:
        The text.
    """
    text = text_report(evaluation.report)
    with naming_full_disk(folder):
        html_page(evaluation, images=images, history=history).write(folder / "report.html")
        (folder / "benchmark_report.txt").write_text(text, encoding="utf-8")
        (folder / "figures.csv").write_text(figures_csv(evaluation.report), encoding="utf-8")
        with atomic_path(folder / "report.json") as temporary:
            content = dump_json(evaluation.report, indent=2, ensure_ascii=False)
            temporary.write_text(content + "\n", encoding="utf-8")
    return text
