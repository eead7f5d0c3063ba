"""The mathematics of guidance, as pure functions.

Legend: B rows of a batch, V tokens of the vocabulary. Inputs may be of any float type; sums are
float32. Log-probabilities of -inf mark tokens that a model rules out.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Form = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]


def log_softmax(logits: "Tensor") -> "Tensor":
    """Log-probabilities[B, V] in float32 of logits[B, V]."""
    import torch

    return torch.log_softmax(logits.float(), dim=-1)


def tita(base: "Tensor", reward: "Tensor", weight: "Tensor") -> "Tensor":
    """log p_base + w (log p_reward - log p_base), unnormalised (arXiv 2510.21794).

    Args:
        base: log-probabilities[B, V].
        reward: log-probabilities[B, V].
        weight: [B]; 0 is the base alone, 1 the reward alone.

    Returns:
        scores[B, V]; -inf where either model that has a say rules a token out.
    """
    import torch

    w = weight.unsqueeze(-1)
    mixed = torch.lerp(base, reward, w)
    # 0 * -inf and inf - inf are NaN; at the ends only one model has a say.
    mixed = torch.where(torch.isneginf(base) | torch.isneginf(reward), -torch.inf, mixed)
    mixed = torch.where(w == 0, base, mixed)
    return torch.where(w == 1, reward, mixed)


def genarm(base: "Tensor", reward: "Tensor", weight: "Tensor") -> "Tensor":
    """log p_base + w log p_reward, unnormalised (GenARM, arXiv 2410.08193). Shapes as `tita`."""
    import torch

    w = weight.unsqueeze(-1)
    return torch.where(w == 0, base, base + w * reward)


FORMS: dict[str, Form] = {"tita": tita, "genarm": genarm}
