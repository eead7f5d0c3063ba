"""Metrics on published examples, hand-made cases and corner cases."""

import math

import pytest

from tita.bench.metrics import (
    anls,
    circular_accuracy,
    contains_match,
    edit_distance,
    exact_match,
    gqa_match,
    mme_scores,
    ocr_vqa_match,
    parse_mme,
    parse_pope,
    parse_science_qa,
    parse_yes_no,
    pope_scores,
    relaxed_match,
    vqa_accuracy,
    vqa_official_accuracy,
)
from tita.bench.significance import bootstrap_difference, mcnemar_exact, outcomes
from tita.data.normalise import normalise, normalise_official


# Expected values come from running EvalAI's processor (LLaVA's m4c_evaluator.py) itself.
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Answer.", "answer"),
        ("a dog, an owl", "dog owl"),
        ("three", "3"),
        ("none", "0"),
        ("3,000", "3000"),
        ("1.5", "1.5"),
        ("dont know", "don't know"),
        ("it's red", "it 's red"),
        ("black/white", "black white"),
        ("black/ white", "black white"),
        ("coca-cola!", "coca cola"),
        ("  tab\tand\nline ", "tab and line"),
        ("t-shirt (red) 1,000", "t shirt red 1000"),
    ],
)
def test_normalisation_follows_evalai(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


def test_exact_match_ignores_case_articles_and_punctuation_only() -> None:
    assert exact_match("The Dog.", ["dog"]) == 1
    assert exact_match("two dogs", ["2 dogs", "x"]) == 1
    assert exact_match("a dog runs", ["dog"]) == 0
    assert exact_match("dog", []) == 0


def test_contains_match_needs_whole_words() -> None:
    assert contains_match("It is a red dog.", ["red dog"]) == 1
    assert contains_match("predogmatic", ["dog"]) == 0
    assert contains_match("anything", [""]) == 0


def test_vqa_accuracy_leaves_each_of_the_ten_out() -> None:
    ten = ["red"] * 3 + ["blue"] * 7
    # Leaving out one of three annotators who agree gives 2/3, in 3 of 10 cases; otherwise 1.
    assert vqa_accuracy("red", ten) == pytest.approx(0.9)
    assert vqa_accuracy("Blue.", ten) == 1
    assert vqa_accuracy("green", ten) == 0
    assert vqa_accuracy("two", ["2"] + ["x"] * 9) == pytest.approx(0.3)
    assert vqa_accuracy("two", ["2", "two"] + ["x"] * 8) == pytest.approx(0.6)
    assert vqa_accuracy("x", ["x"]) == 1
    assert vqa_accuracy("x", []) == 0


def test_official_vqa_accuracy_compares_unanimous_answers_unchanged() -> None:
    unanimous = ["Yes"] * 10
    assert vqa_accuracy("yes.", unanimous) == 1
    assert vqa_official_accuracy("yes.", unanimous) == 0
    assert vqa_official_accuracy("Yes\n", unanimous) == 1
    mixed = ["yes"] * 7 + ["No"] * 3
    assert vqa_official_accuracy("Yes.", mixed) == 1
    assert vqa_official_accuracy("no", mixed) == pytest.approx(0.9)
    # "it's" is not separated, and a comma between digits deletes all punctuation.
    assert normalise_official("it's") == "it's"
    assert normalise("it's") == "it 's"
    assert normalise_official("1,000-2") == "10002"
    assert normalise("1,000-2") == "1000 2"
    assert vqa_official_accuracy("x", ["x"]) == 1


def test_an_empty_answer_and_an_article_are_never_right() -> None:
    for match in (exact_match, contains_match, vqa_accuracy, vqa_official_accuracy, anls):
        for answer in ("", " ", "The", "an."):
            assert match(answer, ["A"]) == 0, (match, answer)
            assert match(answer, ["A"] * 9 + ["x"]) == 0, (match, answer)
    assert exact_match("A", ["A"]) == exact_match("a ", ["A"]) == 1
    assert contains_match("Grade A.", ["A"]) == 1
    assert contains_match("It is a dog.", ["A"]) == 0, "an article is no answer"
    assert exact_match("...", ["..."]) == 1


def test_ocr_vqa_is_stricter_than_the_normalised_match() -> None:
    assert ocr_vqa_match(" Stephen King ", ["stephen king"]) == 1
    assert ocr_vqa_match("Stephen King.", ["stephen king"]) == 0


def test_gqa_drops_a_final_period_only() -> None:
    assert gqa_match("Left.", ["left"]) == 1
    assert gqa_match("the left", ["left"]) == 0


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("105", "100", 1),
        ("106", "100", 0),
        ("-95.0", "-100", 1),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("1,050", "1000", 1),
        ("52%", "0.5", 1),
        ("Paris", "paris", 1),
        ("Paris", "100", 0),
    ],
)
def test_relaxed_match_is_within_five_percent(answer: str, reference: str, score: float) -> None:
    assert relaxed_match(answer, [reference]) == score


def test_anls() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert anls("Coca Cola", ["coca-cola"]) == pytest.approx(1 - 1 / 9)
    assert anls("half", ["hal?????"]) == 0, "similarity 3/8 is below the threshold"
    assert anls("abcd", ["abxy"]) == 0.5, "the threshold itself counts"
    assert anls("", [""]) == 1
    assert anls("x", []) == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", True),
        ("yes, there is no doubt", True),
        ("No, there isn't.", False),
        ("There is a dog, yes.", True),
        ("There is not a dog.", False),
        ("There isn’t one", False),
        ("I cannot tell. Yes?", None),
        ("Nobody knows", None),
        ("noon", None),
        ("yes or no", True),
        ("It could be yes or no", None),
        ("", None),
        ("是", None),
    ],
)
def test_parse_yes_no(answer: str, expected: bool | None) -> None:
    assert parse_yes_no(answer) is expected


