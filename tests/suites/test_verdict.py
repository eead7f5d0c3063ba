"""The sentences of a report: few sets with their figures, many by name."""

import dataclasses
from pathlib import Path

import pytest

from tests.suites.test_report_page import runs_of
from tita.bench.methods import BASE, guided
from tita.suites.suite_report import SuiteReport, make_report
from tita.suites.verdict import headline, notes

NAMES = ["gqa", "textvqa", "vqav2", "vizwiz", "mmstar"]
METHODS = [BASE, guided(0.3)]


def report_on(names: list[str], folder: Path, *, same: str = "") -> SuiteReport:
    """Every set has a gain, but for `same`, whose guided answers are the base's."""
    sets = [runs_of(name, folder, per_method=150, methods=METHODS) for name in names]
    for number, each in enumerate(sets):
        if each.name == same:
            unchanged = dataclasses.replace(each.runs["base"], method=METHODS[1])
            sets[number] = dataclasses.replace(each, runs={**each.runs, METHODS[1].name: unchanged})
    return make_report(sets, METHODS)


def test_figures_of_up_to_three_sets(tmp_path: Path) -> None:
    report = report_on(NAMES[:3], tmp_path)
    english, chinese = (headline(report.findings, language=each) for each in ("en", "zh"))
    assert english.startswith("guided, w = 0.3 is better than the base on GQA (score +")
    assert english.endswith("), and worse on none of 3 sets.")
    assert " 至 +" in chinese
    assert " to " not in chinese


@pytest.mark.parametrize(
    ("same", "expected"),
    [
        ("", "guided, w = 0.3 is better than the base on all 5 sets."),
        (
            "vizwiz",
            "guided, w = 0.3 is better than the base on 4 of 5 sets (GQA, TextVQA, VQAv2, MMStar), "
            "and worse on none of 5 sets.",
        ),
    ],
)
def test_many_sets_have_names_alone(tmp_path: Path, same: str, expected: str) -> None:
    assert headline(report_on(NAMES, tmp_path, same=same).findings) == expected


def test_length_is_one_note(tmp_path: Path) -> None:
    """Sets without captions have no recall to read beside it."""
    (note,) = (line for line in notes(report_on(NAMES, tmp_path).findings) if "shorter" in line)
    assert note.startswith("GQA, TextVQA, VQAv2, VizWiz, MMStar: answers are ")
    assert note.endswith(" % shorter.")
