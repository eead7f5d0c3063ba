"""Paired comparison of two runs on the same questions, and the gates of `tita-bench compare`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tita.bench.columns import PROTOCOL, Array, BenchmarkRun
from tita.bench.evaluate import summarise
from tita.bench.load_figures import different_loads
from tita.bench.page_images import ImageFolder
from tita.bench.significance import bootstrap_difference, mcnemar_exact, outcomes
from tita.errors import TitaError
from tita.report import Card

_TIMES = {
    "response_time": "response_time",
    "time_to_first_token": "first_token",
    "time_per_output_token": "per_token",
}
"""Times that are compared, and their columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """Run B compared with run A on the questions that both answered."""

    a: BenchmarkRun
    b: BenchmarkRun
    summary: Mapping[str, Any]
    flipped: Sequence[str]
    """Ids of the questions on which the scores differ, B's largest losses first."""

    def gain(self, identity: str) -> float:
        """B's score minus A's on one question."""
        a, b = self.a, self.b
        return float(b.columns["score"][b.rows[identity]] - a.columns["score"][a.rows[identity]])


def compare(a: BenchmarkRun, b: BenchmarkRun, *, any_load: bool = False) -> RunComparison:
    """Pair two runs by question.

    Times are compared if both runs were measured under the same load, or with `any_load`.

    Raises:
        TitaError: the protocols differ in more than model and weight, or the runs share no
            question.
    """
    _check_protocols(a, b)
    shared = [identity for identity in a.rows if identity in b.rows]
    if not shared:
        raise TitaError(f"{a.title} and {b.title} share no question", where=str(b.path))
    gain = _values(b, shared, "score") - _values(a, shared, "score")
    order = np.argsort(gain, kind="stable")
    loads_differ = different_loads(a, b)
    times = {
        name: _compare_values(a, b, shared, column=column) if any_load or not loads_differ else None
        for name, column in _TIMES.items()
    }
    return RunComparison(
        a=a,
        b=b,
        summary={
            "a": summarise(a),
            "b": summarise(b),
            "num_shared": len(shared),
            "scores": _compare_by(a, b, shared, column="metric", names=a.metrics),
            "by_category": _compare_by(a, b, shared, column="category", names=a.categories),
            "overall": _compare_scores(a, b, shared),
            "loads_differ": loads_differ,
            "endpoints": [_endpoints(run) for run in (a, b)],
            **times,
            "cost": _compare_values(a, b, shared, column="cost"),
        },
        flipped=[shared[n] for n in order if gain[n] and not np.isnan(gain[n])],
    )


def _endpoints(run: BenchmarkRun) -> list[str]:
    """Endpoints and client machines of a run, each once."""
    found = (
        f"{known['endpoint']}, from {known['machine']['host']}" for known in run.conditions.values()
    )
    return list(dict.fromkeys(found))


def _check_protocols(a: BenchmarkRun, b: BenchmarkRun) -> None:
    """Runs may differ in model, weight, request options and number of questions only."""
    own = ("model_name", "weight", "request")
    differ = [key for key in PROTOCOL if key not in own and a.protocol[key] != b.protocol[key]]
    if a.judge != b.judge:
        differ.append("judge")
    if differ:
        raise TitaError(
            f"{a.path.name} and {b.path.name} differ in {', '.join(differ)}",
            remedy="compare runs of the same protocol",
        )


def _values(run: BenchmarkRun, identities: Sequence[str], column: str) -> Array:
    values = np.frombuffer(run.columns[column], dtype=np.dtype(run.columns[column].typecode))
    return values[[run.rows[identity] for identity in identities]]


def _known_pairs(
    a: BenchmarkRun, b: BenchmarkRun, identities: Sequence[str], column: str
) -> tuple[Array, Array]:
    """The values of both runs, of the questions for which both are known."""
    left, right = _values(a, identities, column), _values(b, identities, column)
    known = ~np.isnan(left) & ~np.isnan(right)
    return left[known], right[known]


def _compare_values(
    a: BenchmarkRun, b: BenchmarkRun, shared: Sequence[str], *, column: str
) -> dict[str, Any] | None:
    """Mean paired difference with its interval, and the ratio of the means."""
    left, right = _known_pairs(a, b, shared, column)
    if not len(left):
        return None
    difference = asdict(bootstrap_difference(left.tolist(), right.tolist()))
    ratio = float(right.mean() / left.mean()) if left.mean() else None
    return {"a": float(left.mean()), "b": float(right.mean()), "ratio": ratio, **difference}


