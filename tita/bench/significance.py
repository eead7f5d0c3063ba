"""Paired comparison of systems: McNemar's test, bootstrap interval, wins, Holm's correction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.stats import binomtest

_MOST_DISTINCT = 2_000


def mcnemar_exact(only_a_right: int, only_b_right: int) -> float:
    """Two-sided p-value of McNemar's exact test (Psychometrika 12, 1947).

    Under the null hypothesis the system that is right on a discordant question is a fair coin flip,
    so the test is the binomial test with probability 1/2.

    Raises:
        ValueError: a count is negative.
    """
    if only_a_right == only_b_right == 0:
        return 1.0
    return float(binomtest(only_a_right, only_a_right + only_b_right).pvalue)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """Mean paired difference b - a with its interval."""

    mean: float
    low: float
    high: float
    num_pairs: int


def bootstrap_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Mean of b - a over paired questions, with an interval.

    With up to 2,000 distinct differences it is the percentile bootstrap interval; with more, the
    normal interval, to which the bootstrap interval of a mean converges.

    Questions are resampled as pairs (Efron and Tibshirani 1993, chapter 13). The number of times
    that each distinct difference is drawn has a multinomial distribution, which is sampled here:
    right/wrong scores have only three distinct differences.

    Raises:
        ValueError: there are no pairs, or `a` and `b` differ in length.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"no pairs of {len(a)} and {len(b)} scores")
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    values, counts = np.unique(differences, return_counts=True)
    mean = float(differences.mean())
    if len(values) > _MOST_DISTINCT:
        error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
        margin = NormalDist().inv_cdf((1 + level) / 2) * error
        return PairedDifference(mean=mean, low=mean - margin, high=mean + margin, num_pairs=len(a))
    generator = np.random.default_rng(seed)
    # Limits the counts in memory to about 32 MiB.
    chunk = max(1, (1 << 22) // len(values))
    means = np.concatenate(
        [
            generator.multinomial(len(a), counts / len(a), size=min(chunk, num_resamples - start))
            @ values
            / len(a)
            for start in range(0, num_resamples, chunk)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return PairedDifference(mean=mean, low=float(low), high=float(high), num_pairs=len(a))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedOutcomes:
    """Number of questions on which b scores higher than, lower than, or equal to a."""

    wins: int
    losses: int
    ties: int


def outcomes(a: Sequence[float], b: Sequence[float]) -> PairedOutcomes:
    """Wins, losses and ties of b against a, question by question."""
    pairs = list(zip(a, b, strict=True))
    wins = sum(right > left for left, right in pairs)
    losses = sum(right < left for left, right in pairs)
    return PairedOutcomes(wins=wins, losses=losses, ties=len(pairs) - wins - losses)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979), in the same order."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda n: p_values[n])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected
