"""The demo's scores, comparisons and criteria, on constructed answers."""

import pytest

from tita.demo.demo_report import method_table
from tita.demo.experiment import (
    BASELINES,
    CONDITIONS,
    Asked,
    Findings,
    PairedComparison,
    analyse,
    by_category,
    choose_weight,
    compare,
)
from tita.records import Question

QUESTIONS = [
    Question(
        id=str(i),
        text="Is there a 7?",
        references=("yes" if i % 2 else "no",),
        category="existence",
    )
    for i in range(100)
]
RIGHT = {question.id: question.references[0] for question in QUESTIONS}
WRONG = {question.id: "blue" for question in QUESTIONS}


def answers(num_right: int) -> dict[str, str]:
    return {
        question.id: (RIGHT if i < num_right else WRONG)[question.id]
        for i, question in enumerate(QUESTIONS)
    }


def findings(*, base: int, guided: int, reward: int, shuffled: int, untrained: int) -> Findings:
    def against(a: int, b: int) -> PairedComparison:
        return compare(QUESTIONS, a=("a", answers(a)), b=("b", answers(b)))

    return Findings(
        weight=0.3,
        against_base=against(base, guided),
        against_reward=against(reward, guided),
        shuffled=against(base, shuffled),
        untrained=against(base, untrained),
    )


def test_a_clear_gain_meets_all_criteria() -> None:
    assert findings(base=60, guided=80, reward=70, shuffled=62, untrained=60).reached


@pytest.mark.parametrize(
    ("changed", "check"),
    [
        ({"guided": 63}, "beats the base"),
        ({"guided": 40}, "beats the base"),
        ({"reward": 80}, "beats the reward model alone"),
        ({"shuffled": 75}, "loses more than half its gain on shuffled images"),
        ({"untrained": 80}, "gains nothing without DPO"),
    ],
)
def test_each_check_can_fail(changed: dict[str, int], check: str) -> None:
    numbers = {"base": 60, "guided": 80, "reward": 70, "shuffled": 62, "untrained": 60}
    result = findings(**{**numbers, **changed})
    assert not result.checks[check]
    assert not result.reached


def test_comparison_counts_and_tests_pairs() -> None:
    result = compare(QUESTIONS, a=("base", answers(60)), b=("guided", answers(80)))
    assert (result.wins, result.losses) == (20, 0)
    assert result.difference == pytest.approx(0.2)
    assert result.low < 0.2 < result.high
    assert result.p_value == pytest.approx(2 * 0.5**20)


def test_the_yes_ratio_shows_constant_answers() -> None:
    always_no = {question.id: "No." for question in QUESTIONS}
    score = by_category(QUESTIONS, always_no)["existence"]
    assert (score.accuracy, score.yes_ratio) == (0.5, 0.0)
    assert by_category(QUESTIONS, RIGHT)["existence"].f1 == 1.0


def test_open_questions_have_no_yes_ratio() -> None:
    question = Question(id="a", text="What number?", references=("7",), category="reading")
    score = by_category([question], {"a": "7"})["reading"]
    assert (score.accuracy, score.f1, score.yes_ratio) == (1.0, None, None)


def test_the_weight_is_a_guided_one_and_the_smaller_of_equals() -> None:
    candidates = {0.0: RIGHT, 0.1: answers(50), 0.3: answers(70), 0.5: answers(70), 1.0: RIGHT}
    assert choose_weight(QUESTIONS, candidates) == 0.3


def test_methods_are_compared_with_the_base_at_their_cost() -> None:
    right = {"vcd": 61, "m3id": 60, "best of 4": 75, "guided, w = 0.3": 80}
    asked = {
        (split, each.name): Asked(answers(right.get(each.name, 60)), 2.0 + 3 * (each.best_of > 1))
        for split in ("validation", "test")
        for each in (*CONDITIONS, *BASELINES)
    }
    rows = method_table(analyse(asked, {"validation": QUESTIONS, "test": QUESTIONS}, facts={}))
    assert [row["method"] for row in rows] == ["base", *right]
    assert [row["points"] for row in rows] == [None, 1.0, 0.0, 15.0, 20.0]
    assert [row["time, times the base"] for row in rows] == [1.0, 1.0, 1.0, 2.5, 1.0]
    # McNemar's p of 20 questions won and none lost, the smallest of four: times 4.
    assert rows[4]["p, corrected"] == pytest.approx(4 * 2 * 0.5**20, rel=0.05)
    assert rows[1]["p, corrected"] == 1.0
