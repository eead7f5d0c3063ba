"""A comparison of two runs as a page, as text, and as rows of tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tita.bench.compare import Comparison, disagreements
from tita.bench.drawing import add_latency
from tita.bench.tables import text_table
from tita.report import Page

POINT_DIGITS = dict.fromkeys(("A", "B", "difference", "low", "high"), 1)
"""Decimals of the columns of `comparison_rows` that hold points of 100."""


def comparison_page(comparisons: Sequence[Comparison], *, images: Path) -> Page:
    """The report on two results files, one comparison a suite."""
    a, b = comparisons[0].a, comparisons[0].b
    page = Page(f"{b.title} against {a.title}", subtitle="Differences are B less A.")
    page.table(
        [{"": side, "run": run.title, "file": run.path.name} for side, run in (("A", a), ("B", b))]
    )
    for comparison in comparisons:
        page.heading(_comparison_title(comparison))
        page.table(
            comparison_rows(comparison.summary),
            caption="Scores in points of 100, 95 % bootstrap interval.",
            digits_of=POINT_DIGITS,
        )
        page.table(difference_rows(comparison.summary), caption="Times in s, cost a question.")
        add_latency(page, (comparison.a, comparison.b))
        cards = disagreements(comparison, images=images)
        page.text(f"{len(comparison.flipped)} questions flipped; {len(cards)} are shown.")
        page.gallery(cards)
    return page


def comparison_text(comparison: Comparison) -> str:
    """A comparison as plain text."""
    lines = [
        f"A: {comparison.a.title} ({comparison.a.path.name})",
        f"B: {comparison.b.title} ({comparison.b.path.name})",
        _comparison_title(comparison),
        "",
    ]
    for rows in (comparison_rows(comparison.summary), difference_rows(comparison.summary)):
        if rows:
            lines += [*text_table(rows), ""]
    flipped = ", ".join(comparison.flipped[:20])
    more = ", ..." if len(comparison.flipped) > 20 else ""
    lines.append(f"Flipped: {len(comparison.flipped)} questions. {flipped}{more}".rstrip())
    return "\n".join(lines) + "\n"


def _comparison_title(comparison: Comparison) -> str:
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
            "A": 100 * entry["a"],
            "B": 100 * entry["b"],
            "difference": 100 * entry["mean"],
            "low": 100 * entry["low"],
            "high": 100 * entry["high"],
            "wins": entry["wins"],
            "losses": entry["losses"],
            "ties": entry["ties"],
            "McNemar p": entry.get("mcnemar_p"),
        }
        for name, entry in entries.items()
        if entry is not None
    ]


def difference_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Differences of times and cost as rows of a table."""
    return [
        {
            "": name.replace("_", " "),
            **{key: summary[name][key] for key in ("a", "b", "mean", "low", "high", "ratio")},
        }
        for name in ("response_time", "time_to_first_token", "cost")
        if summary[name] is not None
    ]
