"""The mathematics of guidance, as pure functions; docs/guidance.md explains the forms.

Legend: B rows of a batch, V tokens of the vocabulary. Inputs may be of any float type; sums are
float32. Log-probabilities of -inf mark tokens that a model rules out; NaN stays NaN.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tita.align.host_device import upload

_ROUNDING = 1e-6
"""Weights that add up to 1 leave the base a coefficient of at most this."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """A `tita.align.forms.Term` with numbers: c (log p_source - log p_against) for every row."""

    source: Tensor
    """Log-probabilities[B, V]; for `mix` and `mix_exactly`, logits in float32."""
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
        c = _column(each.coefficients, base)
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


def mix(base: Tensor, contrasts: Sequence[Contrast], *, out: Tensor) -> None:
    """The combined scores of logits, unnormalised, if the models rule no token out.

    The sum is one of log-probabilities. Logits differ from those by a constant per row, which
    changes neither the best token nor the softmax, so they are combined as they are.

    With infinite logits a row is right if its maximum is finite: wherever a sum of infinities is
    not `-inf` as in `combine`, it is NaN or `+inf`. Other rows need `mix_exactly`.

    Args:
        base: logits[B, V], float32.
        contrasts: at least one, of logits.
        out: the scores[B, V]; may be the logits of the first source.
    """
    for number, each in enumerate(contrasts):
        c = _column(each.coefficients, base)
        source = each.source
        if each.against == "base" and number == 0:
            torch.lerp(base, source, c, out=out)
            continue
        if each.against is not None:
            against = base if each.against == "base" else each.against
            source = torch.sub(source, against, out=out if number == 0 else None)
        if number == 0:
            torch.mul(source, c, out=out).add_(base)
        else:
            out.addcmul_(source, c)


def mixes_by_row(contrasts: Sequence[Contrast]) -> bool:
    """Whether `mix_rows` combines these: a single one, against the base."""
    return len(contrasts) == 1 and contrasts[0].against == "base"


def mix_rows(base: Tensor, contrast: Contrast, *, out: Tensor) -> Iterator[Any]:
    """As `mix` with one contrast against the base, on a CPU: one row after the other.

    Args:
        base: logits[B, V], float32.
        contrast: of logits.
        out: a buffer[V].

    Yields:
        The buffer with the scores of each row, as an array[V].
    """
    scores = out.numpy()
    columns = _column(contrast.coefficients, base)
    for row in zip(base.unbind(), contrast.source.unbind(), columns.unbind(), strict=True):
        torch.lerp(*row, out=out)
        yield scores


def mix_exactly(base: Tensor, contrasts: Sequence[Contrast], *, out: Tensor) -> None:
    """As `mix`, for all logits; slower."""
    out.copy_(combine(log_softmax(base), [_normalised(each) for each in contrasts]))


def rule_out_implausible(base: Tensor, scores: Tensor, alphas: Sequence[float]) -> None:
    """Set scores[B, V] of tokens that are not `plausible` under base logits[B, V] to -inf."""
    alpha = _column(alphas, base).squeeze(-1)
    scores.masked_fill_(~plausible(base, alpha), -torch.inf)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(values, torch.float32, like.device).unsqueeze(-1)


def _normalised(contrast: Contrast) -> Contrast:
    """The contrast of log-probabilities for one of logits."""
    against = contrast.against
    return dataclasses.replace(
        contrast,
        source=log_softmax(contrast.source),
        against=log_softmax(against) if isinstance(against, Tensor) else against,
    )
