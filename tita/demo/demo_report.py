"""Presents the demo's result: table and sentences for the terminal, an HTML page, and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tita.demo.experiment import (
    ALONE,
    SIGNIFICANCE,
    Answers,
    DemoResult,
    PairedComparison,
    scores,
)
from tita.json_text import dump_json
from tita.records import Question
from tita.report import Card, Page, add_legend, new_axes

_MAX_CARDS = 12


def to_json(result: DemoResult) -> str:
    """Return the content of `report.json`."""
    verdict = asdict(result.verdict) | {
        "checks": result.verdict.checks,
        "reached": result.verdict.reached,
        "significance": SIGNIFICANCE,
    }
    return dump_json(asdict(result) | {"verdict": verdict}, indent=2)


def summary_table(result: DemoResult) -> list[dict[str, Any]]:
    """Return one row per condition, accuracies and shares of yes in percent."""
    rows = []
    for scored in result.rows:
        row = {"condition": scored.name, "all %": _percent(scored.accuracy)}
        for kind, score in scored.categories.items():
            row[f"{kind} %"] = _percent(score.accuracy)
            if score.f1 is not None and score.yes_ratio is not None:
                row["F1"] = _percent(score.f1)
                row["yes %"] = _percent(score.yes_ratio)
        rows.append(row)
    return rows


def method_table(result: DemoResult) -> list[dict[str, Any]]:
    """Return one row per method: what it brings against the base, in points, and what it costs."""
    rows = []
    for method in result.methods:
        row: dict[str, Any] = {
            "method": method.name,
            "passes": method.passes,
            "time": round(method.times_base, 2),
            "accuracy %": _percent(method.accuracy),
        }
        row |= dict.fromkeys(("points", "95 % interval", "p, corrected"))
        if (against := method.against_base) is not None and method.corrected_p is not None:
            row |= {
                "points": _percent(against.difference),
                "95 % interval": f"{100 * against.low:+.1f} to {100 * against.high:+.1f}",
                "p, corrected": float(f"{method.corrected_p:.2g}"),
            }
        for control in ("other images", "no DPO"):
            found = method.controls.get(control)
            row[control] = None if found is None else _percent(found.difference)
        rows.append(row)
    return rows


def kinds_table(result: DemoResult) -> list[dict[str, Any]]:
    """Return one row per method: accuracy by kind of question, and what validation chose."""
    rows = []
    for method in result.methods:
        row: dict[str, Any] = {"method": method.name}
        for kind, score in method.categories.items():
            row[f"{kind} %"] = _percent(score.accuracy)
            if score.yes_ratio is not None:
                row["yes %"] = _percent(score.yes_ratio)
        known = result.validation.get(method.setting)
        row |= {"setting": method.setting, "validation %": known and _percent(known)}
        rows.append(row)
    return rows


def summary_sentences(result: DemoResult) -> list[str]:
    """Return the comparisons and the success criteria in words."""
    findings = result.verdict
    checks = (f"{name}: {'yes' if met else 'NO'}" for name, met in findings.checks.items())
    vcd = next(method for method in result.methods if method.name == "vcd")
    return [
        f"Guided by {findings.pairs} at w = {findings.weight:g} against the base: "
        f"{_describe(findings.against_base)}",
        f"Guided against the reward model alone: {_describe(findings.against_reward)}",
        "Control, the reward model sees other images, against the base: "
        f"{_describe(findings.shuffled)}",
        f"Control, the reward model without DPO, against the base: {_describe(findings.untrained)}",
        f"Without any training, vcd ({vcd.setting}) is right on {_percent(vcd.accuracy)} %, at "
        f"{vcd.times_base:.2f} times the base.",
        f"Criteria: {'; '.join(checks)}.",
    ]


def _describe(comparison: PairedComparison) -> str:
    return (
        f"{100 * comparison.difference:+.1f} points (95 % interval {100 * comparison.low:+.1f} to "
        f"{100 * comparison.high:+.1f}; {comparison.wins} questions won, {comparison.losses} lost; "
        f"McNemar p = {comparison.p_value:.2g}: "
        f"{'' if comparison.significant else 'not '}significant at {100 * SIGNIFICANCE:g} %)."
    )


def write_page(
    path: Path,
    *,
    result: DemoResult,
    questions: Sequence[Question],
    images: Path,
    answers: Mapping[str, Answers],
) -> None:
    """Write `report.html`: findings, table, plots, and a gallery of questions.

    Args:
        answers: answers for the gallery by label; alignment is from `base` to `aligned`.
    """
    page = Page(
        "Effect of alignment",
        subtitle=f"{result.num_questions} held-out questions about scenes of handwritten digits",
    )
    for sentence in summary_sentences(result):
        page.text(sentence)
    page.heading("Scores")
    page.table(
        summary_table(result),
        caption="Percent. The column yes % is the share of yes among yes/no answers.",
        digits=1,
    )
    page.figure(_plot_by_weight(result), caption="Accuracy on the test split by guidance weight.")
    page.figure(_plot_by_kind(result), caption="Accuracy by kind of question.")
    page.heading("What it costs, what it brings")
    page.table(
        [
            row | {name: row[name] and f"{row[name]:g}" for name in ("time", "p, corrected")}
            for row in method_table(result)
        ],
        digits=1,
        caption="Difference to the base in points, paired on the same questions; McNemar's test, "
        "corrected for the number of methods (Holm). Passes per token are in those of the base, r "
        "is the reward model's size by the base's; time is that in the engine by the base's, in "
        "batches. The controls are points against what the method is without its reward model: "
        "the base, or vcd. m3id, best of 4 and 'as published' have the settings of their papers.",
    )
    page.table(
        kinds_table(result),
        caption="By kind of question, with the setting that validation chose.",
        digits=1,
    )
    page.heading("Questions with different answers")
    page.gallery(_cards(questions, images=images, answers=answers))
    page.heading("How to reproduce")
    page.table([{"fact": key, "value": str(value)} for key, value in result.facts.items()])
    page.write(path)


def _plot_by_weight(result: DemoResult) -> Any:
    axes = new_axes(xlabel="guidance weight", ylabel="accuracy, %")
    for name in ("guided", "other images", "no DPO"):
        points = [
            (row.weight, _percent(row.accuracy))
            for row in result.rows
            if row.weight is not None and (row.weight == 0 or row.name.startswith(name))
        ]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.axvline(result.verdict.weight, color="gray", linestyle=":", label="chosen on validation")
    add_legend(axes)
    return axes


def _plot_by_kind(result: DemoResult) -> Any:
    axes = new_axes(ylabel="accuracy, %")
    shown = [row for row in result.rows if row.name in ("base", ALONE)]
    shown.append(result.guided)
    kinds = list(shown[0].categories)
    width = 0.8 / len(shown)
    for index, row in enumerate(shown):
        heights = [_percent(row.categories[kind].accuracy) for kind in kinds]
        axes.bar([k + index * width for k in range(len(kinds))], heights, width, label=row.name)
    axes.set_xticks([k + width * (len(shown) - 1) / 2 for k in range(len(kinds))], kinds)
    add_legend(axes)
    return axes


def _cards(
    questions: Sequence[Question], *, images: Path, answers: Mapping[str, Answers]
) -> list[Card]:
    """Some questions that alignment corrected and as many that it broke, in file order."""
    before, after = scores(questions, answers["base"]), scores(questions, answers["aligned"])
    changes = list(zip(questions, before, after, strict=True))
    corrected = [question for question, old, new in changes if new > old][:_MAX_CARDS]
    broken = [question for question, old, new in changes if new < old][:_MAX_CARDS]
    return [
        Card(
            title=question.text,
            image=images / question.image if question.image else None,
            lines=[
                *((label, given[question.id]) for label, given in answers.items()),
                ("reference", ", ".join(question.references)),
            ],
            flag="corrected" if good else "now wrong",
            tone="good" if good else "bad",
        )
        for chosen, good in ((corrected, True), (broken, False))
        for question in chosen
    ]


def _percent(fraction: float) -> float:
    return round(100 * fraction, 1)
