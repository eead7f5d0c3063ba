"""Speculative decoding: the reward model drafts, the base verifies all drafts in one forward.

The rule of speculative sampling (arXiv 2211.17192) accepts a draft by an own coin toss and draws
again where it fails: identically distributed, but another answer for every number of drafts. Here
randomness is a function of (seed, position) instead. The combined distribution's choice at a
position is argmax(log p + g) whatever was drafted; a draft is chosen by the reward model with the
same g, and accepted if and only if it is that choice (coupling by shared Gumbel noise, arXiv
2408.07978). So the answer is, token for token, that of lockstep decoding: lossless, and the same
under its seed however many tokens are drafted and whatever else is in the batch. Greedy decoding is
the case without noise.

A round of m drafts takes m + 1 steps of the reward model, which guidance needs anyway, and one
forward of the base over m + 1 tokens. If drafts are accepted at rate a, it yields
(1 - a^(m+1)) / (1 - a) tokens (arXiv 2211.17192, equation 1); m = 0 is lockstep.
"""

import statistics
import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tita.align.draws import Workspace
from tita.align.host_device import upload
from tita.align.model_runner import ModelRunner
from tita.align.requests import Outcome, TokenOutput
from tita.align.sampling import SourceLogits, choose_drafts, verify
from tita.align.sequence import Agreement
from tita.align.sequence import Sequence as AnswerSequence

_MIN_GAIN = 1.05
"""Drafting must promise this multiple of lockstep's speed: estimates are noisy."""
_SLOPE = 0.05
"""Assumed relative cost of one more token in a base forward, until it is measured."""


