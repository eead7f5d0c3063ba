"""The next token of every sequence: combine the models' logits, then draw with seeded noise.

All sequences of a step whose guidance has the same terms are one set of tensor operations on the
device. The host reads once, what was chosen for all of them: a few numbers per token. Only if a
model rules tokens out (logits of -inf) are the sequences concerned combined again, and read again.

Legend: B sequences, V tokens of the vocabulary, G sequences of a group.
"""

import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tita.align.draws import Position, Workspace, draw, draw_rows, fits_cache
from tita.align.forms import BASE
from tita.align.guidance import (
    Contrast,
    log_softmax,
    mix,
    mix_exactly,
    mix_rows,
    mixes_by_row,
    rule_out_implausible,
)
from tita.align.host_device import reads_are_free, upload
from tita.align.requests import Outcome, is_last
from tita.align.sequence import SampledToken, Sequence
from tita.align.vocabulary import Vocabulary
from tita.errors import TitaError

_Piece: TypeAlias = Tensor | list[int]
"""Values that the host has to know; a list of those that it knows already, on a CPU."""


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

    def of(self, indices: list[int]) -> Tensor:
        """logits[G, V] of some sequences."""
        if indices == self.rows:
            return self.logits
        places = dict(zip(self.rows, range(len(self.rows)), strict=True))
        chosen = [places[index] for index in indices]
        return self.logits[upload(chosen, torch.long, self.logits.device)]


def sample(
    sequences: Items[Sequence],
    outputs: Mapping[str, SourceLogits],
    *,
    workspace: Workspace | None = None,
) -> list[Outcome]:
    """Choose the next token of every sequence and append it; arguments as of `choose`."""
    choices = choose(sequences, outputs, workspace=workspace)
    return [append(*each) for each in zip(sequences, choices, strict=True)]


def verify(
    sequences: Items[Sequence],
    outputs: Mapping[str, SourceLogits],
    *,
    drafts: Items[Items[int]],
    workspace: Workspace | None = None,
) -> list[list[Outcome]]:
    """Choose the next tokens of every sequence as far as its drafts are right, and append them.

    Args:
        sequences: the answers.
        outputs: as of `choose`, with a row for every draft of every sequence: the logits in its
            place.
        drafts: of every sequence, at least one. The last may be right, too.

    Returns:
        Of every sequence the tokens up to the first that is not the draft, or that is its last.
    """
    places = [(n, count) for n, each in enumerate(drafts) for count in range(len(each))]
    choices = iter(
        choose(
            [sequences[n] for n, _ in places],
            outputs,
            drafts=[drafts[n][:count] for n, count in places],
            workspace=workspace,
        )
    )
    found: list[list[Outcome]] = []
    for sequence, own in zip(sequences, drafts, strict=True):
        outcomes: list[Outcome] = []
        right = True
        for draft, choice in zip(own, [next(choices) for _ in own], strict=True):
            if right:
                outcomes.append(append(sequence, choice))
                right = not is_last(outcomes[-1]) and sequence.last == draft
        found.append(outcomes)
    return found


def append(sequence: Sequence, choice: SampledToken | None) -> Outcome:
    """Add a token that was chosen; the error where a model's logits were no numbers."""
    if choice is None:
        return NoNumbers(
            "the model's logits are not numbers (NaN)", remedy="check its weights and the image"
        )
    return sequence.append(choice)


def choose(
    sequences: Items[Sequence],
    outputs: Mapping[str, SourceLogits],
    *,
    drafts: Items[Items[int]] | None = None,
    workspace: Workspace | None = None,
) -> list[SampledToken | None]:
    """The next token of every sequence; None where a model's logits are no numbers.

    Args:
        sequences: B sequences; one may occur several times, with different drafts.
        outputs: by the source's name. `base` has a row for every sequence, in order, and is
            overwritten; the others have rows for those whose terms or explanation have them.
        drafts: B lists of tokens that are assumed between a sequence's last token and this one.
        workspace: kept between steps.
    """
    positions = [
        Position(sequence, drafts[index] if drafts else ())
        for index, sequence in enumerate(sequences)
    ]
    base = outputs["base"].logits.float()
    sources = {
        name: SourceLogits(base if name == "base" else _to_base(base, each), each.rows)
        for name, each in outputs.items()
    }
    step = _Step(positions, sources, workspace or Workspace())
    found = step.choose(list(range(len(positions))), exactly=False)
    again = [index for index, choice in found.items() if choice is None and sequences[index].terms]
    if again:
        found |= step.choose(again, exactly=True)
    return [found[index] for index in range(len(positions))]


