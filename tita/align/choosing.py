"""Choosing the next token of every row from what both models think.

Legend: B rows, G of them guided, V tokens of the vocabulary.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tita.align.answers import Alternative, Outcome
from tita.align.guidance import log_softmax
from tita.align.mixing import mix, rule_out_implausible
from tita.align.noise import gumbel
from tita.align.rows import Chosen, Row
from tita.errors import TitaError

if TYPE_CHECKING:
    from torch import Tensor


class NoNumbers(TitaError):
    """A model's logits were not numbers."""


def choose(
    rows: Sequence[Row],
    base: "Tensor",
    reward: "Tensor | None",
    *,
    guided: Sequence[int],
    reference: "Tensor | None" = None,
    referring: Sequence[int] = (),
) -> list[Chosen | None]:
    """The next token of every row; None where a model gave no numbers.

    Args:
        rows: B rows.
        base: logits[B, V]; may be overwritten.
        reward: logits[G, V], of the rows that `guided` names; may be overwritten.
        guided: indices of G rows.
        reference: logits[H, V], of the rows that `referring` names; may be overwritten.
        referring: indices of H rows, all of them guided.
    """
    base = base.float()
    place = {index: number for number, index in enumerate(guided)}
    theirs: dict[int, Tensor] = {}
    scores = {index: base[index] for index in range(len(rows))}
    best = alone = _best(base)
    if reward is not None:
        reward = _alike(rows, base, reward, guided)
        if reference is not None:
            reference = _alike(rows, base, reference, referring)
        theirs = {
            index: log_softmax(reward[number])
            for index, number in place.items()
            if rows[index].prepared.request.detailed
        }
        _mix_rows(rows, base, reward, guided, reference, referring)
        scores |= {index: reward[number] for index, number in place.items()}
        together = _best(reward)
        best = [together[place[n]] if n in place else alone[n] for n in range(len(rows))]
    chosen: list[Chosen | None] = []
    for index, row in enumerate(rows):
        token = best[index]
        if token is None:
            chosen.append(None)
            continue
        details = _Details(row, base[index], theirs.get(index), scores[index])
        unguided = alone[index]
        if row.sampling.temperature or row.sampling.repetition_penalty != 1.0:
            token = _draw(row, scores[index])
            if index not in place:
                unguided = token
            elif unguided is not None:
                unguided = _draw(row, base[index])
        chosen.append(Chosen(token=token, changed=token != unguided, **details.of(token)))
    return chosen


def say(
    rows: Sequence[Row],
    base: "Tensor",
    reward: "Tensor | None",
    *,
    guided: Sequence[int],
    reference: "Tensor | None" = None,
    referring: Sequence[int] = (),
) -> list[Outcome]:
    """Choose every row's next token and write it down; arguments as of `choose`."""
    choices = choose(rows, base, reward, guided=guided, reference=reference, referring=referring)
    return [
        NoNumbers("the model gave no numbers (NaN)", remedy="check its weights and the image")
        if chosen is None
        else row.say(chosen)
        for row, chosen in zip(rows, choices, strict=True)
    ]


def draft(row: Row, reward: "Tensor", *, ahead: Sequence[int]) -> int:
    """The token that the reward model alone would choose, with the row's noise.

    Args:
        row: what is being written.
        reward: logits[V]; left as they are.
        ahead: drafted tokens that stand between the row's last and this.
    """
    sampling = row.sampling
    if not sampling.temperature and sampling.repetition_penalty == 1.0:
        return int(reward.argmax())
    return _draw(row, reward.float().clone(), ahead=ahead)


def _best(scores: "Tensor") -> list[int | None]:
    """The likeliest token of each row; None where there are no numbers."""
    import torch

    # NaN counts as the largest there is, and infinity cannot be told from others of its kind.
    values, tokens = scores.max(-1)
    found: list[int] = torch.where(values.isfinite(), tokens, -1).tolist()
    return [None if token < 0 else token for token in found]


def _alike(
    rows: Sequence[Row], base: "Tensor", logits: "Tensor", places: Sequence[int]
) -> "Tensor":
    """Another model's logits where and as the base's are, over the base's whole vocabulary."""
    logits = logits.to(base.device).float()
    vocabulary = rows[0].vocabulary
    if vocabulary is not None:
        for number, index in enumerate(places):
            vocabulary.complete(base[index : index + 1], logits[number : number + 1])
    return logits


