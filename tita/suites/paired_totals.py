"""Paired comparison of figures that are functions of totals: means, ratios, F1, sums of those.

A figure such as CHAIR_i is a ratio of two totals over captions, and no mean of values of captions.
So every unit (a question, or questions that depend on each other) has *counts*, a figure is a
function of their totals, and the units are resampled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Totals = Mapping[str, Array]
"""Totals by name of the count; all of one shape."""
NUM_RESAMPLES = 5_000
_CHUNK_NUMBERS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Counts of the units of one run."""

    units: Sequence[str]
    names: Sequence[str]
    values: Array
    """Of shape (units, names)."""

    @classmethod
    def of(cls, by_unit: Mapping[str, Mapping[str, float]]) -> "Counts":
        """Counts by unit and name; a name that a unit does not have counts 0."""
        names = sorted({name for counts in by_unit.values() for name in counts})
        values = np.array(
            [[counts.get(name, 0.0) for name in names] for counts in by_unit.values()],
            dtype=np.float64,
        ).reshape(len(by_unit), len(names))
        return cls(units=list(by_unit), names=names, values=values)

    def totals(self) -> Totals:
        """The totals over all units."""
        return _totals(self.names, self.values.sum(axis=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedFigure:
    """One figure of two runs on the same units."""

    a: float
    b: float
    low: float
    """`low` and `high` are the 95 % interval of b - a."""
    high: float
    p_value: float
    """Two-sided."""

    @property
    def difference(self) -> float:
        """b - a."""
        return self.b - self.a


def compare_totals(
    a: Counts,
    b: Counts,
    figures: Mapping[str, Callable[[Totals], Array]],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, PairedFigure]:
    """Compare figures of two runs; a figure that is not defined for both is left out.

    The interval is the percentile bootstrap interval of the difference, with units resampled as
    pairs (Efron and Tibshirani 1993, chapter 13). The p-value is that of the randomization test
    which exchanges the two answers to a unit (Noreen 1989): it holds for any figure. Units with the
    same counts in both runs are drawn together: their number has a multinomial or binomial
    distribution.

    Raises:
        ValueError: the runs have other units, or none.
    """
    if list(a.units) != list(b.units) or not len(a.units):
        raise ValueError("the runs have other units, or none")
    names = sorted({*a.names, *b.names})
    both = np.concatenate([_columns(a, names), _columns(b, names)], axis=1)
    kinds, numbers = np.unique(both, axis=0, return_counts=True)
    left, right = kinds[:, : len(names)], kinds[:, len(names) :]
    observed = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, figure in figures.items():
            pair = [float(figure(_totals(names, numbers @ side))) for side in (left, right)]
            if not np.isnan(pair).any():
                observed[name] = pair
        resampled: dict[str, list[Array]] = {name: [] for name in observed}
        exchanged: dict[str, list[Array]] = {name: [] for name in observed}
        generator = np.random.default_rng(seed)
        chunk = max(1, _CHUNK_NUMBERS // len(kinds))
        for start in range(0, num_resamples, chunk):
            size = min(chunk, num_resamples - start)
            drawn = generator.multinomial(len(a.units), numbers / len(a.units), size=size)
            swapped = generator.binomial(numbers, 0.5, size=(size, len(numbers)))
            moved = swapped @ (right - left)
            totals = [_totals(names, drawn @ side) for side in (left, right)]
            mixed = [
                _totals(names, numbers @ left + moved),
                _totals(names, numbers @ right - moved),
            ]
            for name in observed:
                figure = figures[name]
                resampled[name].append(figure(totals[1]) - figure(totals[0]))
                exchanged[name].append(figure(mixed[1]) - figure(mixed[0]))
    return {
        name: _paired(pair, np.concatenate(resampled[name]), np.concatenate(exchanged[name]))
        for name, pair in observed.items()
    }


def _paired(pair: Sequence[float], resampled: Array, exchanged: Array) -> PairedFigure:
    difference = pair[1] - pair[0]
    known = resampled[~np.isnan(resampled)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    null = exchanged[~np.isnan(exchanged)]
    # The observed labels are one of the exchanges, so that no p-value is 0 (Phipson, Smyth 2010).
    # Rounding must not tell equal differences apart.
    extreme = int((np.abs(null) >= abs(difference) - 1e-9).sum())
    return PairedFigure(
        a=pair[0],
        b=pair[1],
        low=float(low),
        high=float(high),
        p_value=(1 + extreme) / (1 + len(null)),
    )


def _columns(counts: Counts, names: Sequence[str]) -> Array:
    values = np.zeros((len(counts.units), len(names)))
    for column, name in enumerate(counts.names):
        values[:, names.index(name)] = counts.values[:, column]
    return values


def _totals(names: Sequence[str], values: Array) -> Totals:
    return {name: values[..., column] for column, name in enumerate(names)}
