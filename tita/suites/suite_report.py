"""The report of a suite or of a comparison of methods: a page, a text, and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import tita
from tita.bench.benchmark_report import text_table
from tita.bench.methods import Method
from tita.json_text import dump_json
from tita.report import Page, add_legend, new_axes
from tita.storage.files import atomic_path
from tita.suites.comparison import SetComparison, SetRuns, compare_method, correct_for_number
from tita.suites.flipped_answers import add_flipped
from tita.suites.front import Front, pareto_front
from tita.suites.report_text import columns, text
from tita.suites.verdict import Findings, Language, describe, find, headline, notes

_FORMAT = 1
_CONTROL_MARKERS = {"other images": ("^", "▲"), "before DPO": ("s", "■")}
"""Of matplotlib, and as a character for the caption."""
_STYLES = ("o-", "s--", "^:", "D-.")
_GOOD, _BAD, _PLAIN, _CONTROL = "#2a9d5c", "#d1584f", "#4a7fb5", "#999999"


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteReport:
    """What a report shows."""

    sets: Sequence[SetRuns]
    methods: Sequence[Method]
    findings: Findings
    all_comparisons: Sequence[SetComparison]
    """Every method against the base on every set, all questions, corrected together."""
    front_of: tuple[str, str] | None = None
    """Two figures of the first set whose front is shown."""

    def of_method(self, method: Method) -> list[SetComparison]:
        """The comparisons of one method."""
        return [each for each in self.all_comparisons if each.method.name == method.name]

    @property
    def num_answers(self) -> int:
        """Number of answers of all methods to all sets."""
        return sum(run.num_answered for runs in self.sets for run in runs.runs.values())


def make_report(
    sets: Sequence[SetRuns],
    methods: Sequence[Method],
    *,
    front_of: tuple[str, str] | None = None,
) -> SuiteReport:
    """Compare every method with the base on every set."""
    found = [
        compare_method(runs, method) for method in methods if not method.is_base for runs in sets
    ]
    return SuiteReport(
        sets=sets,
        methods=methods,
        findings=find(sets, methods),
        all_comparisons=correct_for_number([each for each in found if each is not None]),
        front_of=front_of,
    )


def method_rows(report: SuiteReport) -> list[dict[str, Any]]:
    """One row per method: what it brings against the base, and what it costs per question."""
    rows: list[dict[str, Any]] = []
    for method in report.methods:
        runs = [s.runs[method.name] for s in report.sets if method.name in s.runs]
        own = report.of_method(method)
        row: dict[str, Any] = {"method": method.name, "gain": None, "p": None}
        if own:
            row["gain"] = sum(each.gain for each in own) / len(own)
            row["p"] = min(each.corrected_p or 1.0 for each in own)
        if len(report.sets) == 1 and own:
            row["low"], row["high"] = sorted(
                own[0].sign * bound for bound in (own[0].main.low, own[0].main.high)
            )
        for name in ("input tokens", "output tokens", "seconds", "price"):
            known = [run.cost[name] for run in runs if name in run.cost]
            if known:
                row[name] = sum(known) / len(known)
        rows.append(row)
    base = next((row.get("seconds") for row in rows if row["method"] == "base"), None)
    for row in rows:
        if base and row.get("seconds"):
            row["times base"] = row["seconds"] / base
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]


def figure_rows(comparisons: Sequence[SetComparison]) -> list[dict[str, Any]]:
    """One row per set and figure; the main figure's p-value is corrected."""
    return [
        {
            "set": each.set.title if name == each.set.scorer.main else "",
            "figure": name,
            "base": figure.a,
            each.method.name: figure.b,
            "difference": figure.difference,
            "low": figure.low,
            "high": figure.high,
            "p": figure.p_value,
            "p corrected": each.corrected_p if name == each.set.scorer.main else None,
            "units": each.num_units if name == each.set.scorer.main else None,
        }
        for each in comparisons
        for name, figure in each.figures.items()
    ]


