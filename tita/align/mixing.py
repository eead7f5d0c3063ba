"""Guidance on raw logits, in place: no vocabulary-sized tensor beside the models' own.

The forms of `guidance` take log-probabilities. Logits differ from those by a constant per row,
which moves neither the best token nor the softmax: rows are combined as they come.

Legend: G rows, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tita.align.guidance import FORMS, WITH_REFERENCE, log_ratio, log_softmax, plausible

if TYPE_CHECKING:
    from torch import Tensor


def mix(
    base: "Tensor",
    reward: "Tensor",
    weights: Sequence[float],
    *,
    form: str,
    reference: "Tensor | None" = None,
) -> None:
    """Write the rows' combined scores, unnormalised, over the reward's.

    Args:
        base: logits[G, V], float32.
        reward: logits[G, V], float32; overwritten.
        weights: guidance weights of the G rows.
        form: a key of `FORMS`.
        reference: logits[G, V], float32, for the forms that need them.
    """
    import torch

    assert (reference is not None) == (form in WITH_REFERENCE)
    w = torch.tensor(weights, device=base.device, dtype=torch.float32)
    sides = [side for side in (base, reward, reference) if side is not None]
    # Row by row: the least of a row with NaN is NaN, and must not hide another row's -inf.
    least = torch.stack([side.amin(-1) for side in sides])
    if bool(torch.isneginf(least).any()):
        # What a model rules out needs care, and is rare.
        steering = log_softmax(reward)
        if reference is not None:
            steering = log_ratio(steering, log_softmax(reference))
        reward.copy_(FORMS[form](log_softmax(base), steering, w))
        return
    if form == "tita":
        torch.lerp(base, reward, w.unsqueeze(-1), out=reward)
        return
    if reference is not None:
        reward.sub_(reference)
    reward.mul_(w.unsqueeze(-1)).add_(base)


def rule_out_implausible(base: "Tensor", scores: "Tensor", alphas: Sequence[float]) -> None:
    """Put -inf over scores[G, V] of tokens that are not `plausible` under base logits[G, V]."""
    import torch

    alpha = torch.tensor(alphas, device=base.device, dtype=torch.float32)
    scores.masked_fill_(~plausible(base, alpha), -torch.inf)
