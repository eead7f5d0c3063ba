"""Sums of log-probabilities: hand-computed cases, edge cases, and sums of logits."""

import pytest
import torch

from tita.align.guidance import (
    Contrast,
    combine,
    log_softmax,
    mix,
    mix_exactly,
    plausible,
    rule_out_implausible,
)

INF = torch.inf
BASE = torch.tensor([[0.7, 0.2, 0.1]]).log()
REWARD = torch.tensor([[0.1, 0.8, 0.1]]).log()
REFERENCE = torch.tensor([[0.2, 0.2, 0.6]]).log()
FORMS = ("tita", "genarm", "dpo", "vcd")


def w(*weights: float) -> tuple[float, ...]:
    return weights


def contrast(
    form: str, other: torch.Tensor, weights: tuple[float, ...], reference: torch.Tensor
) -> Contrast:
    """The term of a form with one reward model, or one view of the base."""
    if form == "vcd":
        return Contrast(other, [-weight for weight in weights], "base")
    against = {"tita": "base", "genarm": None, "dpo": reference}[form]
    return Contrast(other, weights, against)  # type: ignore[arg-type]


def combined(
    form: str,
    base: torch.Tensor,
    other: torch.Tensor,
    weights: tuple[float, ...],
    reference: torch.Tensor = REFERENCE,
) -> torch.Tensor:
    return combine(base, [contrast(form, other, weights, reference)])


class TestHandComputed:
    def test_tita_is_the_geometric_mean_at_one_half(self) -> None:
        mixed = combined("tita", BASE, REWARD, w(0.5)).exp()
        torch.testing.assert_close(mixed, torch.tensor([[0.07**0.5, 0.16**0.5, 0.1]]))

    def test_tita_beyond_one_moves_past_the_reward(self) -> None:
        mixed = combined("tita", BASE, REWARD, w(2.0)).exp()
        torch.testing.assert_close(mixed, torch.tensor([[0.1**2 / 0.7, 0.8**2 / 0.2, 0.1]]))

    def test_genarm_adds(self) -> None:
        mixed = combined("genarm", BASE, REWARD, w(0.5)).exp()
        wanted = torch.tensor([[0.7 * 0.1**0.5, 0.2 * 0.8**0.5, 0.1 * 0.1**0.5]])
        torch.testing.assert_close(mixed, wanted)

    def test_dpo_multiplies_by_the_ratio(self) -> None:
        mixed = combined("dpo", BASE, REWARD, w(2.0)).exp()
        wanted = torch.tensor([[0.7 * 0.5**2, 0.2 * 4.0**2, 0.1 * (1 / 6) ** 2]])
        torch.testing.assert_close(mixed, wanted)

    def test_dpo_with_the_base_as_reference_equals_tita(self) -> None:
        same = combined("dpo", BASE, REWARD, w(0.3), BASE)
        torch.testing.assert_close(same, combined("tita", BASE, REWARD, w(0.3)))

    def test_vcd_moves_away_from_the_distorted_view(self) -> None:
        mixed = combined("vcd", BASE, REWARD, w(1.0)).exp()
        torch.testing.assert_close(mixed, torch.tensor([[0.49 / 0.1, 0.04 / 0.8, 0.01 / 0.1]]))

    def test_several_terms_add_up(self) -> None:
        two = [Contrast(REWARD, [0.5], "base"), Contrast(REFERENCE, [0.25], "base")]
        wanted = 0.25 * BASE + 0.5 * REWARD + 0.25 * REFERENCE
        torch.testing.assert_close(combine(BASE, two), wanted)
        torch.testing.assert_close(combine(BASE, two[::-1]), wanted)

    def test_weights_are_per_row(self) -> None:
        sides = (BASE.expand(3, -1), REWARD.expand(3, -1))
        for form in FORMS:
            many = combined(form, *sides, w(0.0, 0.4, 1.5), REFERENCE.expand(3, -1))
            for row, weight in enumerate((0.0, 0.4, 1.5)):
                one = combined(form, BASE, REWARD, w(weight))
                torch.testing.assert_close(many[row : row + 1], one)

    def test_plausible_tokens_have_a_fraction_of_the_maximum(self) -> None:
        rows = BASE.expand(4, -1)
        kept = plausible(rows, torch.tensor([0.0, 0.1, 0.25, 1.0]))
        assert kept.tolist() == [
            [True, True, True],
            [True, True, True],  # 0.1 >= 0.1 * 0.7
            [True, True, False],  # 0.2 >= 0.175 > 0.1
            [True, False, False],
        ]

    def test_plausibility_of_logits_is_the_same(self) -> None:
        assert torch.equal(
            plausible(BASE + 5, torch.tensor([0.25])), plausible(BASE, torch.tensor([0.25]))
        )