def test_popes_rule_counts_other_answers_as_yes() -> None:
    assert parse_pope("I cannot tell") is True
    assert parse_pope("Sure. Not really") is True
    assert parse_pope("No, it is") is False
    assert parse_pope("There is not, well") is False


def test_pope_yes_ratio_is_of_the_answers_not_of_the_labels() -> None:
    scores = pope_scores([True, True, True, None], [True, False, False, True])
    assert scores.yes_ratio == 0.75
    assert scores.accuracy == 0.25
    assert scores.precision == pytest.approx(1 / 3)
    assert scores.recall == 0.5
    assert scores.f1 == pytest.approx(0.4)


def test_pope_scores_of_the_published_counts() -> None:
    """TP 1372, FP 128, TN 1372, FN 128, of 1,500 yes and 1,500 no."""
    labels = [True] * 1500 + [False] * 1500
    answers = [True] * 1372 + [False] * 128 + [True] * 128 + [False] * 1372
    scores = pope_scores(answers, labels)
    for value in (scores.accuracy, scores.precision, scores.recall, scores.f1):
        assert value == pytest.approx(1372 / 1500)
    assert scores.yes_ratio == 0.5


def test_pope_undefined_is_none_and_not_zero() -> None:
    scores = pope_scores([False, False], [False, False])
    assert scores.accuracy == 1
    assert scores.precision is scores.recall is scores.f1 is None
    assert pope_scores([], []).accuracy is None
    with pytest.raises(ValueError, match="shorter"):
        pope_scores([True], [])


def test_mme_accuracy_plus_needs_both_questions_of_an_image() -> None:
    scores = mme_scores([("a", True), ("a", True), ("b", True), ("b", False)])
    assert scores == {"accuracy": 75, "accuracy_plus": 50, "score": 125}
    one_each = mme_scores([("a", True), ("a", None), ("b", True)])
    assert one_each == {"accuracy": 100, "accuracy_plus": 0, "score": 100}
    assert parse_mme("Yes, it is") is True
    assert parse_mme("No.") is False
    assert parse_mme("I say yes") is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1),
        ("B. blue", 1),
        ("The answer is C.", 2),
        ("The answer is C. The answer is A.", None),
        ("2. The answer is C.", 2),
        ("D", None),
        ("(B)", None),
        ("", None),
    ],
)
def test_science_qa_rule(answer: str, expected: int | None) -> None:
    assert parse_science_qa(answer, ("x", "y", "z")) == expected


def test_circular_accuracy_needs_every_rotation() -> None:
    rounds = [("1", True), ("1", True), ("2", True), ("2", False), ("3", False)]
    assert circular_accuracy(rounds) == pytest.approx(1 / 3)
    assert circular_accuracy([]) is None


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar_exact(0, 0) == 1
    assert mcnemar_exact(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar_exact(5, 1) == mcnemar_exact(1, 5)
    assert mcnemar_exact(7, 7) == 1
    # scipy.stats.binomtest(3000, 6100).pvalue
    assert mcnemar_exact(3000, 3100) == pytest.approx(0.2049495446, rel=1e-6)
    with pytest.raises(ValueError, match="not less than 0"):
        mcnemar_exact(-1, 2)


def test_bootstrap_interval_matches_the_normal_approximation() -> None:
    a, b = [0, 1, 1, 0] * 100, [1, 1, 1, 0] * 100
    difference = bootstrap_difference(a, b)
    error = math.sqrt(0.25 * 0.75 / 400)
    assert difference.mean == 0.25
    assert difference.low == pytest.approx(0.25 - 1.96 * error, abs=0.006)
    assert difference.high == pytest.approx(0.25 + 1.96 * error, abs=0.006)
    assert bootstrap_difference(a, b) == difference, "a seed makes it repeatable"
    with pytest.raises(ValueError, match="no pairs"):
        bootstrap_difference([], [])


def test_bootstrap_resamples_pairs_and_not_the_two_sides() -> None:
    """Scores with the same variation by question have a constant difference."""
    a = [i / 100 for i in range(100)]
    difference = bootstrap_difference(a, [x + 0.5 for x in a])
    assert difference.low == pytest.approx(0.5)
    assert difference.high == pytest.approx(0.5)


def test_the_normal_interval_of_many_distinct_differences_agrees_with_the_bootstrap() -> None:
    import numpy as np

    draw = np.random.default_rng(0)
    b = draw.normal(0.3, 1.0, size=100_000)
    many = bootstrap_difference([0.0] * len(b), b.tolist())
    assert many.high - many.low == pytest.approx(2 * 1.96 / math.sqrt(len(b)), rel=0.01)
    few = b[:1_999]
    resampled = bootstrap_difference([0.0] * len(few), few.tolist())
    error = float(few.std(ddof=1)) / math.sqrt(len(few))
    assert resampled.low == pytest.approx(float(few.mean()) - 1.96 * error, abs=0.1 * error)


def test_outcomes() -> None:
    counts = outcomes([0, 1, 1, 0.3], [1, 0, 1, 0.4])
    assert (counts.wins, counts.losses, counts.ties) == (2, 1, 1)
