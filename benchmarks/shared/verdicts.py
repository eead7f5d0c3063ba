"""Check ratios against bounds, and set the exit code."""

import statistics
import sys
import time
from collections.abc import Callable

clock = time.process_time
"""Processor time: with one thread and no waiting, the wall time of an idle machine."""

_missed: list[str] = []


def interleaved(runs: dict[str, Callable[[], float]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each run, interleaved so that disturbances affect all alike."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return {name: statistics.median(times) for name, times in found.items()}


def verdict(what: str, ratio: float, *, at_most: float = 0, at_least: float = 0) -> None:
    """Print a ratio and its bound, and record whether it is met."""
    bound = f"at most {at_most:.2f}" if at_most else f"at least {at_least:.2f}"
    kept = ratio <= at_most if at_most else ratio >= at_least
    print(f"{what}: {ratio:.2f}, {bound}: {'kept' if kept else 'MISSED'}", flush=True)
    if not kept:
        _missed.append(what)


def finish() -> None:
    """Exit with code 1 if a bound was missed."""
    sys.exit(1 if _missed else 0)