class TestEdges:
    @pytest.mark.parametrize("form", FORMS)
    def test_weight_0_is_the_base_bit_for_bit(self, form: str) -> None:
        for odd in ([[-INF, 0.0, -INF]], [[-INF] * 3], [[torch.nan] * 3]):
            assert torch.equal(combined(form, BASE, torch.tensor(odd), w(0.0)), BASE)

    def test_weight_1_is_the_reward_bit_for_bit(self) -> None:
        ruled_out = torch.tensor([[0.0, -INF, -INF]])
        assert torch.equal(combined("tita", ruled_out, REWARD, w(1.0)), REWARD)

    def test_weights_that_add_up_to_1_leave_the_base_out(self) -> None:
        ruled_out = torch.tensor([[0.0, -INF, -INF]])
        two = [Contrast(REWARD, [0.7], "base"), Contrast(REFERENCE, [0.3], "base")]
        torch.testing.assert_close(combine(ruled_out, two), 0.7 * REWARD + 0.3 * REFERENCE)
        two[0] = Contrast(REWARD, [0.6], "base")
        assert combine(ruled_out, two).isneginf().tolist() == [[False, True, True]]

    @pytest.mark.parametrize("form", ["tita", "genarm", "dpo"])
    @pytest.mark.parametrize("weight", [0.5, 2.0])
    def test_tokens_ruled_out_by_either_stay_out(self, form: str, weight: float) -> None:
        base = torch.tensor([[-INF, -INF, -1.0, -1.0]])
        reward = torch.tensor([[-INF, -1.0, -INF, -2.0]])
        mixed = combined(form, base, reward, w(weight), torch.zeros_like(base))
        assert mixed.isneginf().tolist() == [[True, True, True, False]]

    def test_where_the_subtracted_rules_a_token_out_the_base_decides(self) -> None:
        other = torch.tensor([[-1.0, -INF, -1.0]])
        reference = torch.tensor([[-INF, -INF, -2.0]])
        mixed = combined("dpo", BASE, other, w(2.0), reference)
        torch.testing.assert_close(mixed, torch.tensor([[BASE[0, 0], -INF, BASE[0, 2] + 2]]))
        mixed = combined("vcd", BASE, reference, w(2.0))
        torch.testing.assert_close(
            mixed, torch.tensor([[BASE[0, 0], BASE[0, 1], 3 * BASE[0, 2] + 4]])
        )

    @pytest.mark.parametrize("form", FORMS)
    def test_all_tokens_ruled_out_does_not_crash(self, form: str) -> None:
        nothing = torch.full((1, 3), -INF)
        if form == "vcd":
            assert torch.equal(combined(form, BASE, nothing, w(0.5)), BASE)
        else:
            assert combined(form, BASE, nothing, w(0.5)).isneginf().all()
        assert combined(form, nothing, REWARD, w(0.5)).isneginf().all()
        assert plausible(nothing, torch.tensor([0.5])).all()

    @pytest.mark.parametrize("form", FORMS)
    def test_nan_is_not_hidden(self, form: str) -> None:
        broken = torch.tensor([[0.1, torch.nan, 0.2]])
        assert combined(form, broken, REWARD, w(0.5))[0, 1].isnan()
        assert combined(form, BASE, broken, w(0.5))[0, 1].isnan()
        assert plausible(broken, torch.tensor([0.5]))[0, 1]

    @pytest.mark.parametrize("form", FORMS)
    def test_sums_are_float32_for_any_dtype(self, form: str) -> None:
        torch.manual_seed(0)
        sides = torch.randn(3, 2, 5).bfloat16()
        base, reward, reference = sides
        assert log_softmax(base).dtype == torch.float32
        mixed = combined(form, base, reward, w(0.3, 0.7), reference)
        assert mixed.dtype == torch.float32
        base, reward, reference = sides.float()
        assert torch.equal(mixed, combined(form, base, reward, w(0.3, 0.7), reference))


