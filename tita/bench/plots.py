"""Plots of a benchmark report: latency distribution, score and latency by weight, history."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tita.bench.columns import BenchmarkRun
from tita.bench.evaluate import score_tables
from tita.report import Page, add_legend, new_axes

_NUM_POINTS = 200


def score_title(protocol: Mapping[str, Any]) -> str:
    """A score's suite, metric and number of questions."""
    suite = protocol["suite"] or "questions"
    return f"{suite}, {protocol['metric']}, {protocol['num_questions']} questions"


def add_latency(page: Page, runs: Sequence[BenchmarkRun]) -> None:
    """Add the cumulative distribution of response times."""
    times = [(run.title, 1000 * run.column("response_time")) for run in runs]
    known = [(title, values[~np.isnan(values)]) for title, values in times]
    known = [(title, values) for title, values in known if len(values)]
    if not known:
        return
    axes = new_axes(title="Response time", xlabel="ms", ylabel="answered, % of questions")
    # A few outliers would compress the rest of the plot.
    shares = np.linspace(0, 99.5, _NUM_POINTS)
    for title, values in known:
        axes.plot(np.percentile(values, shares), shares, label=title)
    axes.set_xlim(left=0)
    add_legend(axes)
    page.figure(axes, caption="Cumulative; drawn up to the 99.5th percentile.")


def add_weights(page: Page, report: Mapping[str, Any]) -> None:
    """Add score and latency by guidance weight, for each model with several weights."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for table in score_tables(report):
        for row in table["rows"]:
            weight, model = row["run"]["weight"], str(row["run"]["model_name"])
            if weight is not None:
                line = lines.setdefault(model, {}).setdefault(score_title(table["protocol"]), [])
                line.append((weight, row["values"]["score"]))
    for model, scores in lines.items():
        _add_weight_plot(page, f"{model}: score", scores, ylabel="score")
        runs = [run for run in report["runs"] if run["model_name"] == model]
        timed = [run for run in runs if run["weight"] is not None and run["response_time"]]
        times = {
            name: [(run["weight"], 1000 * run["response_time"][name]) for run in timed]
            for name in ("mean", "p95")
        }
        _add_weight_plot(page, f"{model}: response time", times, ylabel="ms")


def _add_weight_plot(
    page: Page, title: str, lines: Mapping[str, Sequence[tuple[float, float]]], *, ylabel: str
) -> None:
    plotted = {name: sorted(points) for name, points in lines.items() if len(set(points)) > 1}
    if not plotted:
        return
    axes = new_axes(title=title, xlabel="guidance weight", ylabel=ylabel)
    for name, points in plotted.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    add_legend(axes)
    page.figure(axes, caption=f"{title} by guidance weight.")


def add_history(page: Page, history: Sequence[Mapping[str, Any]]) -> None:
    """Add the scores of earlier reports, one line per run and protocol in several reports.

    Args:
        history: entries of the store's index, oldest first.
    """
    lines: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    for index, entry in enumerate(history):
        for score in entry["scores"]:
            key = (score["title"], score["suite"], score["metric"], score["protocol"])
            lines.setdefault(key, []).append((index, score["score"]))
    lines = {key: points for key, points in lines.items() if len(points) > 1}
    if not lines:
        return
    page.heading("History")
    axes = new_axes(title="Scores of earlier reports", xlabel="report", ylabel="score")
    for (title, suite, metric, _), points in sorted(lines.items()):
        axes.plot(
            *zip(*points, strict=True), "o-", label=f"{title}: {suite or 'questions'}, {metric}"
        )
    days = [entry["created"][:10] for entry in history]
    axes.set_xticks(range(len(days)), days, rotation=30, ha="right")
    add_legend(axes)
    page.figure(axes, caption="Reports in the store, oldest first; the last is this one.")