def _compare_by(
    a: BenchmarkRun, b: BenchmarkRun, shared: Sequence[str], *, column: str, names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Paired scores of the questions of each metric or category."""
    rows: dict[int, list[str]] = {}
    for identity in shared:
        rows.setdefault(a.columns[column][a.rows[identity]], []).append(identity)
    found = {name: _compare_scores(a, b, rows.get(n, ())) for n, name in enumerate(names) if name}
    return {name: entry for name, entry in found.items() if entry is not None}


def _compare_scores(a: BenchmarkRun, b: BenchmarkRun, rows: Sequence[str]) -> dict[str, Any] | None:
    left, right = _known_pairs(a, b, rows, "score")
    if not len(left):
        return None
    result: dict[str, Any] = {
        "a": float(left.mean()),
        "b": float(right.mean()),
        **asdict(bootstrap_difference(left.tolist(), right.tolist())),
        **asdict(outcomes(left.tolist(), right.tolist())),
    }
    if np.isin(left, (0, 1)).all() and np.isin(right, (0, 1)).all():
        result["mcnemar_p"] = mcnemar_exact(result["losses"], result["wins"])
    return result


def disagreement_cards(
    comparison: RunComparison, *, images: ImageFolder, limit: int = 24
) -> list[Card]:
    """Cards of questions with different scores, half of them losses and half wins if possible."""
    a, b = comparison.a, comparison.b
    losses = [i for i in comparison.flipped if comparison.gain(i) < 0]
    wins = [i for i in comparison.flipped if comparison.gain(i) > 0]
    num_losses = min(len(losses), max(limit // 2, limit - len(wins)))
    chosen = losses[:num_losses] + wins[: limit - num_losses]
    cards = []
    for identity, left, right in zip(chosen, a.read(chosen), b.read(chosen), strict=True):
        is_win = comparison.gain(identity) > 0
        references = ", ".join(dict.fromkeys(map(str, left.get("references") or ())))
        cards.append(
            Card(
                title=f"{identity}: {left['prompt']}",
                image=images.first_of(left),
                lines=[
                    (a.title, str(left["response"])[:400]),
                    (b.title, str(right["response"])[:400]),
                    ("reference", references[:200]),
                ],
                flag=f"{b.title} {'right' if is_win else 'wrong'}",
                tone="good" if is_win else "bad",
            )
        )
    return cards


def pair_runs(
    a: Sequence[BenchmarkRun], b: Sequence[BenchmarkRun]
) -> list[tuple[BenchmarkRun, BenchmarkRun]]:
    """The runs of two files, paired by suite.

    Raises:
        TitaError: a file has several runs of one suite, or the files share no suite.
    """
    for runs in (a, b):
        suites = [run.protocol["suite"] for run in runs]
        if len(set(suites)) < len(suites):
            titles = ", ".join(run.title for run in runs)
            raise TitaError(
                f"the file has several runs of one suite ({titles})",
                where=str(runs[0].path),
                remedy="compare files with one model and weight each",
            )
    pairs = [(x, y) for x in a for y in b if x.protocol["suite"] == y.protocol["suite"]]
    if not pairs:
        raise TitaError("the two files share no suite", remedy="compare files of the same suite")
    return pairs


def check_gates(
    comparison: Mapping[str, Any], *, fail_below: float | None, fail_slower: float | None
) -> list[str]:
    """The gates that fail, in words; empty if all pass.

    Args:
        fail_below: minimum mean score difference B - A, in points of 100.
        fail_slower: maximum ratio of mean response times B / A.
    """
    failures = []
    overall, times = comparison["overall"], comparison["response_time"]
    if fail_below is not None:
        if overall is None:
            failures.append("no question could be scored, so the score gate cannot pass")
        elif 100 * overall["mean"] < fail_below:
            failures.append(
                f"score difference {100 * overall['mean']:+.2f} is below {fail_below:+g}"
            )
    if fail_slower is not None:
        if comparison.get("loads_differ") and times is None:
            failures.append(
                f"times of different loads are not compared: {comparison['loads_differ']}"
            )
        elif times is None or times["ratio"] is None:
            failures.append("no response times, so the latency gate cannot pass")
        elif times["ratio"] > fail_slower:
            failures.append(f"response time ratio {times['ratio']:.3f} is above {fail_slower:g}")
    return failures