def choose_drafts(
    sequences: Items[Sequence],
    reward: Tensor,
    *,
    drafts: Items[Items[int]],
    workspace: Workspace | None = None,
) -> list[int]:
    """The tokens that the reward model alone would choose, with the sequences' noise.

    Args:
        sequences: the B answers so far.
        reward: logits[B, V]; not modified.
        drafts: tokens between each sequence's last token and this one.
    """
    positions = [Position(*each) for each in zip(sequences, drafts, strict=True)]
    scores = reward.float()
    early = _early(positions)
    if early:
        scores = scores.clone()
        _rule_out(scores, early, range(len(positions)))
    (tokens,) = draw(positions, [scores], workspace or Workspace())
    # Where there are no numbers, any token is as good a draft.
    found: list[int] = torch.as_tensor(tokens).clamp(min=0).tolist()
    return found


@dataclass(frozen=True, slots=True)
class _Report:
    """Numbers that are reported with the tokens of E sequences, as they lie one after another."""

    indices: list[int]
    """Of the E sequences."""
    num_alternatives: int
    sources: list[tuple[str, list[int]]]
    """Names of the sources, and the places of their sequences among the E."""

    def read(
        self, values: Iterator[float], requests: Mapping[int, Any]
    ) -> dict[int, dict[str, Any]]:
        """Fields of `SampledToken` by index of the sequence."""
        number, k = len(self.indices), self.num_alternatives
        combined = _take(values, number)
        logprobs, tokens = _take(values, number * k), _take(values, number * k)
        terms: list[dict[str, float]] = [{} for _ in self.indices]
        for name, places in self.sources:
            for place in places:
                terms[place][name] = next(values)
        found = {}
        for place, index in enumerate(self.indices):
            request, own = requests[index], terms[place]
            rewards = [
                name for name in own if "/" not in name and name not in ("base", "reference")
            ]
            fields: dict[str, Any] = {}
            if request.score:
                against = own.get("reference", own["base"])
                fields["score"] = sum(own[name] - against for name in rewards) / len(rewards)
            if request.detailed:
                kept = slice(place * k, place * k + min(max(request.num_logprobs, 0), k))
                fields |= {
                    "logprob": combined[place],
                    "base": own["base"],
                    "reward": own[rewards[0]] if len(rewards) == 1 else None,
                    "terms": tuple(own.items()),
                    "alternatives": tuple(zip(map(int, tokens[kept]), logprobs[kept], strict=True)),
                }
            found[index] = fields
        return found


