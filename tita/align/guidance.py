"""The mathematics of guidance, as pure functions; docs/guidance.md says what they are for.

Legend: B rows of a batch, V tokens of the vocabulary. Inputs may be of any float type; sums are
float32. Log-probabilities of -inf mark tokens that a model rules out; NaN stays NaN.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tita.errors import TitaError

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

    base, reward, w = base.float(), reward.float(), weight.unsqueeze(-1)
    mixed = torch.lerp(base, reward, w)
    # 0 * -inf and inf - inf are NaN; at the ends only one model has a say.
    mixed = torch.where(torch.isneginf(base) | torch.isneginf(reward), -torch.inf, mixed)
    mixed = torch.where(w == 0, base, mixed)
    return torch.where(w == 1, reward, mixed)


def genarm(base: "Tensor", reward: "Tensor", weight: "Tensor") -> "Tensor":
    """log p_base + w log p_reward, unnormalised (GenARM, arXiv 2410.08193). Shapes as `tita`."""
    return _sum(base, reward, weight)


def dpo(base: "Tensor", ratio: "Tensor", weight: "Tensor") -> "Tensor":
    """log p_base + w log(p_reward / p_reference), unnormalised.

    The ratio times beta is the reward that DPO fits (arXiv 2305.18290); to add it to another
    model's log-probabilities is emulated fine-tuning (arXiv 2310.12962), or proxy-tuning (arXiv
    2401.08565).

    Args:
        base: log-probabilities[B, V].
        ratio: what `log_ratio` gives, [B, V].
        weight: [B]; 0 is the base alone.
    """
    return _sum(base, ratio, weight)


def log_ratio(reward: "Tensor", reference: "Tensor") -> "Tensor":
    """log(p_reward / p_reference)[B, V] of log-probabilities[B, V].

    What the reward model rules out stays out. What only the reference rules out has no ratio, and
    is given 0: there the base decides alone.
    """
    import torch

    reward, reference = reward.float(), reference.float()
    ratio = torch.where(torch.isneginf(reference), 0, reward - reference)
    return torch.where(torch.isneginf(reward), -torch.inf, ratio)


def plausible(base: "Tensor", alpha: "Tensor") -> "Tensor":
    """Whether p_base >= alpha max p_base, [B, V] (arXiv 2210.15097; VCD, arXiv 2311.16922).

    A form may lift a token that the base finds absurd, because the reward model finds it still more
    so to say anything else; only plausible tokens are to be said.

    Args:
        base: logits or log-probabilities[B, V]: a constant per row makes no difference.
        alpha: [B], 0 to 1; 0 takes every token for plausible, 1 only the likeliest.

    Returns:
        A mask. NaN is taken for plausible, so that it is not hidden.
    """
    base = base.float()
    return ~(base < base.amax(-1, keepdim=True) + alpha.log().unsqueeze(-1))


def _sum(base: "Tensor", steering: "Tensor", weight: "Tensor") -> "Tensor":
    import torch

    base, w = base.float(), weight.unsqueeze(-1)
    # inf - inf is NaN: what the base rules out stays out.
    mixed = torch.where(torch.isneginf(base), base, base + w * steering.float())
    return torch.where(w == 0, base, mixed)


FORMS: dict[str, Form] = {"tita": tita, "genarm": genarm, "dpo": dpo}
"""By name. The second argument is log p_reward, for `dpo` its `log_ratio` to the reference."""

WITH_REFERENCE = frozenset({"dpo"})
"""Forms that need the reference model: the reward model before it was trained."""


def check_form(form: str) -> str:
    """The form, if there is one of that name.

    Raises:
        TitaError: there is none.
    """
    if form not in FORMS:
        *others, last = FORMS
        known = ", ".join(others)
        raise TitaError(f"no guidance form {form!r}", remedy=f"choose {known} or {last}")
    return form


def check_reference(form: str, *, there: bool) -> None:
    """Look whether the reference model is there, if the form compares with it.

    Raises:
        TitaError: it is not.
    """
    if form in WITH_REFERENCE and not there:
        raise TitaError(
            f"form {form} without a reference model",
            remedy="give the reward model as it was before DPO, or choose another form",
        )
