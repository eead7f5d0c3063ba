"""How many tokens to draft: as many as acceptance and measured times say pay most, often none.

A round of m drafts takes m + 1 steps of the reward model, which are needed for guidance anyway, and
one forward of the base over m + 1 tokens. If drafts are accepted at rate a, it says
(1 - a^(m+1)) / (1 - a) tokens (arXiv 2211.17192, equation 1); m = 0 is lockstep.
"""

import statistics
from collections import deque
from dataclasses import dataclass, field

_GAIN = 1.05
"""Drafting must promise so many times lockstep's speed: estimates are noisy."""
_SLOPE = 0.05
"""A base forward over one more token, before it is measured, is taken to cost this part more."""


@dataclass(slots=True)
class Agreement:
    """How often the reward model's own choice was the combined one, of late."""

    agreed: float = 0.0
    seen: float = 0.0

    def note(self, agreed: bool, *, memory: float) -> None:
        """Count one token; those before it weigh `memory` times as much as they did."""
        self.agreed = memory * self.agreed + agreed
        self.seen = memory * self.seen + 1


class _Times:
    """Recent durations of one thing, in seconds."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=9)

    def note(self, seconds: float) -> None:
        self._recent.append(seconds)

    def typical(self, hope: float) -> float:
        """Their median; until there are enough, nothing worse than `hope` and the best of them.

        First times are slow (kernels are chosen, memory is fetched), and must not scare us off.
        """
        if len(self._recent) < 2:
            return min(hope, *self._recent)
        if len(self._recent) < 4:
            return min(self._recent)
        return statistics.median(self._recent)


@dataclass(slots=True)
class Drafting:
    """What is known about drafting with these two models; it outlives single requests."""

    max_drafts: int = 8
    """In one round; 0 is lockstep always."""
    num_rounds: int = 0
    """With drafts in them; the next two count tokens."""
    num_drafted: int = 0
    num_accepted: int = 0
    _agreement: Agreement = field(default_factory=Agreement)
    _reward: _Times = field(default_factory=_Times)
    _base: dict[int, _Times] = field(default_factory=dict)
    """By number of tokens in one forward."""

    def note_agreement(self, row: Agreement, agreed: bool) -> None:
        """Whether the reward model's own choice of a row's token was the combined one."""
        row.note(agreed, memory=0.95)
        self._agreement.note(agreed, memory=0.99)

    def note_reward(self, seconds: float) -> None:
        """One step of the reward model."""
        self._reward.note(seconds)

    def note_base(self, num_tokens: int, seconds: float) -> None:
        """One forward of the base over so many tokens of one row."""
        self._base.setdefault(num_tokens, _Times()).note(seconds)

    def acceptance(self, row: Agreement) -> float:
        """Rate at which a row's drafts will be accepted: its own of late, and all rows' before."""
        prior = (self._agreement.agreed + 1) / (self._agreement.seen + 2)
        return (row.agreed + 4 * prior) / (row.seen + 4)

    def num_drafts(self, row: Agreement, *, limit: int) -> int:
        """Drafts of the next round, at most `limit`; 0 is lockstep."""
        if 1 not in self._base or row.seen < 1:
            return 0
        rate = self.acceptance(row)
        speeds = {m: self._speed(m, rate) for m in range(min(limit, self.max_drafts) + 1)}
        best = max(speeds, key=speeds.__getitem__)
        return best if speeds[best] > _GAIN * speeds[0] else 0

    def _speed(self, num_drafts: int, rate: float) -> float:
        """Expected tokens a second."""
        num_tokens = sum(rate**power for power in range(num_drafts + 1))
        reward_s = self._reward.typical(float("inf"))
        return num_tokens / ((num_drafts + 1) * reward_s + self._base_s(num_drafts + 1))

    def _base_s(self, num_tokens: int) -> float:
        """What a forward over so many tokens takes, measured or guessed."""
        one = self._base[1].typical(float("inf"))
        shorter = max(n for n in self._base if n <= num_tokens)
        hope = one * (1 + _SLOPE * (shorter - 1))
        seconds = self._base[shorter].typical(hope)
        if shorter == num_tokens:
            return seconds
        longer = min((n for n in self._base if n > num_tokens), default=None)
        if longer is None:
            # Kernels for two tokens can be slower than those for four: hope on.
            return max(seconds, one * (1 + _SLOPE * (num_tokens - 1)))
        hope = one * (1 + _SLOPE * (longer - 1))
        part = (num_tokens - shorter) / (longer - shorter)
        return seconds + part * (self._base[longer].typical(hope) - seconds)
