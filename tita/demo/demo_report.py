"""The demo's result for people: a table and sentences in the terminal, a page, and JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tita.demo.experiment import Answers, CategoryScore, Comparison, Verdict, scores
from tita.records import Question
from tita.report import Card, Page, add_legend, new_axes


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Scores of one condition on the test split."""

    name: str
    weight: float | None
    """Guidance weight; None where there is no guidance."""
    accuracy: float
    categories: Mapping[str, CategoryScore]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All that the demo found out; `report.json` holds it."""

    rows: Sequence[Row]
    validation: Mapping[float, float]
    """Accuracy on the validation split by weight: what the weight was chosen from."""
    verdict: Verdict
    num_questions: int
    facts: Mapping[str, Any]
    """Versions, seeds, digests, counts, seconds: what is needed to see the same again."""


def as_json(result: Result) -> str:
    """The content of `report.json`."""
    verdict = asdict(result.verdict) | {
        "checks": result.verdict.checks,
        "reached": result.verdict.reached,
        "significance": 0.01,
    }
    return json.dumps(asdict(result) | {"verdict": verdict}, indent=2)


def table(result: Result) -> list[dict[str, Any]]:
    """One line a condition, accuracies and yes-shares in percent."""
    return [_line(row) for row in result.rows]


def _line(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {"condition": row.name, "all %": _percent(row.accuracy)}
    for kind, score in row.categories.items():
        line[f"{kind} %"] = _percent(score.accuracy)
        if score.f1 is not None and score.yes_ratio is not None:
            line["F1"] = _percent(score.f1)
            line["yes %"] = _percent(score.yes_ratio)
    return line


def sentences(verdict: Verdict) -> list[str]:
    """The verdict in words, good or bad."""
    return [
        f"Guided at w = {verdict.weight:g} against the base alone: {words(verdict.against_base)}",
        f"Guided against the reward model alone: {words(verdict.against_reward)}",
        f"Control, reward model sees other images, against the base: {words(verdict.shuffled)}",
        f"Control, reward model without DPO, against the base: {words(verdict.untrained)}",
        "The bar: "
        + "; ".join(f"{name}: {'yes' if holds else 'NO'}" for name, holds in verdict.checks.items())
        + ".",
    ]


def words(comparison: Comparison) -> str:
    """One comparison in words."""
    luck = "significant" if comparison.significant else "may be luck"
    return (
        f"{100 * comparison.difference:+.1f} points (95 % interval {100 * comparison.low:+.1f} to "
        f"{100 * comparison.high:+.1f}; {comparison.wins} questions won, {comparison.losses} lost; "
        f"McNemar p = {comparison.p_value:.2g}: {luck})."
    )


def write_page(
    path: Path,
    *,
    result: Result,
    questions: Sequence[Question],
    images: Path,
    base: Answers,
    aligned: Answers,
    reward: Answers,
) -> None:
    """Write `report.html`: verdict, table, plots, and a gallery of questions."""
    page = Page(
        "What alignment changed",
        subtitle=f"{result.num_questions} held-out questions on scenes of handwritten digits",
    )
    for sentence in sentences(result.verdict):
        page.text(sentence)
    page.heading("Scores")
    page.table(
        table(result), caption="Percent. Yes % is the share of yes among yes/no answers.", digits=1
    )
    page.figure(_accuracy_by_weight(result), caption="Accuracy on the test split by weight.")
    page.figure(_accuracy_by_kind(result), caption="Accuracy by kind of question.")
    page.heading("Where the answers differ")
    page.gallery(_cards(questions, images=images, base=base, aligned=aligned, reward=reward))
    page.heading("How to see the same again")
    page.table([{"fact": key, "value": str(value)} for key, value in result.facts.items()])
    page.write(path)


def _accuracy_by_weight(result: Result) -> Any:
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
    return axes.get_figure()


def _accuracy_by_kind(result: Result) -> Any:
    axes = new_axes(ylabel="accuracy, %")
    shown = [row for row in result.rows if row.name in ("base", "reward model alone")]
    shown += [
        row
        for row in result.rows
        if row.weight == result.verdict.weight and row.name.startswith("guided")
    ]
    kinds = list(shown[0].categories)
    width = 0.8 / len(shown)
    for place, row in enumerate(shown):
        heights = [_percent(row.categories[kind].accuracy) for kind in kinds]
        axes.bar([k + place * width for k in range(len(kinds))], heights, width, label=row.name)
    axes.set_xticks([k + width * (len(shown) - 1) / 2 for k in range(len(kinds))], kinds)
    add_legend(axes)
    return axes.get_figure()


def _cards(
    questions: Sequence[Question],
    *,
    images: Path,
    base: Answers,
    aligned: Answers,
    reward: Answers,
    each: int = 12,
) -> list[Card]:
    """Up to `each` questions that alignment won and as many that it lost, in the file's order."""
    before, after = scores(questions, base), scores(questions, aligned)
    changes = list(zip(questions, before, after, strict=True))
    won = [question for question, old, new in changes if new > old][:each]
    lost = [question for question, old, new in changes if new < old][:each]
    said = (("base", base), ("aligned", aligned), ("reward alone", reward))
    return [
        Card(
            title=question.text,
            image=images / question.image if question.image else None,
            lines=[
                *((name, answers[question.id]) for name, answers in said),
                ("truth", ", ".join(question.references)),
            ],
            flag="put right" if good else "made wrong",
            tone="good" if good else "bad",
        )
        for chosen, good in ((won, True), (lost, False))
        for question in chosen
    ]


def _percent(fraction: float) -> float:
    return round(100 * fraction, 1)
