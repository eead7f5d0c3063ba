"""The forms of guidance: hand-computed cases, edge cases, and in-place mixing."""

import pytest
import torch

from tita.align.guidance import (
    FORM_FUNCTIONS,
    dpo,
    log_ratio,
    log_softmax,
    mix,
    plausible,
    rule_out_implausible,
    tita,
)
from tita.align.requests import REFERENCE_FORMS

INF = torch.inf
BASE = torch.tensor([[0.7, 0.2, 0.1]]).log()
REWARD = torch.tensor([[0.1, 0.8, 0.1]]).log()
REFERENCE = torch.tensor([[0.2, 0.2, 0.6]]).log()


def w(*weights: float) -> torch.Tensor:
    return torch.tensor(weights)


def steering(form: str, reward: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The second argument of a form."""
    return log_ratio(reward, reference) if form in REFERENCE_FORMS else reward


class TestHandComputed:
    def test_tita_is_the_geometric_mean_at_one_half(self) -> None:
        mixed = tita(BASE, REWARD, w(0.5)).exp()
        torch.testing.assert_close(mixed, torch.tensor([[0.07**0.5, 0.16**0.5, 0.1]]))

    def test_tita_beyond_one_moves_past_the_reward(self) -> None:
        mixed = tita(BASE, REWARD, w(2.0)).exp()
        torch.testing.assert_close(mixed, torch.tensor([[0.1**2 / 0.7, 0.8**2 / 0.2, 0.1]]))

    def test_genarm_adds(self) -> None:
        mixed = FORM_FUNCTIONS["genarm"](BASE, REWARD, w(0.5)).exp()
        wanted = torch.tensor([[0.7 * 0.1**0.5, 0.2 * 0.8**0.5, 0.1 * 0.1**0.5]])
        torch.testing.assert_close(mixed, wanted)

    def test_dpo_multiplies_by_the_ratio(self) -> None:
        mixed = dpo(BASE, log_ratio(REWARD, REFERENCE), w(2.0)).exp()
        wanted = torch.tensor([[0.7 * 0.5**2, 0.2 * 4.0**2, 0.1 * (1 / 6) ** 2]])
        torch.testing.assert_close(mixed, wanted)

    def test_dpo_with_the_base_as_reference_equals_tita(self) -> None:
        same = dpo(BASE, log_ratio(REWARD, BASE), w(0.3))
        torch.testing.assert_close(same, tita(BASE, REWARD, w(0.3)))

    def test_weights_are_per_row(self) -> None:
        for form in FORM_FUNCTIONS.values():
            many = form(BASE.expand(3, -1), REWARD.expand(3, -1), w(0.0, 0.4, 1.5))
            for row, weight in enumerate((0.0, 0.4, 1.5)):
                torch.testing.assert_close(many[row : row + 1], form(BASE, REWARD, w(weight)))

    def test_plausible_tokens_have_a_fraction_of_the_maximum(self) -> None:
        rows = BASE.expand(4, -1)
        kept = plausible(rows, w(0.0, 0.1, 0.25, 1.0))
        assert kept.tolist() == [
            [True, True, True],
            [True, True, True],  # 0.1 >= 0.1 * 0.7
            [True, True, False],  # 0.2 >= 0.175 > 0.1
            [True, False, False],
        ]

    def test_plausibility_of_logits_is_the_same(self) -> None:
        assert torch.equal(plausible(BASE + 5, w(0.25)), plausible(BASE, w(0.25)))


class TestEdges:
    @pytest.mark.parametrize("form", FORM_FUNCTIONS)
    def test_weight_0_is_the_base_bit_for_bit(self, form: str) -> None:
        for odd in ([[-INF, 0.0, -INF]], [[-INF] * 3], [[torch.nan] * 3]):
            assert torch.equal(FORM_FUNCTIONS[form](BASE, torch.tensor(odd), w(0.0)), BASE)

    def test_weight_1_is_the_reward_bit_for_bit(self) -> None:
        ruled_out = torch.tensor([[0.0, -INF, -INF]])
        assert torch.equal(tita(ruled_out, REWARD, w(1.0)), REWARD)

    @pytest.mark.parametrize("form", FORM_FUNCTIONS)
    @pytest.mark.parametrize("weight", [0.5, 2.0])
    def test_tokens_ruled_out_by_either_stay_out(self, form: str, weight: float) -> None:
        base = torch.tensor([[-INF, -INF, -1.0, -1.0]])
        reward = torch.tensor([[-INF, -1.0, -INF, -2.0]])
        mixed = FORM_FUNCTIONS[form](base, reward, w(weight))
        assert mixed.isneginf().tolist() == [[True, True, True, False]]

    def test_tokens_ruled_out_by_the_reference_follow_the_base(self) -> None:
        ratio = log_ratio(torch.tensor([[-1.0, -INF, -1.0]]), torch.tensor([[-INF, -INF, -2.0]]))
        assert ratio.tolist() == [[0.0, -INF, 1.0]]

    @pytest.mark.parametrize("form", FORM_FUNCTIONS)
    def test_all_tokens_ruled_out_does_not_crash(self, form: str) -> None:
        nothing = torch.full((1, 3), -INF)
        assert FORM_FUNCTIONS[form](BASE, nothing, w(0.5)).isneginf().all()
        assert FORM_FUNCTIONS[form](nothing, REWARD, w(0.5)).isneginf().all()
        assert plausible(nothing, w(0.5)).all()

    @pytest.mark.parametrize("form", FORM_FUNCTIONS)
    def test_nan_is_not_hidden(self, form: str) -> None:
        broken = torch.tensor([[0.1, torch.nan, 0.2]])
        assert FORM_FUNCTIONS[form](broken, REWARD, w(0.5))[0, 1].isnan()
        assert FORM_FUNCTIONS[form](BASE, broken, w(0.5))[0, 1].isnan()
        assert plausible(broken, w(0.5))[0, 1]

    @pytest.mark.parametrize("form", FORM_FUNCTIONS)
    def test_sums_are_float32_for_any_dtype(self, form: str) -> None:
        torch.manual_seed(0)
        base, reward = torch.randn(2, 2, 5).bfloat16()
        assert log_softmax(base).dtype == torch.float32
        mixed = FORM_FUNCTIONS[form](base, reward, w(0.3, 0.7))
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, FORM_FUNCTIONS[form](base.float(), reward.float(), w(0.3, 0.7)))


class TestInPlace:
    """`mix` on logits equals the forms on log-probabilities, up to a constant per row."""

    def sides(self, form: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        torch.manual_seed(1)
        base, reward, reference = 3 * torch.randn(3, 3, 50)
        return base, reward, reference if form in REFERENCE_FORMS else None

    def check(
        self,
        form: str,
        weight: float,
        base: torch.Tensor,
        reward: torch.Tensor,
        reference: torch.Tensor | None,
    ) -> None:
        ours, base_before = reward.clone(), base.clone()
        mix(base, ours, [weight] * len(ours), form=form, reference=reference)
        assert torch.equal(base, base_before)
        theirs = log_softmax(reward)
        if reference is not None:
            theirs = log_ratio(theirs, log_softmax(reference))
        wanted = FORM_FUNCTIONS[form](log_softmax(base), theirs, torch.full((len(ours),), weight))
        torch.testing.assert_close(ours.softmax(-1), wanted.softmax(-1))

    @pytest.mark.parametrize("form", FORM_FUNCTIONS)
    @pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0, 2.5])
    def test_equals_the_form(self, form: str, weight: float) -> None:
        base, reward, reference = self.sides(form)
        self.check(form, weight, base, reward, reference)
        base[1, 7] = reward[2, 9] = -INF
        if reference is not None:
            reference[0, 3] = -INF
        self.check(form, weight, base, reward, reference)

    @pytest.mark.parametrize("form", FORM_FUNCTIONS)
    def test_nan_in_one_row_does_not_affect_others(self, form: str) -> None:
        base, reward, reference = self.sides(form)
        reward[1, 4] = -INF
        alone = reward[1:2].clone()
        one = None if reference is None else reference[1:2]
        mix(base[1:2], alone, [0.5], form=form, reference=one)
        base[0, 0] = torch.nan
        mix(base, reward, [0.5] * 3, form=form, reference=reference)
        assert reward[0].isnan().any()
        torch.testing.assert_close(reward[1:2], alone)
        assert reward[2].isfinite().all()

    def test_implausible_tokens_are_ruled_out_row_by_row(self) -> None:
        base, scores = BASE.expand(2, -1) + 3, REWARD.repeat(2, 1)
        rule_out_implausible(base, scores, [0.0, 0.25])
        assert torch.equal(scores[0], REWARD[0])
        assert scores[1].isneginf().tolist() == [False, False, True]
