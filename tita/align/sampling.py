"""The next token of every sequence: combine the models' logits, then sample with seeded noise.

Choosing argmax(log p + g) with g from the standard Gumbel distribution draws from p (the Gumbel-max
trick, arXiv 1611.01144). With g a function of (seed, position) alone, the draw does not depend on
the batch, on the device, or on how many tokens were drafted.

Legend: B sequences, V tokens of the vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tita.align.guidance import log_softmax, mix, rule_out_implausible
from tita.align.requests import Outcome
from tita.align.sequence import SampledToken, Sequence
from tita.errors import TitaError


class NoNumbers(TitaError):
    """A model's logits are NaN or infinite."""


@dataclass(frozen=True, slots=True)
class RoleLogits:
    """One model's logits[R, V], and the sequences that its R rows belong to."""

    logits: Tensor
    rows: list[int]
    """Index of each row's sequence."""


def sample(sequences: list[Sequence], outputs: Mapping[str, RoleLogits]) -> list[Outcome]:
    """Choose the next token of every sequence and append it; arguments as of `choose`."""
    return [
        NoNumbers(
            "the model's logits are not numbers (NaN)", remedy="check its weights and the image"
        )
        if choice is None
        else sequence.append(choice)
        for sequence, choice in zip(sequences, choose(sequences, outputs), strict=True)
    ]


def choose(
    sequences: list[Sequence], outputs: Mapping[str, RoleLogits]
) -> list[SampledToken | None]:
    """The next token of every sequence; None where a model's logits are no numbers.

    Args:
        sequences: B sequences.
        outputs: by the model's role; overwritten. `base` has a row for every sequence, `reward` for
            those that are guided, `reference` for some of these.
    """
    base = outputs["base"].logits.float()
    row_of: dict[int, int] = {}
    reward_log_probs: dict[int, Tensor] = {}
    scores = {index: base[index] for index in range(len(sequences))}
    if "reward" in outputs:
        guided = outputs["reward"].rows
        row_of = {index: row for row, index in enumerate(guided)}
        reward = _to_base(sequences, base, outputs["reward"])
        scores |= {index: reward[row] for index, row in row_of.items()}
        reference = outputs.get("reference")
        if reference is not None:
            reference = RoleLogits(_to_base(sequences, base, reference), reference.rows)
        reward_log_probs = {
            index: log_softmax(reward[row])
            for index, row in row_of.items()
            if sequences[index].prepared.request.detailed
        }
    for index, sequence in enumerate(sequences):
        # What both models rule out is out in every form of guidance.
        if too_early := sequence.too_early():
            base[index, too_early] = scores[index][too_early] = -math.inf
    best = alone = _best(base)
    if "reward" in outputs:
        _guide(sequences, base, reward, guided, reference)
        combined = _best(reward)
        best = [combined[row_of[n]] if n in row_of else alone[n] for n in range(len(sequences))]
    choices: list[SampledToken | None] = []
    for index, sequence in enumerate(sequences):
        token = best[index]
        if token is None:
            choices.append(None)
            continue
        log_probs: tuple[Tensor, Tensor, Tensor | None] | None = None
        if sequence.prepared.request.detailed:
            # Sampling overwrites the scores.
            reward_row = reward_log_probs.get(index)
            log_probs = log_softmax(scores[index]), log_softmax(base[index]), reward_row
        unguided = alone[index]
        if sequence.sampling.temperature or sequence.sampling.repetition_penalty != 1.0:
            token = _draw(sequence, scores[index])
            if index not in row_of:
                unguided = token
            elif unguided is not None:
                unguided = _draw(sequence, base[index])
        choices.append(
            SampledToken(
                token=token, changed=token != unguided, **_details(sequence, token, log_probs)
            )
        )
    return choices


def choose_draft(sequence: Sequence, reward: Tensor, *, drafts: list[int]) -> int:
    """The token that the reward model alone would choose, with the sequence's noise.

    Args:
        sequence: the answer so far.
        reward: logits[V]; not modified.
        drafts: tokens between the sequence's last token and this one.
    """
    sampling = sequence.sampling
    if too_early := sequence.too_early(len(drafts)):
        reward = reward.clone()
        reward[too_early] = -math.inf
    if not sampling.temperature and sampling.repetition_penalty == 1.0:
        return int(reward.argmax())
    return _draw(sequence, reward.float().clone(), drafts=drafts)


def gumbel(num_tokens: int, *, seed: int, position: int) -> Tensor:
    """Standard Gumbel noise[V] of a seed for the token at a position of its answer, on the CPU."""
    # Philox is counter-based (Salmon et al. 2011): the streams of two counters are independent.
    source = np.random.Philox(key=seed % 2**128, counter=[0, 0, 0, position])
    waits = np.random.Generator(source).standard_exponential(num_tokens, dtype=np.float32)
    # Minus the logarithm of an exponential variable is a Gumbel one. Zero would be infinite.
    return torch.from_numpy(np.maximum(waits, np.finfo(np.float32).tiny)).log_().neg_()


