"""Ratios against their bounds, and the exit code."""

import statistics
import sys
import time
from collections.abc import Callable

clock = time.process_time
"""With one thread, and nothing to wait for, what the wall's clock shows on a quiet machine."""

_missed: list[str] = []


def interleaved(runs: dict[str, Callable[[], float]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each, measured in turn so that what disturbs one disturbs all."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return {name: statistics.median(times) for name, times in found.items()}


def verdict(what: str, ratio: float, *, at_most: float = 0, at_least: float = 0) -> None:
    """Print a ratio beside its bound, and remember whether it is kept."""
    bound = f"at most {at_most:.2f}" if at_most else f"at least {at_least:.2f}"
    kept = ratio <= at_most if at_most else ratio >= at_least
    print(f"{what}: {ratio:.2f}, {bound}: {'kept' if kept else 'MISSED'}", flush=True)
    if not kept:
        _missed.append(what)


def finish() -> None:
    """End the script: with 1 if a bound was missed."""
    sys.exit(1 if _missed else 0)
