"""Paired comparison of two methods over several seeds of training, on the same questions.

Legend: S seeds, N questions, G images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import permutation_test

_NUM_RESAMPLES = 4_999
_CHUNK = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedsComparison:
    """`b` against `a`; differences are fractions of the score's range."""

    a: str
    b: str
    difference: float
    """Mean over seeds and questions."""
    low: float
    high: float
    """`low` and `high` are the 95 % interval of a bootstrap that draws both seeds and images."""
    p_value: float
    """Of a permutation test over images, two-sided: for the models of these seeds."""
    by_seed: tuple[float, ...]


def compare_over_seeds(
    a: tuple[str, NDArray[np.float64]],
    b: tuple[str, NDArray[np.float64]],
    *,
    images: Sequence[str],
) -> SeedsComparison:
    """Compare `b` with `a`, each a name and its scores[S, N]; S may be 1 for one without training.

    Questions about one image are not independent, so images are drawn with all their questions.

    Args:
        a: the baseline.
        b: the method.
        images: the image of each question.
    """
    difference = np.atleast_2d(b[1]) - np.atleast_2d(a[1])
    _, group = np.unique(images, return_inverse=True)
    sums = np.array([np.bincount(group, row) for row in difference], np.float64)  # [S, G]
    sizes = np.bincount(group).astype(np.float64)
    low, high = np.quantile(_resample(sums, sizes), [0.025, 0.975])
    means = sums.mean(0)
    test = permutation_test(
        (means, np.zeros_like(means)), _mean_difference, permutation_type="samples",
        vectorized=True, n_resamples=_NUM_RESAMPLES, batch=_CHUNK, rng=np.random.default_rng(0),
    )  # fmt: skip
    return SeedsComparison(
        a=a[0],
        b=b[0],
        difference=float(difference.mean()),
        low=float(low),
        high=float(high),
        p_value=float(test.pvalue),
        by_seed=tuple(map(float, difference.mean(1))),
    )


def _mean_difference(b: NDArray[np.float64], a: NDArray[np.float64], axis: int) -> object:
    return (b - a).mean(axis)


def _resample(sums: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over seeds and images that are drawn with replacement; sums[S, G] of sizes[G]."""
    generator = np.random.default_rng(0)
    num_seeds, num_images = sums.shape
    found = []
    for start in range(0, _NUM_RESAMPLES, _CHUNK):
        number = min(_CHUNK, _NUM_RESAMPLES - start)
        seeds = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=number)
        drawn = generator.multinomial(num_images, [1 / num_images] * num_images, size=number)
        found.append(((seeds @ sums) * drawn).sum(1) / num_seeds / (drawn @ sizes))
    return np.concatenate(found)