class _Step:
    """The choices of one step."""

    def __init__(
        self,
        positions: list[Position],
        sources: Mapping[str, SourceLogits],
        workspace: Workspace,
    ) -> None:
        self._positions = positions
        self._sources = sources
        self._workspace = workspace
        self._requests = {
            index: request
            for index, each in enumerate(positions)
            if (request := each.sequence.prepared.request).detailed or request.score
        }
        """Of the sequences whose tokens are reported with log-probabilities."""
        self._early = _early(positions)
        _rule_out(sources["base"].logits, self._early, range(len(positions)))

    def choose(self, indices: list[int], *, exactly: bool) -> dict[int, SampledToken | None]:
        """The tokens of some sequences by their index.

        Args:
            exactly: whether models may rule tokens out. If not, None may be a wrong answer for a
                guided sequence whose models do.
        """
        groups: dict[Any, list[int]] = {}
        for index in indices:
            groups.setdefault(self._positions[index].sequence.kind, []).append(index)
        pieces: list[_Piece] = []
        reports = [self._choose_group(group, pieces, exactly=exactly) for group in groups.values()]
        values = _read(pieces)
        found: dict[int, SampledToken | None] = {}
        for group, report in zip(groups.values(), reports, strict=True):
            tokens = _take(values, len(group))
            guided = bool(self._positions[group[0]].sequence.terms)
            alone = _take(values, len(group)) if guided else tokens
            fields = {} if report is None else report.read(values, self._requests)
            for index, token, other in zip(group, tokens, alone, strict=True):
                found[index] = (
                    None
                    if token < 0
                    else SampledToken(
                        token=int(token), changed=token != other, **fields.get(index, {})
                    )
                )
        return found

    def _choose_group(
        self, group: list[int], pieces: list[_Piece], *, exactly: bool
    ) -> _Report | None:
        """Append what the host has to know of G sequences with the same terms to `pieces`.

        First the tokens, -1 where there are no numbers, and those of the base alone if another
        model guides; then what the report, if there is one, reads.
        """
        base = self._sources["base"].of(group)
        positions = [self._positions[index] for index in group]
        explained = [place for place, index in enumerate(group) if index in self._requests]
        contrasts = self._contrasts(group, positions)
        alphas = [each.sequence.prepared.request.guidance.plausibility for each in positions]
        plain = not (exactly or explained or self._early or any(alphas))
        if plain and mixes_by_row(contrasts) and not fits_cache(base):
            rows = mix_rows(base, contrasts[0], out=self._workspace.scores(1, base)[0])
            pieces += draw_rows(positions, [rows, base.numpy()])
            return None
        sides = [base]
        if contrasts:
            scores = self._workspace.scores(len(group), base)
            (mix_exactly if exactly else mix)(base, contrasts, out=scores)
            if any(alphas):
                rule_out_implausible(base, scores, alphas)
            # What ends an answer too early is out in every form of guidance.
            _rule_out(scores, self._early, group)
            sides = [scores, base]
        combined = None
        if explained:
            places = upload(explained, torch.long, base.device)
            # Before drawing, which may overwrite the scores.
            combined = log_softmax(sides[0][places])
        drawn = draw(positions, sides, self._workspace)
        pieces += drawn
        if combined is None:
            return None
        tokens = torch.as_tensor(drawn[0])[places].clamp(min=0)
        return self._report([group[n] for n in explained], tokens, combined, pieces)

    def _contrasts(self, group: list[int], positions: list[Position]) -> list[Contrast]:
        """The terms of G sequences that have the same ones, with logits[G, V] of each source."""
        found = []
        for terms in zip(*(each.sequence.terms for each in positions), strict=True):
            source, against = terms[0].source, terms[0].against
            pairs = zip(terms, positions, strict=True)
            coefficients = [term.at(position.number + 1) for term, position in pairs]
            other: Tensor | Literal["base"] | None = None
            if against is not None:
                other = "base" if against == BASE else self._sources[against.name].of(group)
            found.append(Contrast(self._sources[source.name].of(group), coefficients, other))
        return found

    def _report(
        self,
        indices: list[int],
        tokens: Tensor,
        combined: Tensor,
        pieces: list[_Piece],
    ) -> _Report:
        """Append the log-probabilities of E tokens to `pieces`.

        Args:
            indices: of the E sequences.
            tokens: [E].
            combined: log-probabilities[E, V].
        """
        column = tokens.unsqueeze(-1)
        wanted = max(self._requests[index].num_logprobs for index in indices)
        k = min(max(wanted, 0), combined.shape[-1])
        pieces.append(combined.gather(-1, column))
        pieces += combined.topk(k)
        sources = []
        for name, output in self._sources.items():
            running = set(output.rows)
            places = [place for place, index in enumerate(indices) if index in running]
            if places:
                table = log_softmax(output.of([indices[place] for place in places]))
                own = column[upload(places, torch.long, column.device)]
                pieces.append(table.gather(-1, own))
                sources.append((name, places))
        return _Report(indices, k, sources)


def _early(positions: Items[Position]) -> dict[int, list[int]]:
    """The tokens that would end an answer too early, by the index of its position."""
    return {
        index: tokens
        for index, each in enumerate(positions)
        if (tokens := each.sequence.too_early(len(each.drafts)))
    }


def _rule_out(scores: Tensor, early: Mapping[int, list[int]], indices: Items[int]) -> None:
    """Set scores[R, V] of the tokens that are too early in the positions of its rows to -inf."""
    pairs = early and [
        (row, token) for row, index in enumerate(indices) for token in early.get(index, ())
    ]
    if pairs:
        rows, tokens = upload(pairs, torch.long, scores.device).unbind(-1)
        scores[rows, tokens] = -math.inf


def _to_base(base: Tensor, output: SourceLogits) -> Tensor:
    """Another source's logits in float32, on the base's device and over its whole vocabulary."""
    logits = output.logits.to(base.device).float()
    if output.vocabulary is not None:
        everyone = output.rows == list(range(len(base)))
        own = base if everyone else base[upload(output.rows, torch.long, base.device)]
        output.vocabulary.complete(own, logits)
    return logits


def _read(pieces: Items[_Piece]) -> Iterator[float]:
    """All values in order, in one copy to the host."""
    on_device = [each for each in pieces if isinstance(each, Tensor)]
    if len(on_device) < len(pieces) or reads_are_free(on_device[0].device):
        return chain.from_iterable(
            each.flatten().tolist() if isinstance(each, Tensor) else each for each in pieces
        )
    # float64 holds every token id and every float32.
    return iter(torch.cat([each.flatten().double() for each in on_device]).tolist())


def _take(values: Iterator[float], number: int) -> list[float]:
    return [*islice(values, number)]
