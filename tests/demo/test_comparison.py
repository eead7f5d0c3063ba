"""Comparisons over seeds: intervals that cover both seeds and images."""

import numpy as np
import pytest

from tita.demo.comparison import compare_over_seeds


def test_intervals_cover_seeds_and_images() -> None:
    dice = np.random.default_rng(0)
    images = [f"{n // 3}" for n in range(900)]
    base = (dice.random((1, 900)) < 0.6).astype(float)
    better = (dice.random((5, 900)) < 0.7).astype(float)
    found = compare_over_seeds(("base", base), ("better", better), images=images)
    assert found.difference == pytest.approx(better.mean() - base.mean())
    assert found.low < found.difference < found.high
    assert found.p_value < 0.01
    assert len(found.by_seed) == 5
    # Seeds that differ widen the interval, although the images are the same.
    differ = np.repeat([[0.0], [1.0], [1.0], [1.0], [1.0]], 900, axis=1)
    wide = compare_over_seeds(("base", base), ("differ", differ), images=images)
    assert wide.high - wide.low > 3 * (found.high - found.low)


def test_questions_about_one_image_are_not_independent() -> None:
    dice = np.random.default_rng(0)
    base = np.zeros((1, 900))
    same = np.repeat((dice.random(300) < 0.5) * 2.0 - 1, 3)[None]
    grouped = compare_over_seeds(("a", base), ("b", same), images=[str(n // 3) for n in range(900)])
    alone = compare_over_seeds(("a", base), ("b", same), images=[str(n) for n in range(900)])
    ratio = (grouped.high - grouped.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(3**0.5, rel=0.1)
    assert grouped.p_value > 0.01
