"""Figures of load: throughput, concurrency reached, lengths, times and goodput of one run.

Times are in seconds. Names of other tools: our inter-token latency is that of guidellm and aiperf
and vLLM's time per output token (TPOT).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tita.bench.columns import Array, BenchmarkRun
from tita.bench.conditions import load_title
from tita.bench.server_metrics import read_figures
from tita.errors import TitaError

_QUANTILES = (50, 90, 95, 99)
_Z95 = 1.959963984540054
"""Quantile of the normal distribution for intervals of 95 %."""
GOODPUT_TIMES = {
    "ttft": "first_token", "ttfa": "first_answer", "itl": "per_token", "tpot": "per_token",
    "e2el": "response_time",
}  # fmt: skip
"""Names of `--goodput` (those of vLLM, and `itl` and `ttfa`), and their columns."""
TIMES = {
    "response_time": "response_time",
    "time_to_first_token": "first_token",
    "time_to_first_answer_token": "first_answer",
    "time_per_output_token": "per_token",
    "longest_gap": "longest_gap",
}
"""Names of times in reports, and their columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLoad:
    """The requests of a run that were sent under one load."""

    title: str
    """The load in words; empty if it was not recorded."""
    conditions: Mapping[str, Any]
    """Of its first session."""
    rows: Array
    """Mask of the run's rows."""


def loads_of(run: BenchmarkRun) -> list[RunLoad]:
    """The requests of a run by load, in the order of the file."""
    session = run.column("session")
    codes: dict[str, list[int]] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for name, code in run.sessions.items():
        conditions = run.conditions.get(name, {})
        title = load_title(conditions)
        codes.setdefault(title, []).append(code)
        first.setdefault(title, conditions)
    loads = [
        RunLoad(title=title, conditions=first[title], rows=np.isin(session, own))
        for title, own in codes.items()
    ]
    return [load for load in loads if load.rows.any()]


def different_loads(a: BenchmarkRun, b: BenchmarkRun) -> str | None:
    """Why the times of two runs are not comparable; None if they are, or no load was recorded."""
    titles = [sorted({load.title for load in loads_of(run)} - {""}) for run in (a, b)]
    if len({*titles[0], *titles[1]}) < 2:
        return None
    mine, other = (" and ".join(found) or "not recorded" for found in titles)
    return f"A was measured at {mine}, B at {other}"


