"""Times of runs that take turns, so that a busy machine disturbs all of them alike."""

import statistics
from collections.abc import Callable, Mapping, Sequence


def interleaved(runs: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each run, which returns its own; after one round to warm up."""
    found = in_rounds(runs, rounds=rounds)
    return {name: statistics.median(times) for name, times in found.items()}


def in_rounds(runs: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one round to warm up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            seconds = run()
            if number:
                found[name].append(seconds)
    return found


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of one run's time over another's.

    What slows a machine down for a while slows both runs of a round down, so this varies less than
    the ratio of their medians.
    """
    return statistics.median(one / other for one, other in zip(times, others, strict=True))
