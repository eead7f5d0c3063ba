"""The next token of every sequence: combine the models' logits, then sample with seeded noise.

Choosing argmax(log p + g) with g from the standard Gumbel distribution draws from p (the Gumbel-max
trick, arXiv 1611.01144). With g a function of (seed, position) alone, the draw does not depend on
the batch, on the device, or on how many tokens were drafted.

Legend: B sequences, V tokens of the vocabulary.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tita.align.forms import BASE
from tita.align.guidance import Contrast, log_softmax, mix, rule_out_implausible
from tita.align.requests import Outcome
from tita.align.sequence import SampledToken, Sequence
from tita.align.vocabulary import Vocabulary
from tita.errors import TitaError


class NoNumbers(TitaError):
    """A model's logits are NaN or infinite."""


@dataclass(frozen=True, slots=True)
class SourceLogits:
    """One source's logits[R, V], and the sequences that its R rows belong to."""

    logits: Tensor
    rows: list[int]
    """Index of each row's sequence."""
    vocabulary: Vocabulary | None = None
    """Maps the model's tokens to the base model's, if their ids differ."""


@dataclass(frozen=True, slots=True)
class _Details:
    """Log-probabilities[V] to report a token's from."""

    combined: Tensor
    sources: dict[str, Tensor]
    """By name of the source."""

    def of(self, sequence: Sequence, token: int) -> dict[str, Any]:
        """What is reported with a token, by field of `SampledToken`."""
        number = max(sequence.prepared.request.num_logprobs, 0)
        values, indices = self.combined.topk(min(number, len(self.combined)))
        terms = {name: float(each[token]) for name, each in self.sources.items()}
        rewards = [name for name in terms if "/" not in name and name not in ("base", "reference")]
        request = sequence.prepared.request
        score = None
        if request.score:
            against = terms.get("reference", terms["base"])
            score = sum(terms[name] - against for name in rewards) / len(rewards)
        if not request.detailed:
            return {"score": score}
        return {
            "score": score,
            "logprob": float(self.combined[token]),
            "base": terms["base"],
            "reward": terms[rewards[0]] if len(rewards) == 1 else None,
            "terms": tuple(terms.items()),
            "alternatives": tuple(zip(indices.tolist(), values.tolist(), strict=True)),
        }


def sample(sequences: list[Sequence], outputs: Mapping[str, SourceLogits]) -> list[Outcome]:
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
    sequences: list[Sequence], outputs: Mapping[str, SourceLogits]
) -> list[SampledToken | None]:
    """The next token of every sequence; None where a model's logits are no numbers.

    Args:
        sequences: B sequences.
        outputs: by the source's name; overwritten. `base` has a row for every sequence, in order,
            the others for those whose terms or explanation have them.
    """
    base = outputs["base"].logits.float()
    outputs = {
        name: SourceLogits(base if name == "base" else _to_base(base, output), output.rows)
        for name, output in outputs.items()
    }
    logits: list[dict[str, Tensor]] = [{} for _ in sequences]
    for name, output in outputs.items():
        for row, index in enumerate(output.rows):
            logits[index][name] = output.logits[row]
    explained = {
        index: {name: log_softmax(row) for name, row in logits[index].items() if name != "base"}
        for index, sequence in enumerate(sequences)
        if sequence.prepared.request.detailed or sequence.prepared.request.score
    }
    guided = [index for index, sequence in enumerate(sequences) if sequence.terms]
    # The combined scores take the place of the first term's logits.
    scores = [
        logits[index][sequence.terms[0].source.name if sequence.terms else "base"]
        for index, sequence in enumerate(sequences)
    ]
    for index, sequence in enumerate(sequences):
        # What base and first source rule out is out in every form of guidance.
        if too_early := sequence.too_early():
            base[index, too_early] = scores[index][too_early] = -math.inf
    best = alone = _best(base)
    if guided:
        best = [*alone]
        for index, token in zip(guided, _guide(sequences, outputs, logits, guided), strict=True):
            best[index] = token
    choices: list[SampledToken | None] = []
    for index, sequence in enumerate(sequences):
        token, details = best[index], None
        if token is not None and index in explained:
            # Sampling overwrites the scores.
            sources = {"base": log_softmax(base[index])} | explained[index]
            details = _Details(log_softmax(scores[index]), sources)
        choices.append(
            None
            if token is None
            else _choice(sequence, token, alone[index], scores[index], base[index], details)
        )
    return choices


