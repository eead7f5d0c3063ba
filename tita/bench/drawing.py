"""The plots of a report: latency distribution, score by weight, history."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tita.bench.columns import Run
from tita.bench.evaluate import score_tables
from tita.report import Page, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUM_BINS = 60


def headline(protocol: Mapping[str, Any]) -> str:
    """A score's suite, metric and number of questions."""
    suite = protocol["suite"] or "questions"
    return f"{suite}, {protocol['metric']}, {protocol['num_questions']} questions"


def add_latency(page: Page, runs: Sequence[Run]) -> None:
    """Distributions of response times, one outline a run."""
    import numpy as np

    times = [(run.title, run.column("response_time")) for run in runs]
    known = [(title, values[~np.isnan(values)]) for title, values in times]
    known = [(title, values) for title, values in known if len(values)]
    if not known:
        return
    axes = new_axes(title="Response time", xlabel="seconds", ylabel="share of questions, %")
    highest = max(float(np.percentile(values, 99.5)) for _, values in known) or 1.0
    edges = np.linspace(0, highest * 1.02, _NUM_BINS + 1)
    for title, values in known:
        counts, _ = np.histogram(values, bins=edges)
        axes.stairs(100 * counts / len(values), edges, label=title)
    axes.legend()
    _add(page, axes, caption="Above the 99.5th percentile the axis is cut.")


def add_weights(page: Page, report: Mapping[str, Any]) -> None:
    """Score and latency by guidance weight, where one model was asked with several."""
    for table in score_tables(report):
        by_model: dict[str, dict[float, Mapping[str, Any]]] = {}
        for row in table["rows"]:
            if row["run"]["weight"] is not None:
                points = by_model.setdefault(str(row["run"]["model_name"]), {})
                points[row["run"]["weight"]] = row
        for model, points in by_model.items():
            if len(points) > 1:
                title = f"{model}: {headline(table['protocol'])}"
                _add_weight_plot(page, title, dict(sorted(points.items())))


def _add_weight_plot(page: Page, title: str, points: Mapping[float, Mapping[str, Any]]) -> None:
    axes = new_axes(title=title, xlabel="guidance weight", ylabel="score")
    axes.plot(list(points), [row["values"]["score"] for row in points.values()], "o-")
    times = [row["run"]["response_time"] for row in points.values()]
    if all(times):
        seconds = axes.twinx()
        seconds.plot(list(points), [time["mean"] for time in times], "s--", color="C1")
        seconds.set_ylabel("mean response time, s")
        seconds.grid(visible=False)
    _add(page, axes, caption="Score (line) and mean response time (dashed) by weight.")


def add_history(page: Page, history: Sequence[Mapping[str, Any]]) -> None:
    """Scores of earlier reports: one line for each run and protocol that several reports have.

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
    axes.legend()
    _add(page, axes, caption="Reports in the store, oldest first; the last is this one.")


def _add(page: Page, axes: "Axes", *, caption: str) -> None:
    figure: Any = axes.get_figure()
    page.figure(figure, caption=caption)