class _Times:
    """Recent durations of one operation, in seconds."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=9)

    def note(self, seconds: float) -> None:
        self._recent.append(seconds)

    def typical(self, hope: float) -> float:
        """Their median; with few measurements, nothing worse than `hope` and the best of them.

        First calls are slow (kernels are selected, memory is allocated) and must not rule drafting
        out.
        """
        if len(self._recent) < 2:
            return min(hope, *self._recent)
        if len(self._recent) < 4:
            return min(self._recent)
        return statistics.median(self._recent)


@dataclass(slots=True)
class DraftPolicy:
    """Chooses the number of drafts from measured acceptance and times; outlives single requests."""

    max_drafts: int = 8
    """Per round; 0 is lockstep always."""
    num_rounds: int = 0
    """Rounds with drafts; the next two count tokens."""
    num_drafted: int = 0
    num_accepted: int = 0
    _agreement: Agreement = field(default_factory=Agreement)
    _reward: _Times = field(default_factory=_Times)
    _base: dict[int, _Times] = field(default_factory=dict)
    """By number of tokens in one forward."""
    _of_rows: dict[int, "DraftPolicy"] = field(default_factory=dict)
    """Times with several sequences, by their number."""

    def note_agreement(self, agreement: Agreement, agreed: bool) -> None:
        """Count whether the reward model's own choice of a token was the combined one.

        Args:
            agreement: of the sequence.
            agreed: whether it was.
        """
        agreement.note(agreed, decay=0.95)
        self._agreement.note(agreed, decay=0.99)

    def note_reward(self, seconds: float) -> None:
        """One step of the reward model took this long."""
        self._reward.note(seconds)

    def note_base(self, num_tokens: int, seconds: float) -> None:
        """One forward of the base over this number of tokens of one sequence took this long."""
        self._base.setdefault(num_tokens, _Times()).note(seconds)

    def acceptance(self, agreement: Agreement) -> float:
        """Expected acceptance rate of a sequence: its own recent one, with that of all as prior."""
        prior = (self._agreement.agreed + 1) / (self._agreement.seen + 2)
        return (agreement.agreed + 4 * prior) / (agreement.seen + 4)

    def num_drafts(self, agreement: Agreement, *, limit: int) -> int:
        """Number of drafts in the next round, at most `limit`; 0 is lockstep."""
        if 1 not in self._base or agreement.seen < 1:
            return 0
        return self._fastest([self.acceptance(agreement)], limit)

    def num_drafts_together(self, agreements: Sequence[Agreement], *, limit: int) -> int:
        """Number of drafts in the next round of several sequences, for each of them."""
        if len(agreements) == 1:
            return self.num_drafts(agreements[0], limit=limit)
        times = self.of_rows(len(agreements))
        if 1 not in times._base or min(each.seen for each in agreements) < 1:
            return 0
        return times._fastest([self.acceptance(each) for each in agreements], limit)

    def of_rows(self, number: int) -> "DraftPolicy":
        """The policy that gets the times of rounds with this number of sequences."""
        if number == 1:
            return self
        return self._of_rows.setdefault(number, DraftPolicy(self.max_drafts))

    def _fastest(self, rates: Sequence[float], limit: int) -> int:
        """The number of drafts with the highest expected speed, for acceptance rates."""
        speeds = {m: self._speed(m, rates) for m in range(min(limit, self.max_drafts) + 1)}
        best = max(speeds, key=speeds.__getitem__)
        return best if speeds[best] > _MIN_GAIN * speeds[0] else 0

    def _speed(self, num_drafts: int, rates: Sequence[float]) -> float:
        """Expected tokens per second."""
        num_tokens = sum(rate**power for rate in rates for power in range(num_drafts + 1))
        reward_s = self._reward.typical(float("inf"))
        return num_tokens / ((num_drafts + 1) * reward_s + self._base_s(num_drafts + 1))

    def _base_s(self, num_tokens: int) -> float:
        """Time of a base forward over this number of tokens, measured or interpolated."""
        one = self._base[1].typical(float("inf"))
        shorter = max(n for n in self._base if n <= num_tokens)
        hope = one * (1 + _SLOPE * (shorter - 1))
        seconds = self._base[shorter].typical(hope)
        if shorter == num_tokens:
            return seconds
        longer = min((n for n in self._base if n > num_tokens), default=None)
        if longer is None:
            # Kernels for two tokens can be slower than those for four, so stay optimistic.
            return max(seconds, one * (1 + _SLOPE * (num_tokens - 1)))
        hope = one * (1 + _SLOPE * (longer - 1))
        part = (num_tokens - shorter) / (longer - shorter)
        return seconds + part * (self._base[longer].typical(hope) - seconds)


def speculate(
    sequences: Mapping[Hashable, AnswerSequence],
    runners: Mapping[str, ModelRunner],
    *,
    drafter: str,
    policy: DraftPolicy,
    num_drafts: int,
    workspace: Workspace,
) -> list[tuple[Hashable, Outcome]]:
    """Draft and verify one round for all sequences of the batch.

    Args:
        sequences: the answers by key, in the order of the base's rows; the models have seen all of
            them but their last tokens.
        runners: by model, those that have rows of the sequences.
        drafter: the reward model that drafts; it has one row of every sequence. All others verify.
        policy: gets the measurements of this round.
        num_drafts: maximum number of drafts for each, fewer than the tokens that any answer may
            still get; 0 is lockstep.

    Returns:
        The next tokens, at least one of every sequence, with its key.
    """
    times = policy.of_rows(len(sequences))
    rounds = _Round(sequences, runners[drafter], workspace)
    while len(rounds.logits) <= num_drafts and rounds.drafting:
        began = time.perf_counter()
        rounds.draft()
        times.note_reward(time.perf_counter() - began)
    began, num_tokens = time.perf_counter(), len(rounds.logits)
    outputs = rounds.outputs_of(drafter, torch.stack(rounds.logits, 1), runners[drafter])
    read = rounds.read()
    for model, runner in runners.items():
        if model == drafter:
            continue
        before = runner.seconds
        logits = runner.extend(read)
        for sequence in sequences.values():
            share_s = (runner.seconds - before) / len(sequences)
            if model == "base":
                sequence.base_s += share_s
            else:
                sequence.reward_s += share_s
        for source in dict.fromkeys(runner.sources):
            outputs |= rounds.outputs_of(source, logits, runner)
    drafts = list(rounds.drafts.values())
    # The base comes first in what is reported.
    ordered = {"base": outputs.pop("base"), **outputs}
    found = verify([*sequences.values()], ordered, drafts=drafts, workspace=workspace)
    rejected = {}
    for (key, sequence), own, outcomes in zip(sequences.items(), drafts, found, strict=True):
        for draft, outcome in zip(own, outcomes, strict=False):
            agreed = isinstance(outcome, TokenOutput) and outcome.id == draft
            policy.note_agreement(sequence.agreement, agreed)
        policy.num_drafted += len(own) - 1
        policy.num_accepted += len(outcomes) - 1
        rejected[key] = num_tokens - len(outcomes)
    policy.num_rounds += num_tokens > 1
    for rollback in [runner.plan_rollback(rejected) for runner in runners.values()]:
        rollback()
    times.note_base(num_tokens, time.perf_counter() - began)
    return [
        (key, outcome)
        for key, outcomes in zip(sequences, found, strict=True)
        for outcome in outcomes
    ]


class _Round:
    """The drafts of one round: the reward model's own next tokens, and its logits after each.

    All but the last of a sequence are drafts. The last costs nothing more, and shows whether it
    would have been accepted.
    """

    def __init__(
        self,
        sequences: Mapping[Hashable, AnswerSequence],
        reward: ModelRunner,
        workspace: Workspace,
    ) -> None:
        self._sequences = sequences
        self._reward = reward
        self._workspace = workspace
        self.drafts: dict[Hashable, list[int]] = {key: [] for key in sequences}
        self.logits: list[Tensor] = []
        """[B, V] of the reward model's rows, by draft."""
        self.drafting = True
        """Whether a sequence may have another draft: nothing follows the end of a text."""

    def draft(self) -> None:
        """Draft another token of every sequence whose last draft does not end it."""
        keys, before = self._reward.keys, self._reward.seconds
        # A sequence that has ended reads its last draft again, which is removed later.
        fed = [(self.drafts[key] or [self._sequences[key].last])[-1] for key in keys]
        self.logits.append(self._reward.decode(fed))
        going = [row for row, key in enumerate(keys) if self._goes_on(key)]
        chosen = choose_drafts(
            [self._sequences[keys[row]] for row in going],
            self.logits[-1] if len(going) == len(keys) else self.logits[-1][going],
            drafts=[self.drafts[keys[row]] for row in going],
            workspace=self._workspace,
        )
        for row, token in zip(going, chosen, strict=True):
            self.drafts[keys[row]].append(token)
        share_s = (self._reward.seconds - before) / len(keys)
        for sequence in self._sequences.values():
            sequence.reward_s += share_s
        self.drafting = any(self._goes_on(key) for key in keys)

    def read(self) -> dict[Hashable, list[int]]:
        """What the other models read of every sequence: as many tokens as the reward model did."""
        found = {}
        for key, sequence in self._sequences.items():
            tokens = [sequence.last, *self.drafts[key][:-1]]
            found[key] = tokens + [tokens[-1]] * (len(self.logits) - len(tokens))
        return found

    def outputs_of(
        self, source: str, logits: Tensor, runner: ModelRunner
    ) -> dict[str, SourceLogits]:
        """A source's logits in the place of every draft, from logits[B, Q, V] of its model."""
        starts, number = dict[Hashable, int](), 0
        for key, own in self.drafts.items():
            starts[key] = number
            number += len(own)
        places = sorted(
            (starts[key] + count, row * logits.shape[1] + count)
            for row, (key, name) in enumerate(zip(runner.keys, runner.sources, strict=True))
            if name == source
            for count in range(len(self.drafts[key]))
        )
        flat, order = logits.flatten(0, 1), [row for _, row in places]
        if order != list(range(len(flat))):
            flat = flat[upload(order, torch.long, flat.device)]
        return {source: SourceLogits(flat, [place for place, _ in places], runner.vocabulary)}

    def _goes_on(self, key: Hashable) -> bool:
        own = self.drafts[key]
        return not own or not self._sequences[key].ends_with(own[-1])