def _choice(
    sequence: Sequence,
    token: int,
    unguided: int | None,
    scores: Tensor,
    base: Tensor,
    details: _Details | None,
) -> SampledToken:
    """The next token from the best one, that of the base, and the scores[V] of both."""
    if sequence.sampling.temperature or sequence.sampling.repetition_penalty != 1.0:
        token = _draw(sequence, scores)
        if not sequence.terms:
            unguided = token
        elif unguided is not None:
            unguided = _draw(sequence, base)
    reported = {} if details is None else details.of(sequence, token)
    return SampledToken(token=token, changed=token != unguided, **reported)


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
    return _best_of([scores.max(-1)])


def _best_of(maxima: Items[Any]) -> list[int | None]:
    """The best tokens of rows by their maxima and the places of these."""
    # NaN is the maximum of a row that has one; an infinite maximum is no number either.
    values = torch.cat([each.values.reshape(-1) for each in maxima])
    tokens = torch.cat([each.indices.reshape(-1) for each in maxima])
    found: list[int] = torch.where(values.isfinite(), tokens, -1).tolist()
    return [None if token < 0 else token for token in found]


def _to_base(base: Tensor, output: SourceLogits) -> Tensor:
    """Another source's logits in float32, on the base's device and over its whole vocabulary."""
    logits = output.logits.to(base.device).float()
    if output.vocabulary is not None:
        for row, index in enumerate(output.rows):
            output.vocabulary.complete(base[index : index + 1], logits[row : row + 1])
    return logits


def _guide(
    sequences: list[Sequence],
    outputs: Mapping[str, SourceLogits],
    logits: list[dict[str, Tensor]],
    guided: list[int],
) -> list[int | None]:
    """Overwrite the logits of the guided sequences' first sources with the combined scores.

    Returns:
        The best token of each; None where there are no numbers.
    """
    everyone = list(range(len(sequences)))
    base, first = outputs["base"].logits, sequences[guided[0]].terms
    names = {each.source.name for each in first} | {
        each.against.name for each in first if each.against is not None
    }
    kinds = {tuple((each.source.name, each.against) for each in s.terms) for s in sequences}
    together = len(kinds) == 1 and all(outputs[name].rows == everyone for name in names)
    if together:
        whole = {name: outputs[name].logits for name in names}
        mix(base, _contrasts(sequences, whole))
    else:
        for index in guided:
            rows = {name: row.unsqueeze(0) for name, row in logits[index].items()}
            mix(rows["base"], _contrasts([sequences[index]], rows))
    scores = [logits[index][sequences[index].terms[0].source.name] for index in guided]
    alphas = [sequences[index].prepared.request.guidance.plausibility for index in guided]
    if together:
        combined = outputs[first[0].source.name].logits
        if any(alphas):
            rule_out_implausible(base, combined, alphas)
        return _best(combined)
    for index, row, alpha in zip(guided, scores, alphas, strict=True):
        if alpha:
            rule_out_implausible(base[index : index + 1], row.unsqueeze(0), [alpha])
    return _best_of([row.max(-1) for row in scores])


def _contrasts(sequences: Items[Sequence], logits: Mapping[str, Tensor]) -> list[Contrast]:
    """The terms of sequences whose sources are the same, with logits[B, V] of each source."""
    found = []
    for terms in zip(*(sequence.terms for sequence in sequences), strict=True):
        against = terms[0].against
        found.append(
            Contrast(
                logits[terms[0].source.name],
                [
                    term.at(len(sequence.token_ids) + 1)
                    for term, sequence in zip(terms, sequences, strict=True)
                ],
                None if against is None else "base" if against == BASE else logits[against.name],
            )
        )
    return found


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
