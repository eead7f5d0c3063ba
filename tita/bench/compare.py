"""Paired comparison of two runs on the same questions, and the gates of `tita-bench compare`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tita.bench.columns import PROTOCOL, Array, BenchmarkRun
from tita.bench.evaluate import summarise
from tita.bench.load_figures import different_loads
from tita.bench.page_images import ImageFolder
from tita.bench.significance import bootstrap_difference, mcnemar_exact, outcomes
from tita.bench.units import unit_names, unit_scores
from tita.errors import TitaError
from tita.report import Card

MAX_MISSING = 0.02
"""Default maximum share of questions without an answer with which a gate can pass."""
_TIMES = {
    "response_time": "response_time",
    "time_to_first_token": "first_token",
    "time_per_output_token": "per_token",
}
"""Times that are compared, and their columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """Run B compared with run A on the questions that both were asked."""

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
    """Pair two runs by unit: by question, or by group where questions are scored together.

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
    pairs = _pair_units(a, b, known=~np.isnan(gain), shared=shared)
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
            "missing": {"a": missing_share(a), "b": missing_share(b)},
            "scores": pairs.compare_by(pairs.metric),
            "by_category": pairs.compare_by(pairs.category),
            "overall": pairs.compare(),
            "loads_differ": loads_differ,
            "endpoints": [_endpoints(run) for run in (a, b)],
            **times,
            "cost": _compare_values(a, b, shared, column="cost"),
        },
        flipped=[shared[n] for n in order if gain[n] and not np.isnan(gain[n])],
    )


def missing_share(run: BenchmarkRun) -> float:
    """Share of the run's questions that failed or were never asked."""
    return 1 - int((run.column("error") < 0).sum()) / run.num_questions


def _endpoints(run: BenchmarkRun) -> list[str]:
    """Endpoints and client machines of a run, each once."""
    found = (
        f"{known['endpoint']}, from {known['machine']['host']}" for known in run.conditions.values()
    )
    return list(dict.fromkeys(found))


def _check_protocols(a: BenchmarkRun, b: BenchmarkRun) -> None:
    """Runs may differ in model, weights, request options and number of questions only."""
    own = ("model_name", "weight", "weights", "request")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _UnitPairs:
    """Scores of both runs by unit, from 0 to 1, of the units with a score in both."""

    left: Array
    right: Array
    metric: Sequence[str]
    category: Sequence[str]

    def compare_by(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Paired scores of the units of each metric or category."""
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        found = {name: self.compare(rows[name]) for name in rows if name}
        return {name: entry for name, entry in found.items() if entry is not None}

    def compare(self, rows: Sequence[int] | None = None) -> dict[str, Any] | None:
        """Paired scores of some units, by default of all; None without any."""
        left, right = (
            (self.left, self.right) if rows is None else (self.left[rows], self.right[rows])
        )
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


def _pair_units(
    a: BenchmarkRun, b: BenchmarkRun, *, known: Array, shared: Sequence[str]
) -> _UnitPairs:
    """Pair the units of two runs by name.

    Args:
        known: which of the `shared` questions have a score in both runs.
    """
    identities = {identity for identity, both in zip(shared, known, strict=True) if both}
    units, names = [], []
    for run in (a, b):
        counted = np.fromiter((i in identities for i in run.rows), dtype=bool, count=len(run.rows))
        units.append(unit_scores(run, np.ones(len(run.rows), dtype=bool), known=counted))
        names.append(unit_names(run, units[-1]))
    place_in_b = {name: place for place, name in enumerate(names[1])}
    pairs = [(n, place_in_b[name]) for n, name in enumerate(names[0]) if name in place_in_b]
    left = units[0].values[[n for n, _ in pairs]]
    right = units[1].values[[n for _, n in pairs]]
    both = ~np.isnan(left) & ~np.isnan(right)
    categories, category = list(a.categories), a.column("category")
    kept = [n for (n, _), is_known in zip(pairs, both, strict=True) if is_known]
    return _UnitPairs(
        left=left[both],
        right=right[both],
        metric=[names[0][n][0] for n in kept],
        category=[categories[category[units[0].first[n]]] for n in kept],
    )


def _compare_values(
    a: BenchmarkRun, b: BenchmarkRun, shared: Sequence[str], *, column: str
) -> dict[str, Any] | None:
    """Mean paired difference with its interval, and the ratio of the means."""
    left, right = _values(a, shared, column), _values(b, shared, column)
    known = ~np.isnan(left) & ~np.isnan(right)
    left, right = left[known], right[known]
    if not len(left):
        return None
    difference = asdict(bootstrap_difference(left.tolist(), right.tolist()))
    ratio = float(right.mean() / left.mean()) if left.mean() else None
    return {"a": float(left.mean()), "b": float(right.mean()), "ratio": ratio, **difference}


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
    comparison: Mapping[str, Any],
    *,
    fail_below: float | None,
    fail_slower: float | None,
    max_missing: float = MAX_MISSING,
) -> list[str]:
    """The gates that are missed, in words; empty if all pass.

    Args:
        fail_below: minimum mean score difference B - A, in points of 100.
        fail_slower: maximum ratio of mean response times B / A.
        max_missing: maximum share of the questions without an answer with which a gate can pass.
    """
    if fail_below is None and fail_slower is None:
        return []
    failures = missing_too_many(comparison, max_missing=max_missing)
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


def missing_too_many(comparison: Mapping[str, Any], *, max_missing: float) -> list[str]:
    """The runs of a comparison in which too many questions have no answer, in words."""
    return [
        f"{comparison[side]['title']} has no answer to {100 * share:.1f} % of its questions, more "
        f"than {100 * max_missing:g} %"
        for side, share in comparison["missing"].items()
        if share > max_missing
    ]