def _mix_rows(
    rows: Sequence[Row],
    base: "Tensor",
    reward: "Tensor",
    guided: Sequence[int],
    reference: "Tensor | None",
    referring: Sequence[int],
) -> None:
    forms = {rows[index].form for index in guided}
    everyone = list(range(len(rows)))
    if list(guided) == everyone and len(forms) == 1 and list(referring) in ([], everyone):
        weights = [row.weight for row in rows]
        mix(base, reward, weights, form=forms.pop(), reference=reference)
    else:
        for number, index in enumerate(guided):
            row, theirs = rows[index], None
            if reference is not None and index in referring:
                place = list(referring).index(index)
                theirs = reference[place : place + 1]
            ours, at = base[index : index + 1], slice(number, number + 1)
            mix(ours, reward[at], [row.weight], form=row.form, reference=theirs)
    for number, index in enumerate(guided):
        if alpha := rows[index].alpha:
            at = slice(number, number + 1)
            rule_out_implausible(base[index : index + 1], reward[at], [alpha])


def _draw(row: Row, scores: "Tensor", *, ahead: Sequence[int] = ()) -> int:
    """The row's next token by its sampling, from scores[V], which are overwritten."""
    sampling = row.sampling
    if sampling.repetition_penalty != 1.0:
        _penalise(row, scores, ahead=ahead)
    if not sampling.temperature:
        return int(scores.argmax())
    # From the largest, so that no quotient overflows upwards however low the temperature.
    scores.sub_(scores.max()).div_(sampling.temperature)
    if 0 < sampling.top_k < len(scores):
        floor = scores.topk(sampling.top_k).values[-1]
        scores.masked_fill_(scores < floor, -math.inf)
    chances = scores.softmax(-1) if sampling.top_p < 1 else None
    position = len(row.token_ids) + len(ahead)
    scores += gumbel(len(scores), seed=sampling.seed, position=position).to(scores.device)
    return _first_likely(scores, chances, sampling.top_p)


def _penalise(row: Row, scores: "Tensor", *, ahead: Sequence[int]) -> None:
    """Make what stands in the prompt and the answer less likely, in place."""
    import torch

    prompt = row.prepared.base["input_ids"][0].to(scores.device)
    said = torch.cat([prompt, prompt.new_tensor([*row.token_ids, *ahead])])
    old, penalty = scores[said], row.sampling.repetition_penalty
    scores[said] = torch.where(old < 0, old * penalty, old / penalty)


def _first_likely(noisy: "Tensor", chances: "Tensor | None", top_p: float) -> int:
    """The best of noisy[V] among tokens that less than `top_p` of chances[V] are likelier than.

    Sorting a vocabulary takes longer than a small model's step. Where the best of all is not among
    those tokens, none that is less likely is either, and a pass or two finds the best of the rest.
    """
    while True:
        token = int(noisy.argmax())
        if chances is None:
            return token
        likelier = chances > chances[token]
        if float(chances[likelier].sum()) < top_p:
            return token
        noisy.masked_fill_(~likelier, -math.inf)


class _Details:
    """What is to be told of a row's token, taken down before the scores are overwritten."""

    def __init__(self, row: Row, base: "Tensor", reward: "Tensor | None", scores: "Tensor") -> None:
        self._tokenizer = row.tokenizer
        self._num_logprobs = row.prepared.request.num_logprobs
        self._sides: tuple[Tensor, Tensor, Tensor | None] | None = None
        if row.prepared.request.detailed:
            self._sides = log_softmax(scores), log_softmax(base), reward

    def of(self, token: int) -> dict[str, Any]:
        if self._sides is None:
            return {}
        combined, base, reward = self._sides
        values, indices = combined.topk(min(max(self._num_logprobs, 0), len(combined)))
        return {
            "logprob": float(combined[token]),
            "base": float(base[token]),
            "reward": None if reward is None else float(reward[token]),
            "alternatives": tuple(
                Alternative(text=self._tokenizer.decode([index]), logprob=value)
                for value, index in zip(values.tolist(), indices.tolist(), strict=True)
            ),
        }
