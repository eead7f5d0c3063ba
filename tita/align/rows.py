"""One answer while it is written: its tokens, its words, and when it ends."""

from dataclasses import dataclass, field
from typing import Any

from tita.align.answers import Alternative, FinishReason, Said
from tita.align.drafting import Agreement
from tita.align.preparing import Prepared
from tita.align.requests import Sampling
from tita.align.vocabulary import Vocabulary
from tita.align.wording import Wording


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One row's next token; log-probabilities are there when they were asked for."""

    token: int
    changed: bool
    logprob: float | None = None
    base: float | None = None
    reward: float | None = None
    alternatives: tuple[Alternative, ...] = ()


@dataclass(slots=True, kw_only=True)
class Row:
    """An answer being written."""

    prepared: Prepared
    form: str
    tokenizer: Any
    ends: frozenset[int]
    """End-of-text tokens of the base."""
    wording: Wording
    vocabulary: Vocabulary | None = None
    """How the reward's tokens are the base's, if not by the same numbers."""
    token_ids: list[int] = field(default_factory=list)
    last: int = -1
    """The newest token, which the models have not seen yet."""
    agreement: Agreement = field(default_factory=Agreement)
    """Of the reward model with the combined choice, in this answer."""
    base_s: float = 0.0
    """Seconds of its share in the models since its last token."""
    reward_s: float = 0.0

    @property
    def sampling(self) -> Sampling:
        return self.prepared.request.sampling

    @property
    def weight(self) -> float:
        return self.prepared.request.weight

    @property
    def alpha(self) -> float:
        """Of the plausibility mask; 0 is none. The base alone is left as it is."""
        return self.prepared.request.plausibility if self.weight else 0.0

    @property
    def num_left(self) -> int:
        """Tokens that it may still have."""
        return self.prepared.max_new_tokens - len(self.token_ids)

    def ends_with(self, token: int) -> bool:
        """Whether a token ends the answer, and is no part of it."""
        ends = token in self.ends and not self.sampling.ignore_end
        return ends or token in self.sampling.stop_token_ids

    def say(self, chosen: Chosen) -> Said:
        """Write down the next token."""
        self.last = chosen.token
        ended = self.ends_with(chosen.token)
        text, reason = ("", "stop") if ended else self._add(chosen.token)
        if reason:
            text += self.wording.finish()
        base_s, reward_s = self.base_s, self.reward_s
        self.base_s = self.reward_s = 0.0
        detailed = self.prepared.request.detailed
        return Said(
            id=chosen.token,
            text=text,
            token=self.tokenizer.decode([chosen.token]) if detailed else "",
            changed=chosen.changed,
            logprob=chosen.logprob,
            base=chosen.base,
            reward=chosen.reward,
            alternatives=chosen.alternatives,
            counted=not ended,
            finish_reason=reason,
            base_s=base_s,
            reward_s=reward_s,
        )

    def _add(self, token: int) -> tuple[str, FinishReason | None]:
        self.token_ids.append(token)
        text = self.wording.add(token)
        if self.wording.stopped:
            return text, "stop"
        return text, None if self.num_left > 0 else "length"
