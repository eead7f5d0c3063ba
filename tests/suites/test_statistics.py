"""Paired totals, Holm's correction, fronts and methods: worked by hand, or done another way."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import permutation_test

from tita.bench.methods import BASE, Method, guided, parse_methods
from tita.bench.significance import bootstrap_difference, holm, mcnemar_exact
from tita.errors import TitaError
from tita.suites.comparison import part_of
from tita.suites.front import pareto_front
from tita.suites.paired_totals import Counts, compare_totals
from tita.suites.scorers import GROUP_SCORER, ScoredQuestion, f1_of, ratio, values_of

RATE = {"rate": ratio("bad", "all")}


def counts(bad: list[int], total: list[int]) -> Counts:
    units = {str(n): {"bad": b, "all": t} for n, (b, t) in enumerate(zip(bad, total, strict=True))}
    return Counts.of(units)


def test_a_ratio_of_totals_is_no_mean_of_ratios() -> None:
    a, b = counts([1, 0], [1, 9]), counts([0, 0], [1, 9])
    found = compare_totals(a, b, RATE)["rate"]
    assert (found.a, found.b, found.difference) == (10, 0, -10)


def test_means_have_the_interval_of_the_plain_bootstrap() -> None:
    draw = random.Random(0)
    left = [draw.randint(0, 1) for _ in range(400)]
    right = [min(1, x + (draw.random() < 0.2)) for x in left]
    found = compare_totals(counts(left, [1] * 400), counts(right, [1] * 400), RATE)["rate"]
    plain = bootstrap_difference(left, right)
    assert found.difference == pytest.approx(100 * plain.mean)
    assert found.low == pytest.approx(100 * plain.low, abs=0.6)
    assert found.high == pytest.approx(100 * plain.high, abs=0.6)


@pytest.mark.parametrize(("losses", "wins"), [(5, 8), (3, 14), (0, 4)])
def test_the_randomization_test_of_right_and_wrong_is_mcnemars(losses: int, wins: int) -> None:
    left, right = [1] * losses + [0] * wins + [1] * 30, [0] * losses + [1] * wins + [1] * 30
    size = [1] * len(left)
    found = compare_totals(counts(left, size), counts(right, size), RATE, num_resamples=20_000)
    assert found["rate"].p_value == pytest.approx(mcnemar_exact(losses, wins), abs=0.012)


def test_the_p_value_of_a_ratio_is_that_of_scipys_permutation_test() -> None:
    draw = np.random.default_rng(1)
    total = draw.integers(1, 9, size=(2, 10))
    bad = np.minimum(total, draw.integers(0, 5, size=(2, 10)) + np.array([[1], [0]]))

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        # A unit is one number: 100 bad + all.
        rates = [(v // 100).sum(axis) / (v % 100).sum(axis) for v in (x, y)]
        return rates[1] - rates[0]

    coded = 100 * bad + total
    exact = permutation_test(
        (coded[0], coded[1]), statistic, permutation_type="samples", vectorized=True,
        n_resamples=np.inf,
    )  # fmt: skip
    a, b = (counts(list(bad[n]), list(total[n])) for n in (0, 1))
    found = compare_totals(a, b, RATE, num_resamples=40_000)["rate"]
    assert 0.01 < exact.pvalue < 0.9
    assert found.p_value == pytest.approx(exact.pvalue, abs=0.02)


def test_a_figure_without_a_denominator_is_left_out() -> None:
    a, b = counts([0], [0]), counts([0], [0])
    assert compare_totals(a, b, RATE) == {}
    assert compare_totals(a, b, {"f1": f1_of("x", "y", "never counted")}) == {}
    with pytest.raises(ValueError, match="other units"):
        compare_totals(a, counts([0, 1], [1, 1]), RATE)


def test_holm_by_hand() -> None:
    # 3 x 0.01, then 2 x 0.04, then 1 x 0.05, which is not below the one before.
    assert holm([0.04, 0.01, 0.05]) == pytest.approx([0.08, 0.03, 0.08])
    assert holm([0.04, 0.01, 0.013, 0.5]) == pytest.approx([0.08, 0.04, 0.04, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_front_by_hand() -> None:
    points = {"a": (1.0, 4.0), "b": (3.0, 3.0), "c": (2.0, 2.0), "d": (4.0, 1.0)}
    front = pareto_front(points)
    assert front.names == ["d", "b", "a"]
    # Above (1, 1): d has no height, b covers 2 x 2, a no width.
    assert (front.reference, front.hypervolume) == ((1.0, 1.0), 4.0)
    assert pareto_front(points, reference=(0.0, 0.0)).hypervolume == 4 * 1 + 3 * 2 + 1 * 1
    with pytest.raises(ValueError, match="no points"):
        pareto_front({})


def test_the_hypervolume_is_the_covered_share_of_a_grid() -> None:
    draw = random.Random(3)
    for _ in range(30):
        points = {str(n): (draw.randint(0, 9), draw.randint(0, 9)) for n in range(6)}
        front = pareto_front(points, reference=(0, 0))
        covered = sum(
            any(x > i and y > j for x, y in points.values())
            for i, j in itertools.product(range(10), repeat=2)
        )
        assert front.hypervolume == covered


def test_the_part_that_chooses_is_about_30_percent_and_always_the_same() -> None:
    parts = [part_of(f"unit {n}") for n in range(2000)]
    assert 540 < parts.count("validation") < 660
    assert parts == [part_of(f"unit {n}") for n in range(2000)]


def test_methods() -> None:
    chosen = parse_methods(
        "base, vcd, vcd=0.5, best-of-4, guided, a=0.3+b=0.1", weights=[0, 0.1, 0.3]
    )
    assert [method.name for method in chosen] == [
        "base", "vcd", "vcd, w = 0.5", "best of 4", "guided, w = 0.1", "guided, w = 0.3",
        "a=0.3+b=0.1",
    ]  # fmt: skip
    assert len({method.slug for method in chosen}) == len(chosen)
    assert chosen[0] == BASE
    assert chosen[3].temperature(0.0) == 1.0
    assert chosen[-1].fields() == {"guidance_weights": {"a": 0.3, "b": 0.1}}
    with pytest.raises(TitaError, match="one image for base and reward"):
        guided(0.3, control="other images").fields()


@pytest.mark.parametrize(
    "text", ["best-of-1", "nope", "a=x", "vcd,vcd", "a=0.1+a=0.2", "vcd+a=0.1,", "guided=-1", ""]
)
def test_what_is_no_method_is_refused(text: str) -> None:
    with pytest.raises(TitaError):
        parse_methods(text, weights=[0.3])


def test_only_the_base_is_the_base() -> None:
    assert Method(name="x").is_base
    assert not Method(name="best of 2", best_of=2).is_base


def test_a_group_without_all_its_answers_is_not_right() -> None:
    """As in MMBench's CircularEval: two rotations of two options, of which one has no answer."""

    def rotation(group: str, number: int, answer: str) -> ScoredQuestion:
        return ScoredQuestion(
            id=f"{group}{number}", answer=answer, metric="circular", references=("A",),
            choices=("x", "y"), group=group,
        )  # fmt: skip

    questions = [rotation("a", 0, "A"), rotation("a", 1, "A."), rotation("b", 0, "A")]
    scored = GROUP_SCORER.score(questions, folder=Path())
    found = values_of(GROUP_SCORER.gather(scored.values()), GROUP_SCORER.figures)
    assert (found["groups right"], found["accuracy"]) == (50, 100)
