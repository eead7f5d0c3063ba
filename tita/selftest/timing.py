"""Times of runs that take turns, so that a busy machine disturbs all of them alike."""

import statistics
from collections.abc import Callable, Mapping


def interleaved(runs: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each run, which returns its own; after one round to warm up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            seconds = run()
            if number:
                found[name].append(seconds)
    return {name: statistics.median(times) for name, times in found.items()}
