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
from dataclasses import dataclass, field

from torch import Tensor

from tita.align.draws import Workspace
from tita.align.model_runner import ModelRunner
from tita.align.requests import Outcome, is_last
from tita.align.sampling import SourceLogits, choose_drafts, sample
from tita.align.sequence import Agreement, Sequence

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
        rate = self.acceptance(agreement)
        speeds = {m: self._speed(m, rate) for m in range(min(limit, self.max_drafts) + 1)}
        best = max(speeds, key=speeds.__getitem__)
        return best if speeds[best] > _MIN_GAIN * speeds[0] else 0

    def _speed(self, num_drafts: int, rate: float) -> float:
        """Expected tokens per second."""
        num_tokens = sum(rate**power for power in range(num_drafts + 1))
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
    sequence: Sequence,
    runners: dict[str, ModelRunner],
    *,
    drafter: str,
    policy: DraftPolicy,
    num_drafts: int,
    workspace: Workspace,
) -> list[Outcome]:
    """Draft and verify one round for the only sequence of the batch.

    Args:
        sequence: the answer; the models have seen all of it but its last token.
        runners: by model, those that have rows of the sequence.
        drafter: the reward model that drafts; it has one row. All others verify.
        policy: gets the measurements of this round.
        num_drafts: maximum number of drafts, fewer than the tokens that the answer may still get;
            0 is lockstep.

    Returns:
        The sequence's next tokens, at least one.
    """
    drafts, draft_logits = _draft(sequence, runners[drafter], num_drafts, policy=policy)
    seen = [sequence.last, *drafts[:-1]]
    began = time.perf_counter()
    logits: dict[str, Tensor] = {}
    """[Q, V] by source."""
    vocabularies = {drafter: runners[drafter].vocabulary}
    for model, runner in runners.items():
        if model == drafter:
            continue
        before = runner.seconds
        found = runner.extend(seen)
        took_s = runner.seconds - before
        logits |= dict(zip(runner.sources, found, strict=True))
        vocabularies |= dict.fromkeys(runner.sources, runner.vocabulary)
        if model == "base":
            sequence.base_s += took_s
        else:
            sequence.reward_s += took_s
    outcomes: list[Outcome] = []
    for number, token in enumerate(drafts):
        rows = {name: each[number : number + 1] for name, each in logits.items()}
        rows[drafter] = draft_logits[number]
        outcomes += sample(
            [sequence],
            {name: SourceLogits(row, [0], vocabularies[name]) for name, row in rows.items()},
            workspace=workspace,
        )
        agreed = sequence.last == token
        policy.note_agreement(sequence.agreement, agreed)
        if is_last(outcomes[-1]) or not agreed:
            break
    policy.note_base(len(drafts), time.perf_counter() - began)
    policy.num_rounds += len(drafts) > 1
    policy.num_drafted += len(drafts) - 1
    policy.num_accepted += len(outcomes) - 1
    for runner in runners.values():
        runner.rollback(len(drafts) - len(outcomes))
    return outcomes


def _draft(
    sequence: Sequence, reward: ModelRunner, num_drafts: int, *, policy: DraftPolicy
) -> tuple[list[int], list[Tensor]]:
    """The reward model's own next tokens, and its logits[1, V] after each.

    All but the last are drafts. The last costs nothing more, and shows whether it would have been
    accepted.
    """
    tokens: list[int] = []
    logits: list[Tensor] = []
    # Nothing follows the end of a text.
    while len(tokens) <= num_drafts and not (tokens and sequence.ends_with(tokens[-1])):
        began, before = time.perf_counter(), reward.seconds
        logits.append(reward.decode([tokens[-1] if tokens else sequence.last]))
        sequence.reward_s += reward.seconds - before
        tokens += choose_drafts([sequence], logits[-1], drafts=[tokens])
        policy.note_reward(time.perf_counter() - began)
    return tokens, logits
