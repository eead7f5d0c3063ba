"""Guidance on raw logits, in place: no vocabulary-sized tensor beside the models' own.

The forms of `guidance` take log-probabilities. Logits differ from those by a constant per row,
which moves neither the best token nor the softmax: rows are combined as they come.

Legend: G rows, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tita.align.guidance import FORMS, log_softmax

if TYPE_CHECKING:
    from torch import Tensor


def mix(base: "Tensor", reward: "Tensor", weights: Sequence[float], *, form: str) -> None:
    """Write the rows' combined scores, unnormalised, over the reward's.

    Args:
        base: logits[G, V], float32.
        reward: logits[G, V], float32; overwritten.
        weights: guidance weights of the G rows.
        form: a key of `FORMS`.
    """
    import torch

    w = torch.tensor(weights, device=base.device)
    if bool(torch.isneginf(torch.stack([base.amin(), reward.amin()])).any()):
        # What a model rules out needs care, and is rare.
        reward.copy_(FORMS[form](log_softmax(base), log_softmax(reward), w))
    elif form == "tita":
        torch.lerp(base, reward, w.unsqueeze(-1), out=reward)
    else:
        reward.mul_(w.unsqueeze(-1)).add_(base)