def _best(scores: Tensor) -> list[int | None]:
    """The most likely token of each row; None where there are no numbers."""
    # NaN is the maximum of a row that has one; an infinite maximum is no number either.
    values, tokens = scores.max(-1)
    found: list[int] = torch.where(values.isfinite(), tokens, -1).tolist()
    return [None if token < 0 else token for token in found]


def _to_base(sequences: list[Sequence], base: Tensor, output: RoleLogits) -> Tensor:
    """Another model's logits in float32, on the base's device and over its whole vocabulary."""
    logits = output.logits.to(base.device).float()
    vocabulary = sequences[0].vocabulary
    if vocabulary is not None:
        for row, index in enumerate(output.rows):
            vocabulary.complete(base[index : index + 1], logits[row : row + 1])
    return logits


def _guide(
    sequences: list[Sequence],
    base: Tensor,
    reward: Tensor,
    guided: list[int],
    reference: RoleLogits | None,
) -> None:
    """Overwrite reward[R, V] with the combined scores of the guided sequences."""
    everyone = list(range(len(sequences)))
    forms = {sequences[index].guidance.form for index in guided}
    compared = [] if reference is None else reference.rows
    if guided == everyone and len(forms) == 1 and compared in ([], everyone):
        weights = [sequence.guidance.weight for sequence in sequences]
        logits = None if reference is None else reference.logits
        mix(base, reward, weights, form=forms.pop(), reference=logits)
    else:
        for row, index in enumerate(guided):
            guidance, logits = sequences[index].guidance, None
            if reference is not None and index in compared:
                place = compared.index(index)
                logits = reference.logits[place : place + 1]
            mix(
                base[index : index + 1],
                reward[row : row + 1],
                [guidance.weight],
                form=guidance.form,
                reference=logits,
            )
    for row, index in enumerate(guided):
        if alpha := sequences[index].guidance.plausibility:
            rule_out_implausible(base[index : index + 1], reward[row : row + 1], [alpha])


def _draw(sequence: Sequence, scores: Tensor, *, drafts: list[int] | None = None) -> int:
    """The sequence's next token by its sampling, from scores[V], which are overwritten."""
    sampling, drafts = sequence.sampling, drafts or []
    if sampling.repetition_penalty != 1.0:
        _penalise(sequence, scores, drafts=drafts)
    if not sampling.temperature:
        return int(scores.argmax())
    # Relative to the maximum, so that no quotient overflows however low the temperature.
    scores.sub_(scores.max()).div_(sampling.temperature)
    if 0 < sampling.top_k < len(scores):
        floor = scores.topk(sampling.top_k).values[-1]
        scores.masked_fill_(scores < floor, -math.inf)
    probabilities = scores.softmax(-1) if sampling.top_p < 1 else None
    position = len(sequence.token_ids) + len(drafts)
    scores += gumbel(len(scores), seed=sampling.seed, position=position).to(scores.device)
    return _best_in_nucleus(scores, probabilities, sampling.top_p)


def _penalise(sequence: Sequence, scores: Tensor, *, drafts: list[int]) -> None:
    """Make the tokens of prompt and answer less likely, in place."""
    prompt = sequence.prepared.inputs["base"]["input_ids"][0].to(scores.device)
    seen = torch.cat([prompt, prompt.new_tensor([*sequence.token_ids, *drafts])])
    old, penalty = scores[seen], sequence.sampling.repetition_penalty
    scores[seen] = torch.where(old < 0, old * penalty, old / penalty)


def _best_in_nucleus(noisy: Tensor, probabilities: Tensor | None, top_p: float) -> int:
    """The best of noisy[V] among tokens whose more likely tokens have less than `top_p` together.

    Sorting a vocabulary takes longer than a small model's step. If the best of all is not in the
    nucleus, no less likely token is either, and a pass or two finds the best of the rest.
    """
    while True:
        token = int(noisy.argmax())
        if probabilities is None:
            return token
        likelier = probabilities > probabilities[token]
        if float(probabilities[likelier].sum()) < top_p:
            return token
        noisy.masked_fill_(~likelier, -math.inf)


def _details(
    sequence: Sequence, token: int, log_probs: tuple[Tensor, Tensor, Tensor | None] | None
) -> dict[str, Any]:
    """Log-probabilities to report, from combined, base and reward log-probabilities[V]."""
    if log_probs is None:
        return {}
    combined, base, reward = log_probs
    number = max(sequence.prepared.request.num_logprobs, 0)
    values, indices = combined.topk(min(number, len(combined)))
    return {
        "logprob": float(combined[token]),
        "base": float(base[token]),
        "reward": None if reward is None else float(reward[token]),
        "alternatives": tuple(zip(indices.tolist(), values.tolist(), strict=True)),
    }
