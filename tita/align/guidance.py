"""The mathematics of guidance, as pure functions; docs/guidance.md explains the forms.

Legend: B rows of a batch, V tokens of the vocabulary. Inputs may be of any float type; sums are
float32. Log-probabilities of -inf mark tokens that a model rules out; NaN stays NaN.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_ROUNDING = 1e-6
"""Weights that add up to 1 leave the base a coefficient of at most this."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """A `tita.align.forms.Term` with numbers: c (log p_source - log p_against) for every row."""

    source: Tensor
    """Log-probabilities[B, V]; for `mix`, logits in float32."""
    coefficients: Sequence[float]
    """c of the B rows."""
    against: Tensor | Literal["base"] | None = None
    """As `source`; None: c log p_source."""


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities[B, V] in float32 of logits[B, V]."""
    return torch.log_softmax(logits.float(), dim=-1)


def combine(base: Tensor, contrasts: Sequence[Contrast]) -> Tensor:
    """log p_base + sum of c (log p_source - log p_against), unnormalised.

    A token is out (-inf) if the base rules it out, or a source that is added (c > 0); only where
    the coefficients of the base add up to 0, the base does not count. Where a source that is
    subtracted rules a token out, there is no ratio, and the base decides alone.

    Args:
        base: log-probabilities[B, V].
        contrasts: log-probabilities; one with c = 0 takes no part.

    Returns:
        scores[B, V].
    """
    base = base.float()
    finite = torch.where(torch.isneginf(base), 0, base)
    scores, own = finite, torch.ones_like(base[:, :1])
    out = undefined = torch.zeros_like(base, dtype=torch.bool)
    for number, each in enumerate(contrasts):
        c = torch.tensor(each.coefficients, device=base.device, dtype=torch.float32).unsqueeze(-1)
        source, lost = each.source.float(), torch.isneginf(each.source)
        out, undefined = out | (lost & (c > 0)), undefined | (lost & (c < 0))
        if each.against == "base":
            own = own - c
            source = torch.where(lost | (c == 0), finite, source)
            first = number == 0
            scores = torch.lerp(finite, source, c) if first else scores + c * (source - finite)
            continue
        if isinstance(each.against, Tensor):
            missing = torch.isneginf(each.against)
            out, undefined = out | (missing & (c < 0)), undefined | (missing & (c > 0))
            source = torch.where(missing, 0, source - each.against.float())
        scores = scores + c * torch.where(lost | (c == 0), 0, source)
    out = out | (torch.isneginf(base) & (own.abs() > _ROUNDING))
    scores = torch.where(undefined, base, scores)
    return torch.where(out, -torch.inf, scores)


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


def mix(base: Tensor, contrasts: Sequence[Contrast]) -> None:
    """Overwrite the first source's logits with the combined scores, unnormalised.

    The sum is one of log-probabilities. Logits differ from those by a constant per row, which
    changes neither the best token nor the softmax, so they are combined as they are, in place: no
    vocabulary-sized tensor is allocated beside the models' own.

    Args:
        base: logits[B, V], float32.
        contrasts: at least one; the logits of all sources are overwritten, and none of them stands
            `against` another.
    """
    scores = contrasts[0].source
    sides = [base, *(side for each in contrasts for side in (each.source, each.against))]
    # Row by row: the minimum of a row with NaN is NaN, and must not hide another row's -inf.
    least = torch.stack([side.amin(-1) for side in sides if isinstance(side, Tensor)])
    if bool(torch.isneginf(least).any()):
        # Rare: tokens that a model rules out need the exact definition.
        scores.copy_(combine(log_softmax(base), [_normalised(each) for each in contrasts]))
        return
    for number, each in enumerate(contrasts):
        c = torch.tensor(each.coefficients, device=base.device, dtype=torch.float32).unsqueeze(-1)
        source = each.source
        if each.against == "base" and number == 0:
            torch.lerp(base, source, c, out=scores)
            continue
        if each.against is not None:
            source.sub_(base if each.against == "base" else each.against)
        if number == 0:
            scores.mul_(c).add_(base)
        else:
            scores.addcmul_(source, c)


def rule_out_implausible(base: Tensor, scores: Tensor, alphas: Sequence[float]) -> None:
    """Set scores[B, V] of tokens that are not `plausible` under base logits[B, V] to -inf."""
    alpha = torch.tensor(alphas, device=base.device, dtype=torch.float32)
    scores.masked_fill_(~plausible(base, alpha), -torch.inf)


def _normalised(contrast: Contrast) -> Contrast:
    """The contrast of log-probabilities for one of logits."""
    against = contrast.against
    return dataclasses.replace(
        contrast,
        source=log_softmax(contrast.source),
        against=log_softmax(against) if isinstance(against, Tensor) else against,
    )
