"""Choosing the next token of every row from what both models think.

Legend: B rows, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tita.align.guidance import FORMS, log_softmax
from tita.serve.job import Alternative, Prepared
from tita.serve.wording import Wording

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Row:
    """An answer being written."""

    prepared: Prepared
    wording: Wording
    generator: "torch.Generator"
    token_ids: list[int] = field(default_factory=list)
    last: int = -1
    """The newest token, which the models have not seen yet."""
    base_s: float = 0.0
    reward_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One row's next token; log-probabilities are there when they were asked for."""

    token: int
    changed: bool
    logprob: float | None = None
    base: float | None = None
    reward: float | None = None
    alternatives: tuple[Alternative, ...] = ()


def choose(
    rows: Sequence[Row],
    base_logits: "Tensor",
    reward_logits: "Tensor | None",
    *,
    guided: Sequence[int],
    tokenizer: Any,
) -> list[Chosen | None]:
    """The next token of every row; None where a model gave no numbers.

    Args:
        rows: B rows.
        base_logits: [B, V].
        reward_logits: [G, V], of the rows that `guided` names.
        guided: indices of G rows.
    """
    import torch

    base = log_softmax(base_logits)
    combined = base
    reward = None
    if reward_logits is not None:
        reward = log_softmax(reward_logits[:, : base.shape[1]].to(base.device))
        combined = _combined(rows, base, reward, guided)
    best, alone = combined.argmax(-1).tolist(), base.argmax(-1).tolist()
    broken = torch.isnan(combined).any(-1).tolist()
    place = {index: number for number, index in enumerate(guided)}
    chosen: list[Chosen | None] = []
    for index, row in enumerate(rows):
        if broken[index]:
            chosen.append(None)
            continue
        token = _pick(row, combined[index], best[index])
        details: dict[str, Any] = {}
        job = row.prepared.job
        if job.explain or job.num_logprobs >= 0:
            theirs = reward[place[index]] if reward is not None and index in place else None
            details = _details(row, token, base[index], theirs, combined[index], tokenizer)
        chosen.append(Chosen(token=token, changed=token != alone[index], **details))
    return chosen


def _combined(
    rows: Sequence[Row], base: "Tensor", reward: "Tensor", guided: Sequence[int]
) -> "Tensor":
    import torch

    forms = {rows[index].prepared.job.form for index in guided}
    combined = base.clone()
    for form in forms:
        places = [n for n, index in enumerate(guided) if rows[index].prepared.job.form == form]
        indices = [guided[n] for n in places]
        weights = torch.tensor(
            [rows[index].prepared.job.weight for index in indices], device=base.device
        )
        combined[indices] = FORMS[form](base[indices], reward[places], weights)
    return combined


def _pick(row: Row, scores: "Tensor", best: int) -> int:
    import torch

    sampling = row.prepared.job.sampling
    if sampling.repetition_penalty != 1.0 and row.token_ids:
        said = torch.tensor(sorted(set(row.token_ids)), device=scores.device)
        scores = torch.log_softmax(scores, -1)
        # Log-probabilities are below zero: multiplied by more than 1 they shrink.
        scores[said] = scores[said] * sampling.repetition_penalty
        best = int(scores.argmax())
    if not sampling.temperature:
        return best
    chances = (scores / sampling.temperature).softmax(-1)
    if torch.isnan(chances).any():
        return best  # a temperature so low that its quotients overflow is greedy
    if sampling.top_k:
        floor = chances.topk(min(sampling.top_k, len(chances))).values[-1]
        chances = torch.where(chances < floor, 0, chances)
    if sampling.top_p < 1:
        ordered, indices = chances.sort(descending=True)
        # Tokens before which less than top_p has come: the first is always among them.
        out = ordered.cumsum(-1) - ordered >= sampling.top_p * ordered.sum()
        out[0] = False
        chances = chances.scatter(0, indices[out], 0.0)
    return int(chances.cpu().multinomial(1, generator=row.generator))


def _details(
    row: Row,
    token: int,
    base: "Tensor",
    reward: "Tensor | None",
    combined: "Tensor",
    tokenizer: Any,
) -> dict[str, Any]:
    import torch

    normal = torch.log_softmax(combined, -1)
    wanted = max(row.prepared.job.num_logprobs, 0)
    values, indices = normal.topk(min(wanted, len(normal)))
    return {
        "logprob": float(normal[token]),
        "base": float(base[token]),
        "reward": None if reward is None else float(reward[token]),
        "alternatives": tuple(
            Alternative(text=tokenizer.decode([index]), logprob=value)
            for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        ),
    }