def front_points(report: SuiteReport) -> dict[str, tuple[float, float]]:
    """Two figures by method, signed so that larger is better; controls are no methods."""
    assert report.front_of is not None
    runs = report.sets[0]
    points: dict[str, tuple[float, float]] = {}
    names = report.front_of
    signs = [runs.scorer.figures[name].better or 1 for name in names]
    for method in report.methods:
        if method.control:
            continue
        own = next((e for e in report.of_method(method) if e.set is runs), None)
        if own is not None and all(name in own.figures for name in names):
            first, second = (own.figures[name] for name in names)
            points[method.name] = (signs[0] * first.b, signs[1] * second.b)
            points["base"] = (signs[0] * first.a, signs[1] * second.a)
    return points


def text_report(report: SuiteReport) -> str:
    """The report as plain text, in English."""
    findings = report.findings
    lines = [headline(findings), "", *notes(findings), *_others(report, "en")]
    lines += _missing(report, "en")
    lines += ["", *text_table(method_rows(report))]
    if findings.comparisons:
        lines += ["", *text_table(figure_rows(findings.comparisons))]
    if findings.controls:
        lines += ["", *text_table([_control_row(each) for each in findings.controls])]
    if report.front_of is not None:
        lines += ["", front_sentence(report)]
    return "\n".join(lines) + "\n"


def _control_row(control: SetComparison) -> dict[str, Any]:
    main = control.main
    return {
        "control": control.method.name, "set": control.set.title,
        "figure": control.set.scorer.main, "difference": main.difference, "low": main.low,
        "high": main.high, "p": main.p_value,
    }  # fmt: skip


def front_sentence(report: SuiteReport, language: Language = "en") -> str:
    """The methods of the front and its hypervolume; empty if no method has both figures."""
    points = front_points(report)
    if not points:
        return ""
    front = pareto_front(points)
    x, y = (f"{abs(value):.1f}" for value in front.reference)
    return text(
        "front caption", language, names=", ".join(front.names), x=x, y=y,
        volume=f"{front.hypervolume:.1f}",
    )  # fmt: skip


def _others(report: SuiteReport, language: Language) -> list[str]:
    """The methods beside that of the verdict that differ from the base, one line each."""
    shown, choice = report.findings.method, report.findings.choice
    # Of the weights, the chosen one speaks: others are better by the luck of several tries.
    left_out = {shown.name if shown else "", *(choice.gains if choice is not None else ())}
    lines = []
    for method in report.methods:
        if method.is_base or method.control or method.name in left_out:
            continue
        found = [each for each in report.of_method(method) if each.is_significant]
        for name, own in (
            ("other methods", [each for each in found if each.gain > 0]),
            ("worse methods", [each for each in found if each.gain < 0]),
        ):
            if own:
                sets = ", ".join(map(describe, own))
                lines.append(text(name, language, method=method.name, sets=sets))
    return lines


def _missing(report: SuiteReport, language: Language) -> list[str]:
    """The questions without a scored answer, one line per set and number of them."""
    lines = []
    for runs in report.sets:
        methods: dict[int, list[str]] = {}
        for method in report.methods:
            methods.setdefault(runs.num_missing(method), []).append(method.name)
        lines += [
            text(
                "missing whole" if runs.scorer.needs_whole_units else "missing", language,
                title=runs.title, number=f"{number:,}", all=f"{runs.num_questions:,}",
                methods="; ".join(names),
            )
            for number, names in methods.items()
            if number > 0
        ]  # fmt: skip
    return lines


