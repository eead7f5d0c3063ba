"""The mathematics of guidance, as pure functions; docs/guidance.md explains the forms.

Legend: B rows of a batch, V tokens of the vocabulary. Inputs may be of any float type; sums are
float32. Log-probabilities of -inf mark tokens that a model rules out; NaN stays NaN.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tita.align.requests import REFERENCE_FORMS

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities[B, V] in float32 of logits[B, V]."""
    return torch.log_softmax(logits.float(), dim=-1)


def tita(base: Tensor, reward: Tensor, weight: Tensor) -> Tensor:
    """log p_base + w (log p_reward - log p_base), unnormalised (arXiv 2510.21794).

    Args:
        base: log-probabilities[B, V].
        reward: log-probabilities[B, V].
        weight: [B]; 0 is the base alone, 1 the reward alone.

    Returns:
        scores[B, V]; -inf where either model rules a token out, unless its share is 0.
    """
    base, reward, w = base.float(), reward.float(), weight.unsqueeze(-1)
    mixed = torch.lerp(base, reward, w)
    # 0 * -inf and inf - inf are NaN; at weights 0 and 1 only one model counts.
    mixed = torch.where(torch.isneginf(base) | torch.isneginf(reward), -torch.inf, mixed)
    mixed = torch.where(w == 0, base, mixed)
    return torch.where(w == 1, reward, mixed)


def genarm(base: Tensor, reward: Tensor, weight: Tensor) -> Tensor:
    """log p_base + w log p_reward, unnormalised (GenARM, arXiv 2410.08193). Shapes as `tita`."""
    return _sum(base, reward, weight)


def dpo(base: Tensor, ratio: Tensor, weight: Tensor) -> Tensor:
    """log p_base + w log(p_reward / p_reference), unnormalised.

    The ratio times beta is the reward that DPO fits (arXiv 2305.18290); to add it to another
    model's log-probabilities is emulated fine-tuning (arXiv 2310.12962), or proxy-tuning (arXiv
    2401.08565).

    Args:
        base: log-probabilities[B, V].
        ratio: output of `log_ratio`, [B, V].
        weight: [B]; 0 is the base alone.
    """
    return _sum(base, ratio, weight)


def log_ratio(reward: Tensor, reference: Tensor) -> Tensor:
    """log(p_reward / p_reference)[B, V] of log-probabilities[B, V].

    A token that the reward model rules out is -inf. A token that only the reference rules out has
    no ratio, and gets 0: there the base decides alone.
    """
    reward, reference = reward.float(), reference.float()
    ratio = torch.where(torch.isneginf(reference), 0, reward - reference)
    return torch.where(torch.isneginf(reward), -torch.inf, ratio)


def plausible(base: Tensor, alpha: Tensor) -> Tensor:
    """Whether p_base >= alpha max p_base, [B, V] (arXiv 2210.15097; VCD, arXiv 2311.16922).

    A form may raise a token that the base finds absurd, if the reward model finds all other tokens
    still less likely; the bound excludes such tokens.

    Args:
        base: logits or log-probabilities[B, V]: a constant per row makes no difference.
        alpha: [B], 0 to 1; 0 accepts every token, 1 only the most likely one.

    Returns:
        A mask. NaN counts as plausible, so that it is not hidden.
    """
    base = base.float()
    return ~(base < base.amax(-1, keepdim=True) + alpha.log().unsqueeze(-1))


def _sum(base: Tensor, steering: Tensor, weight: Tensor) -> Tensor:
    base, w = base.float(), weight.unsqueeze(-1)
    # inf - inf is NaN: what the base rules out stays out.
    mixed = torch.where(torch.isneginf(base), base, base + w * steering.float())
    return torch.where(w == 0, base, mixed)


FORM_FUNCTIONS: dict[str, Form] = {"tita": tita, "genarm": genarm, "dpo": dpo}
"""By name. The second argument is log p_reward, for `dpo` its `log_ratio` to the reference."""


def mix(
    base: Tensor,
    reward: Tensor,
    weights: Sequence[float],
    *,
    form: str,
    reference: Tensor | None = None,
) -> None:
    """Overwrite the reward's logits with the combined scores, unnormalised.

    The forms take log-probabilities. Logits differ from those by a constant per row, which changes
    neither the best token nor the softmax, so they are combined as they are, in place: no
    vocabulary-sized tensor is allocated beside the models' own.

    Args:
        base: logits[B, V], float32.
        reward: logits[B, V], float32; overwritten.
        weights: guidance weights of the B rows.
        form: a key of `FORM_FUNCTIONS`.
        reference: logits[B, V], float32, for the forms that need them.
    """
    assert (reference is not None) == (form in REFERENCE_FORMS)
    w = torch.tensor(weights, device=base.device, dtype=torch.float32)
    sides = [side for side in (base, reward, reference) if side is not None]
    # Row by row: the minimum of a row with NaN is NaN, and must not hide another row's -inf.
    least = torch.stack([side.amin(-1) for side in sides])
    if bool(torch.isneginf(least).any()):
        # Rare: tokens that a model rules out need the exact definition.
        steering = log_softmax(reward)
        if reference is not None:
            steering = log_ratio(steering, log_softmax(reference))
        reward.copy_(FORM_FUNCTIONS[form](log_softmax(base), steering, w))
        return
    if form == "tita":
        torch.lerp(base, reward, w.unsqueeze(-1), out=reward)
        return
    if reference is not None:
        reward.sub_(reference)
    reward.mul_(w.unsqueeze(-1)).add_(base)


def rule_out_implausible(base: Tensor, scores: Tensor, alphas: Sequence[float]) -> None:
    """Set scores[B, V] of tokens that are not `plausible` under base logits[B, V] to -inf."""
    alpha = torch.tensor(alphas, device=base.device, dtype=torch.float32)
    scores.masked_fill_(~plausible(base, alpha), -torch.inf)
