"""The page of a self-test: verdict, checks, and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tita.report import Page
from tita.selftest.checks import CheckResult

_GROUPS = {"right": "Right", "fast": "Fast", "fits": "Fits"}


def write_page(path: Path, *, machine: Mapping[str, Any], results: Sequence[CheckResult]) -> None:
    """Write `selftest.html`."""
    page = Page("tita selftest", subtitle=f"{machine['device']}, {machine['date']}")
    page.text(verdict(results))
    for group, title in _GROUPS.items():
        some = [result for result in results if result.group == group]
        if not some:
            continue
        page.heading(title)
        page.table(
            [
                {
                    "check": result.name,
                    "result": result.outcome,
                    "what holds": result.about,
                    "detail": result.detail,
                    "seconds": result.seconds,
                }
                for result in some
            ],
            digits=1,
        )
    page.heading("Figures")
    page.table(
        [
            {"check": result.name, "figure": name.replace("_", " "), "value": value}
            for result in results
            for name, value in result.figures.items()
        ],
        digits=4,
    )
    page.heading("Machine")
    page.table([{"": name, "value": str(value)} for name, value in machine.items()])
    page.write(path)


def verdict(results: Sequence[CheckResult]) -> str:
    """One sentence: how many checks passed, and the names of the others."""
    named = {
        outcome: [result.name for result in results if result.outcome == outcome]
        for outcome in ("passed", "failed", "skipped")
    }
    text = f"{len(named['passed'])} of {len(results)} checks passed."
    if named["failed"]:
        text += f" Failed: {', '.join(named['failed'])}."
    if named["skipped"]:
        text += f" Skipped: {', '.join(named['skipped'])}."
    return text