def html_page(report: SuiteReport, *, language: Language = "en") -> Page:
    """The page: verdict and forest plot first, then curves, costs, figures and changed answers."""
    findings = report.findings
    page = Page(
        text("title", language),
        subtitle=text(
            "subtitle", language, answers=f"{report.num_answers:,}", sets=len(report.sets),
            methods=len(report.methods),
        ),
        language=language,
    )  # fmt: skip
    tone = {"gain": "good", "loss": "bad", "mixed": ""}.get(findings.outcome, "")
    page.embed(f'<p class="verdict {tone}">{escape(headline(findings, language=language))}</p>')
    more = (*_others(report, language), *_missing(report, language))
    for line in (*notes(findings, language=language), *more):
        page.text(line)
    if findings.comparisons:
        page.heading(text("forest", language))
        page.figure(
            _forest(findings, language),
            caption=text("forest caption", language, controls=_control_names(findings, language)),
        )
    _add_curves(page, report, language)
    page.heading(text("methods", language))
    rows = method_rows(report)
    page.table(columns(rows, language), caption=text("methods caption", language), digits=2)
    controls = {method.name for method in report.methods if method.control}
    _add_quality_cost(page, [r for r in rows if r["method"] not in controls], language)
    if report.front_of is not None:
        _add_front(page, report, language)
    if findings.choice is not None:
        page.heading(text("choice", language))
        choice_rows = [{"method": n, "gain": v} for n, v in findings.choice.gains.items()]
        choice_rows = columns(choice_rows, language)
        page.table(choice_rows, caption=text("choice caption", language), digits=2)
    if findings.comparisons:
        page.heading(text("sets", language))
        page.table(
            columns(figure_rows(findings.comparisons), language),
            caption=text("sets caption", language, number=len(findings.comparisons)),
            digits=2,
            digits_of={"p": 4, "p corrected": 4, "校正后 p": 4},
        )
    shown = findings.method or next((m for m in report.methods if not m.is_base), None)
    if shown is not None:
        add_flipped(page, report.sets, method=shown, language=language)
    return page


def _forest(findings: Findings, language: Language) -> Any:
    rows = list(findings.comparisons)
    axes = new_axes(
        xlabel=text("points", language), width=6.4, height=1.1 + 0.42 * max(len(rows), 2)
    )
    for place, each in enumerate(rows):
        controls = [c for c in findings.controls if c.set is each.set]
        for number, control in enumerate(controls, start=1):
            marker, _ = _CONTROL_MARKERS[control.method.control]
            below = place + 0.18 * number
            _interval(axes, control, below, colour=_CONTROL, size=5, marker=marker)
        colour = _PLAIN
        if each.is_significant:
            colour = _GOOD if each.gain > 0 else _BAD
        _interval(axes, each, place, colour=colour, size=7)
    axes.axvline(0, color=_CONTROL, linewidth=1)
    labels = [f"{each.set.title}, {each.set.scorer.main}" for each in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.3, -0.6)
    axes.grid(axis="y", alpha=0)
    return axes


def _control_names(findings: Findings, language: Language) -> str:
    """The controls with their markers; empty without any."""
    found = dict.fromkeys(each.method.control for each in findings.controls)
    names = ", ".join(f"{_CONTROL_MARKERS[name][1]} {name}" for name in found)
    return text("controls", language, names=names) if names else ""


def _interval(
    axes: Any, each: SetComparison, place: float, *, colour: str, size: int, marker: str = "o"
) -> None:
    low, high = sorted(each.sign * bound for bound in (each.main.low, each.main.high))
    axes.plot([low, high], [place, place], color=colour, linewidth=2 if marker == "o" else 1.2)
    axes.plot([each.gain], [place], marker, color=colour, markersize=size)


def _add_curves(page: Page, report: SuiteReport, language: Language) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in report.all_comparisons:
        method = each.method
        if method.weight and not (method.control or method.form):
            lines.setdefault(each.set.title, [(0.0, 0.0)]).append((method.weight, each.gain))
    lines = {title: sorted(points) for title, points in lines.items() if len(points) > 2}
    if not lines:
        return
    page.heading(text("curves", language))
    axes = new_axes(xlabel=text("weight", language), ylabel=text("gain", language))
    for number, (title, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), _style(number), label=title, markersize=4)
    axes.axhline(0, color=_CONTROL, linewidth=1)
    add_legend(axes)
    page.figure(axes, caption=text("curves caption", language))


