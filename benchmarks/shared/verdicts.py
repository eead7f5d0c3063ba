"""Check ratios against bounds, and set the exit code."""

import sys
import time

clock = time.process_time
"""Processor time: with one thread and no waiting, the wall time of an idle machine."""

_missed: list[str] = []


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
