"""Reward models and weights on the command line."""

import pytest

from tita.cli.guidance_options import parse_rewards, parse_weights
from tita.errors import TitaError
from tita.infer.options import InferOptions


def test_names_are_split_off() -> None:
    assert parse_rewards(None) == (None, {})
    assert parse_rewards(["runs/lr=1e-5/model"]) == ("runs/lr=1e-5/model", {})
    assert parse_rewards(["faithful=a/b=c", "brief=reward/current"]) == (
        None,
        {"faithful": "a/b=c", "brief": "reward/current"},
    )
    assert parse_weights(["0.3"]) == (0.3, {})
    assert parse_weights(["faithful=0.3", "brief=0"]) == (None, {"faithful": 0.3, "brief": 0.0})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", "b"], "several reward models without names"),
        (["a", "x=b"], "--reward a has no name beside others"),
        (["x=a", "x=b"], "two reward models named 'x'"),
        (["base=a"], "'base' cannot be the name of a reward model"),
        (["x="], "names no model"),
    ],
)
def test_mistakes_in_rewards(given: list[str], message: str) -> None:
    with pytest.raises(TitaError, match=message):
        parse_rewards(given)


@pytest.mark.parametrize(
    "given",
    [["much"], ["-1"], ["x=nan"], ["0.1", "0.2"], ["0.1", "x=1"], ["x=1", "y=2", "x=2"]],
)
def test_mistakes_in_weights(given: list[str]) -> None:
    message = r"--weight is|several weights without names|--weight: two weights of x; leave one"
    with pytest.raises(TitaError, match=message):
        parse_weights(given)


def test_one_weight_is_divided_between_rewards() -> None:
    two = {"faithful": "a", "brief": "b"}
    options = InferOptions(base="x", rewards=two, weight=0.6)
    assert options.guidance.weights == {"faithful": 0.3, "brief": 0.3}
    options = InferOptions(base="x", rewards=two, weights={"brief": 0.1})
    assert options.describe()["weights"] == {"brief": 0.1}
    with pytest.raises(TitaError, match="no reward model 'polite'; choose from faithful, brief"):
        InferOptions(base="x", rewards=two, weights={"polite": 0.1})


def test_forms_over_views_need_no_reward_model() -> None:
    options = InferOptions(base="x", form="vcd")
    assert (options.guidance.weight, options.guidance.plausibility) == (1.0, 0.1)
    assert InferOptions(base="x", form="cfg", weight=0.7, text="a 7").describe()["text"] == "a 7"
    with pytest.raises(TitaError, match="--weight without --reward"):
        InferOptions(base="x", weight=0.3)
