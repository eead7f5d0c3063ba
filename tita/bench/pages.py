"""Reports for people: `report.html`, one file without network needs, and `benchmark_report.txt`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tita.bench.columns import Run
from tita.bench.compare import Comparison, compare, disagreements
from tita.bench.drawing import add_history, add_latency, add_weights, headline
from tita.bench.evaluate import Evaluation, score_tables
from tita.bench.tables import columns_of, text_table
from tita.bench.versus import POINT_DIGITS, comparison_rows
from tita.errors import TitaError
from tita.report import Page

_TIMES = (
    ("response_time", "response time, s"),
    ("time_to_first_token", "time to first token, s"),
    ("time_per_output_token", "time per output token, s"),
)


def html_page(
    evaluation: Evaluation, *, images: Path, history: Sequence[Mapping[str, Any]] = ()
) -> Page:
    """The report on all runs of a folder.

    Args:
        images: the folder that image paths start from.
        history: earlier reports of the store, oldest first, as its index has them.
    """
    report = evaluation.report
    page = Page(
        f"Benchmark {report['id']}",
        subtitle=f"{report['created'][:19]}, {len(report['runs'])} runs, tita {report['tita']}",
    )
    page.heading("Runs")
    rows = [_overview(run) for run in report["runs"]]
    page.table(rows, columns=_filled(rows), digits_of={"success %": 1})
    _add_scores(page, report)
    page.heading("Times")
    for key, caption in _TIMES:
        rows = [
            {"run": run["title"], "file": run["file"], **_plain(run[key])}
            for run in report["runs"]
            if run[key]
        ]
        if rows:
            page.table(rows, caption=caption)
    add_latency(page, evaluation.runs)
    add_weights(page, report)
    _add_comparisons(page, evaluation.runs)
    add_history(page, history)
    _add_disagreements(page, evaluation.runs, images=images)
    return page


def text_report(report: Mapping[str, Any]) -> str:
    """The report as plain text."""
    lines = [f"Benchmark {report['id']}  {report['created'][:19]}  tita {report['tita']}", ""]
    rows = [_overview(run) for run in report["runs"]]
    lines += text_table([{name: row[name] for name in _filled(rows)} for row in rows])
    for key, caption in _TIMES:
        rows = [{"run": run["title"], **_plain(run[key])} for run in report["runs"] if run[key]]
        if rows:
            lines += ["", caption.capitalize(), *text_table(rows)]
    for table in score_tables(report):
        lines += ["", headline(table["protocol"]), *text_table(_score_rows(table))]
        lines += [f"  {text}" for text in _protocol_lines(table["protocol"])]
    errors = [(run["title"], run["errors"]) for run in report["runs"] if run["errors"]]
    if errors:
        lines += ["", "Errors"]
        lines += [f"  {title}: {n} x {kind}" for title, e in errors for kind, n in e.items()]
    return "\n".join(lines) + "\n"


def _overview(run: Mapping[str, Any]) -> dict[str, Any]:
    cost = run["cost"]
    return {
        "run": run["title"],
        "file": run["file"],
        "suite": run["suite"] or "",
        "questions": run["num_questions"],
        "success %": 100 * run["success_rate"],
        "mean s": run["response_time"] and run["response_time"]["mean"],
        "p95 s": run["response_time"] and run["response_time"]["p95"],
        "tokens in": run["input_tokens"],
        "tokens out": run["output_tokens"],
        "cost": f"{cost['amount']:.4f} {cost['currency']}" if cost else None,
        "checkpoint": str(run["links"].get("reward_sha256", ""))[:12],
    }


def _plain(times: Mapping[str, float]) -> dict[str, float]:
    return {"questions": times["num"], **{k: v for k, v in times.items() if k != "num"}}


def _add_scores(page: Page, report: Mapping[str, Any]) -> None:
    tables = score_tables(report)
    page.heading("Scores")
    if not tables:
        page.text("No question has a reference, so nothing could be scored.")
    for table in tables:
        page.heading(headline(table["protocol"]), level=3)
        rule = "; ".join(_protocol_lines(table["protocol"]))
        page.table(_score_rows(table), caption=rule, digits=1)
        rows = _category_rows(table)
        if rows:
            page.table(rows, columns=columns_of(rows), caption="by category", digits=1)


def _category_rows(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a run, a column a category; where a score has parts, a row a run and category."""
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


def _filled(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that have something in them."""
    return [name for name in columns_of(rows) if any(row[name] not in (None, "") for row in rows)]


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


def _add_comparisons(page: Page, runs: Sequence[Run]) -> None:
    """What each guidance weight changed against the base alone, paired by question."""
    rows = []
    for run in runs:
        base = next((other for other in runs if _is_base_of(other, run)), None)
        comparison = _compared(base, run) if base is not None else None
        if comparison is not None:
            rows += [{"run": run.title, **row} for row in comparison_rows(comparison.summary)]
    if rows:
        page.heading("Against weight 0")
        page.table(
            rows,
            caption="A is weight 0, B the run; paired, 95 % bootstrap interval.",
            digits_of=POINT_DIGITS,
        )


def _is_base_of(base: Run, run: Run) -> bool:
    same = ("model_name", "suite", "questions_sha256")
    return (
        base is not run
        and base.protocol["weight"] == 0
        and bool(run.protocol["weight"])
        and all(base.protocol[name] == run.protocol[name] for name in same)
    )


def _add_disagreements(page: Page, runs: Sequence[Run], *, images: Path) -> None:
    """Where the run with the lowest weight and the best of those comparable with it disagree."""
    ordered = sorted(runs, key=lambda run: run.protocol["weight"] or 0.0)
    for index, first in enumerate(ordered):
        found = [_compared(first, other) for other in ordered[index + 1 :]]
        scored = [c for c in found if c is not None and c.summary["overall"] and c.flipped]
        if scored:
            best = max(scored, key=lambda c: float(c.summary["overall"]["b"]))
            page.heading(f"Disagreements of {best.a.title} and {best.b.title}")
            page.gallery(disagreements(best, images=images))
            return


def _compared(a: Run, b: Run) -> Comparison | None:
    try:
        return compare(a, b)
    except TitaError:
        return None
