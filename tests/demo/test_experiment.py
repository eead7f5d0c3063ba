"""The demo's scores, comparisons and criteria, on constructed answers."""

import pytest

from tita.demo.answers import Asked
from tita.demo.demo_report import method_table
from tita.demo.experiment import (
    Findings,
    MethodAnswers,
    PairedComparison,
    analyse,
    by_category,
    compare,
    guided,
    sweep,
)
from tita.demo.methods import BASE, Method, contrastive_methods, guided_method, joint_method
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


def test_the_first_of_equals_is_chosen() -> None:
    scores = dict(zip((0.1, 0.2, 0.3, 0.5), (0.5, 0.7, 0.7, 0.6), strict=True))
    chosen = guided_method("r").choose(lambda way: scores[way.guidance.weight])
    assert chosen.guidance.weight == 0.2


def test_methods_are_compared_with_the_base_and_controls_with_their_baseline() -> None:
    def told(method: Method, number: int, *, time: float, **controls: int) -> MethodAnswers:
        return MethodAnswers(
            method=method,
            chosen=method.ways[0],
            test=Asked(answers(number), 1.0),
            controls={name: Asked(answers(each), 1.0) for name, each in controls.items()},
            times_base=time,
        )

    _, vcd, m3id = contrastive_methods()
    rows = method_table(
        analyse(
            {each.name: Asked(answers(60), 1.0) for each in sweep("r")},
            [
                told(BASE, 60, time=1.0),
                told(vcd, 75, time=2.0),
                told(m3id, 60, time=2.1),
                told(guided_method("r"), 70, time=1.3, **{"other images": 61, "no DPO": 60}),
                told(joint_method("r", noise_step=999), 80, time=2.4, **{"other images": 73}),
            ],
            QUESTIONS,
            chosen=guided(0.3, reward="r"),
            validation={},
        )
    )
    assert [row["points"] for row in rows] == [None, 15.0, 0.0, 10.0, 20.0]
    assert [row["time"] for row in rows] == [1.0, 2.0, 2.1, 1.3, 2.4]
    assert [row["other images"] for row in rows] == [None, None, None, 1.0, -2.0]
    assert [row["no DPO"] for row in rows] == [None, None, None, 0.0, None]
    # McNemar's p of 20 questions won and none lost, the smallest of four: times 4.
    assert rows[4]["p, corrected"] == pytest.approx(4 * 2 * 0.5**20, rel=0.05)
    assert rows[2]["p, corrected"] == 1.0


def test_what_has_controls_uses_a_reward_model_while_it_decodes() -> None:
    joint = joint_method("r", noise_step=999)
    made = {name: make(joint.ways[0]) for name, make in joint.controls.items()}
    assert made["other images"].shuffled
    assert made["no DPO"].reward == "before DPO"
    assert all(each.guidance == joint.ways[0].guidance for each in made.values())
    assert (joint.baseline, guided_method("r").baseline) == ("vcd", "base")
    assert not any(each.controls for each in (BASE, *contrastive_methods()))