def load_figures(
    run: BenchmarkRun, *, goodput: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """The figures of each load of a run as plain values; None where nothing is known.

    Args:
        goodput: limits in seconds by name (`parse_goodput`); default: those of the run.
    """
    return [_figures(run, load, goodput=goodput) for load in loads_of(run)]


def _figures(
    run: BenchmarkRun, load: RunLoad, *, goodput: Mapping[str, float] | None
) -> dict[str, Any]:
    rows = load.rows
    columns = {name: run.column(column)[rows] for name, column in TIMES.items()}
    complete = ~np.isnan(columns["response_time"])
    duration_s, reached = _span(run, rows)
    failed = int(np.count_nonzero(run.column("error")[rows] >= 0))
    errors = {
        name: count
        for name, number in run.errors.items()
        if (count := int(np.count_nonzero(run.column("error")[rows] == number)))
    }
    per_second = {
        name: None if not duration_s else float(np.nansum(values)) / duration_s
        for name, values in (
            ("requests_per_s", complete.astype(float)),
            ("input_tokens_per_s", run.column("input_tokens")[rows]),
            ("output_tokens_per_s", run.column("output_tokens")[rows]),
        )
    }
    limits = goodput or load.conditions.get("options", {}).get("goodput") or {}
    return {
        "load": load.title,
        "conditions": load.conditions,
        "requests": int(rows.sum()),
        "complete": int(complete.sum()),
        "failed": failed,
        "errors": errors,
        "duration_s": duration_s,
        **per_second,
        "concurrency": reached,
        "input_tokens": distribution(run.column("input_tokens")[rows]),
        "output_tokens": distribution(run.column("output_tokens")[rows]),
        **{name: distribution(values) for name, values in columns.items()},
        "server": _server_figures(run, load),
        "goodput": _goodput(run, rows, limits, duration_s=duration_s) if limits else None,
    }


def _server_figures(run: BenchmarkRun, load: RunLoad) -> Mapping[str, Any] | None:
    """What the server counted, if the load has one session; sums over several have no meaning."""
    codes = set(run.column("session")[load.rows].tolist())
    names = [name for name, code in run.sessions.items() if code in codes]
    figures: Mapping[str, Any] | None = (
        read_figures(run.path).get(names[0]) if len(names) == 1 else None
    )
    return figures


def _span(run: BenchmarkRun, rows: Array) -> tuple[float | None, dict[str, float] | None]:
    """Seconds from the first request to the last response, and the requests in flight.

    The time between two sessions of a resumed run does not count.
    """
    sent, taken = run.column("sent_at")[rows], run.column("response_time")[rows]
    session = run.column("session")[rows]
    known = ~np.isnan(sent) & ~np.isnan(taken)
    if not known.any():
        return None, None
    sent, ended, session = sent[known], (sent + taken)[known], session[known]
    duration_s = sum(
        float(ended[session == code].max() - sent[session == code].min())
        for code in np.unique(session)
    )
    # At equal times one request ends before the next begins.
    order = np.argsort(np.concatenate((ended, sent)), kind="stable")
    steps = np.repeat((-1, 1), len(sent))[order]
    mean = float((ended - sent).sum()) / duration_s if duration_s else math.nan
    return duration_s or None, {"mean": mean, "peak": int(np.cumsum(steps).max())}


def _goodput(
    run: BenchmarkRun, rows: Array, limits: Mapping[str, float], *, duration_s: float | None
) -> dict[str, Any]:
    """Requests that meet every limit, as a share of all requests and per second.

    A failed request, or one without the time that is limited, does not meet it. Source of the
    definition: DistServe (arXiv 2401.09670).
    """
    good = np.ones(int(rows.sum()), dtype=bool)
    for name, limit in limits.items():
        good &= run.column(GOODPUT_TIMES[name])[rows] <= limit  # nan is not below a limit
    num = int(good.sum())
    return {
        "limits_s": dict(limits),
        "num_good": num,
        "percent": 100 * num / max(1, len(good)),
        "requests_per_s": num / duration_s if duration_s else None,
    }


def parse_goodput(text: str) -> dict[str, float]:
    """Limits such as `ttft=500ms,itl=50ms`, in seconds by name.

    Raises:
        TitaError: a name is unknown, or a limit is no time with its unit.
    """
    limits = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*[=:]\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*", part)
        if found is None or found[1] not in GOODPUT_TIMES:
            raise TitaError(
                f"{part.strip()!r} is not a limit",
                where="--goodput",
                remedy=f"limit {', '.join(GOODPUT_TIMES)} in ms or s: ttft=500ms,itl=50ms",
            )
        limits[found[1]] = float(found[2]) * (0.001 if found[3] == "ms" else 1.0)
    return limits


def distribution(values: Array) -> dict[str, float] | None:
    """Statistics of the known values; None if there are none.

    Returns:
        num, mean, std (of the sample), low and high (95 % interval of the mean by the normal
        distribution), min, max, and quantiles by linear interpolation.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    mean = float(known.mean())
    std = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    half = _Z95 * std / math.sqrt(len(known))
    quantiles = np.percentile(known, _QUANTILES)
    return {
        "num": len(known),
        "mean": mean,
        "std": std,
        "low": mean - half,
        "high": mean + half,
        "min": float(known.min()),
        **{f"p{q}": float(value) for q, value in zip(_QUANTILES, quantiles, strict=True)},
        "max": float(known.max()),
    }


def knee(points: Sequence[tuple[float, float]]) -> int:
    """Index of the point with the largest throughput over latency.

    That ratio, Kleinrock's power, is largest where more load begins to cost more latency than it
    gains throughput (Kleinrock 1979, "Power and deterministic rules of thumb").

    Args:
        points: (throughput, latency) pairs.
    """
    return max(range(len(points)), key=lambda index: points[index][0] / points[index][1])


def name_runs(runs: Sequence[BenchmarkRun]) -> None:
    """Set the `detail` of runs with the same model and weight, so that titles tell them apart."""
    by_name: dict[tuple[str, Any], list[BenchmarkRun]] = {}
    for run in runs:
        run.detail = ""
        by_name.setdefault((run.name, run.protocol["suite"]), []).append(run)
    for same in by_name.values():
        if len(same) > 1:
            for run, detail in zip(same, _details(same), strict=True):
                run.detail = detail


def _details(runs: Sequence[BenchmarkRun]) -> list[str]:
    """The first property that differs between all runs: load, options, or file."""
    loads = [" and ".join(load.title for load in loads_of(run)) for run in runs]
    options = [str(run.protocol["request"] or "") for run in runs]
    for details in (loads, options):
        if all(details) and len(set(details)) == len(runs):
            return details
    return [run.path.name for run in runs]
