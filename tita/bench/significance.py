"""Two systems on the same questions: McNemar's test, a bootstrap interval, wins and losses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

_MOST_DISTINCT = 2_000


def mcnemar_exact(only_a_right: int, only_b_right: int) -> float:
    """Two-sided p-value of McNemar's exact test (Psychometrika 12, 1947).

    Under the null hypothesis each discordant question is a fair coin: twice the smaller tail of the
    binomial distribution, at most 1.

    Raises:
        ValueError: a count is negative.
    """
    if only_a_right < 0 or only_b_right < 0:
        raise ValueError("counts of discordant questions cannot be negative")
    n, fewer = only_a_right + only_b_right, min(only_a_right, only_b_right)
    if n == 0:
        return 1.0
    log_half = -n * math.log(2)
    tail = math.fsum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + log_half)
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """A mean paired difference, b - a, with its interval."""

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
    """The mean of b - a over paired questions, with an interval.

    Up to 2,000 distinct differences it is a percentile bootstrap; beyond, with at least as many
    pairs, the normal interval, to which the bootstrap of a mean converges.

    Questions are resampled as pairs (Efron and Tibshirani 1993, chapter 13). Drawing n of n pairs
    with replacement and counting how often each distinct difference came up is a multinomial
    draw, which is what happens here: right/wrong scores have only three distinct differences.

    Raises:
        ValueError: no pairs, or unequal numbers.
    """
    import numpy as np

    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} scores make no pairs")
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    values, counts = np.unique(differences, return_counts=True)
    mean = float(differences.mean())
    if len(values) > _MOST_DISTINCT:
        error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
        margin = NormalDist().inv_cdf((1 + level) / 2) * error
        return PairedDifference(mean=mean, low=mean - margin, high=mean + margin, num_pairs=len(a))
    generator = np.random.default_rng(seed)
    # At most about 32 MiB of counts at once.
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
    """On how many questions b scored better than, worse than, or as a."""

    wins: int
    losses: int
    ties: int


def outcomes(a: Sequence[float], b: Sequence[float]) -> PairedOutcomes:
    """Wins, losses and ties of b against a, question by question."""
    pairs = list(zip(a, b, strict=True))
    wins = sum(right > left for left, right in pairs)
    losses = sum(right < left for left, right in pairs)
    return PairedOutcomes(wins=wins, losses=losses, ties=len(pairs) - wins - losses)