def _style(number: int) -> str:
    """Marker and line of what a plot shows in this place; colours repeat after ten."""
    return _STYLES[number // 10 % len(_STYLES)]


def _add_quality_cost(page: Page, rows: Sequence[Mapping[str, Any]], language: Language) -> None:
    points = [
        (str(row["method"]), float(row["seconds"]), float(row["gain"] or 0.0))
        for row in rows
        if row.get("seconds") is not None and (row["gain"] is not None or row["method"] == "base")
    ]
    if len(points) < 2:
        return
    axes = new_axes(xlabel=text("seconds", language), ylabel=text("gain", language))
    for number, (name, seconds, gain) in enumerate(points):
        axes.plot([seconds], [gain], _style(number)[0], label=name)
    axes.axhline(0, color=_CONTROL, linewidth=1)
    axes.set_xlim(left=0)
    add_legend(axes)
    page.figure(axes, caption=text("quality cost", language))


def _add_front(page: Page, report: SuiteReport, language: Language) -> None:
    points = front_points(report)
    assert report.front_of is not None
    if not points:
        return
    front: Front = pareto_front(points)
    runs = report.sets[0]
    signs = [runs.scorer.figures[name].better or 1 for name in report.front_of]
    axes = new_axes(xlabel=report.front_of[0], ylabel=report.front_of[1])
    line = [(signs[0] * points[n][0], signs[1] * points[n][1]) for n in front.names]
    axes.plot(*zip(*line, strict=True), "-", color=_CONTROL, linewidth=1)
    for number, (name, (x, y)) in enumerate(points.items()):
        axes.plot([signs[0] * x], [signs[1] * y], _style(number)[0], label=name)
    # Better is to the right and up in every plot.
    for sign, invert in zip(signs, (axes.invert_xaxis, axes.invert_yaxis), strict=True):
        if sign < 0:
            invert()
    add_legend(axes)
    page.heading(text("front", language))
    page.figure(axes, caption=front_sentence(report, language))


def to_json(report: SuiteReport) -> dict[str, Any]:
    """The content of `report.json`."""
    findings = report.findings
    content: dict[str, Any] = {
        "format": _FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tita": tita.__version__,
        "headline": headline(findings),
        "outcome": findings.outcome,
        "method": None if findings.method is None else findings.method.name,
        "notes": notes(findings),
        "choice": None if findings.choice is None else dict(findings.choice.gains),
        "methods": method_rows(report),
        "comparisons": [_as_json(each) for each in findings.comparisons],
        "controls": [_as_json(each) for each in findings.controls],
        "by_method": [_as_json(each) for each in report.all_comparisons],
        "over_controls": dict(findings.over_controls),
        "missing": [
            {
                "set": runs.name, "method": method.name, "questions": runs.num_questions,
                "missing": runs.num_missing(method),
            }
            for runs in report.sets
            for method in report.methods
            if runs.num_missing(method) > 0
        ],
    }  # fmt: skip
    if report.front_of is not None and (points := front_points(report)):
        front = pareto_front(points)
        # Points have both values larger if better; here they are as measured.
        signs = [report.sets[0].scorer.figures[name].better or 1 for name in report.front_of]
        content["front"] = {
            "figures": list(report.front_of), "names": list(front.names),
            "points": {name: [signs[0] * x, signs[1] * y] for name, (x, y) in points.items()},
            "hypervolume": front.hypervolume, "reference": list(front.reference),
        }  # fmt: skip
    return content


def _as_json(each: SetComparison) -> dict[str, Any]:
    return {
        "set": each.set.name,
        "method": each.method.name,
        "main": each.set.scorer.main,
        "gain": each.gain,
        "corrected_p": each.corrected_p,
        "units": each.num_units,
        "figures": {
            name: {
                "base": figure.a, "method": figure.b, "difference": figure.difference,
                "low": figure.low, "high": figure.high, "p": figure.p_value,
            }
            for name, figure in each.figures.items()
        },
    }  # fmt: skip


def write_report(report: SuiteReport, *, folder: Path) -> str:
    """Write `report.html`, `report.zh.html`, `report.txt` and `report.json`; returns the text."""
    folder.mkdir(parents=True, exist_ok=True)
    html_page(report).write(folder / "report.html")
    html_page(report, language="zh").write(folder / "report.zh.html")
    words = text_report(report)
    (folder / "report.txt").write_text(words, encoding="utf-8")
    with atomic_path(folder / "report.json") as temporary:
        content = dump_json(to_json(report), indent=2, ensure_ascii=False)
        temporary.write_text(content + "\n", encoding="utf-8")
    return words