class TestLogits:
    """Sums of logits equal those of log-probabilities, up to a constant per row."""

    def sides(self) -> torch.Tensor:
        torch.manual_seed(1)
        return 3 * torch.randn(3, 3, 50)

    def check(self, forms: list[str], weight: float, sides: torch.Tensor) -> None:
        base, *others, reference = sides
        weights = (weight,) * len(base)
        ours = [
            contrast(form, other, weights, reference)
            for form, other in zip(forms, others, strict=False)
        ]
        theirs = [
            contrast(form, log_softmax(other), weights, log_softmax(reference))
            for form, other in zip(forms, others, strict=False)
        ]
        wanted = combine(log_softmax(base), theirs)
        before, out = sides.clone(), torch.empty_like(base)
        mix(base, ours, out=out)
        # Where a model rules tokens out, the fast sum is right or says that it is not.
        right = out.amax(-1).isfinite()
        assert right.all() or sides.isneginf().any()
        torch.testing.assert_close(out[right].softmax(-1), wanted[right].softmax(-1))
        mix_exactly(base, ours, out=out)
        torch.testing.assert_close(out.softmax(-1), wanted.softmax(-1))
        assert torch.equal(sides, before)
        if len(forms) == 1 and right.all():
            mix(base, ours, out=others[0])
            torch.testing.assert_close(others[0].softmax(-1), wanted.softmax(-1))

    @pytest.mark.parametrize(
        "forms", [[form] for form in FORMS] + [[f, g] for f in FORMS for g in FORMS]
    )
    @pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0, 2.5])
    def test_equals_the_definition(self, forms: list[str], weight: float) -> None:
        sides = self.sides() if len(forms) == 1 else torch.cat([self.sides(), self.sides()[:1]])
        self.check(forms, weight, sides)
        # In a row each: every set of models that rule a token out.
        several = sides[:, :1].repeat(1, 2 ** len(sides), 1)
        for row in range(several.shape[1]):
            for side in range(len(sides)):
                if row >> side & 1:
                    several[side, row, 7] = -INF
        self.check(forms, weight, several)

    @pytest.mark.parametrize("form", FORMS)
    def test_nan_in_one_row_does_not_affect_others(self, form: str) -> None:
        base, reward, reference = self.sides()
        reward[1, 4] = -INF
        base[0, 0] = torch.nan
        for way in (mix, mix_exactly):
            out, alone = torch.empty_like(base), torch.empty_like(base[1:2])
            way(base[1:2], [contrast(form, reward[1:2], w(0.5), reference[1:2])], out=alone)
            way(base, [contrast(form, reward, w(0.5, 0.5, 0.5), reference)], out=out)
            assert out[0].isnan().any()
            torch.testing.assert_close(out[1:2], alone, equal_nan=True)
            assert out[2].isfinite().all()

    def test_implausible_tokens_are_ruled_out_row_by_row(self) -> None:
        base, scores = BASE.expand(2, -1) + 3, REWARD.repeat(2, 1)
        rule_out_implausible(base, scores, [0.0, 0.25])
        assert torch.equal(scores[0], REWARD[0])
        assert scores[1].isneginf().tolist() == [False, False, True]
