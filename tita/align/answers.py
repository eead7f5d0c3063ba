"""What is answered: step by step as it is written, and whole."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from tita.errors import TitaError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A token that could have stood somewhere."""

    text: str
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One token of an answer, and the words that it makes certain."""

    id: int
    text: str
    """Words that are certain now; empty while a stop string or a character may be beginning."""
    token: str
    """The token by itself; empty unless log-probabilities were asked for."""
    changed: bool
    """Whether the base alone, with the same noise, would have chosen another token here."""
    logprob: float | None = None
    """Under the combined distribution, before temperature; nats."""
    base: float | None = None
    reward: float | None = None
    """None where the reward model did not run along."""
    alternatives: tuple[Alternative, ...] = ()
    counted: bool = True
    """False for the end-of-text token, which is no token of the answer."""
    finish_reason: FinishReason | None = None
    base_s: float = 0.0
    """Seconds of the answer's share in the base model since its last token; the first has the
    prompt's, too."""
    reward_s: float = 0.0


Outcome: TypeAlias = Said | TitaError
"""A token of an answer, or why it has no more."""


def is_last(outcome: Outcome) -> bool:
    """Whether nothing follows it."""
    return not isinstance(outcome, Said) or outcome.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of an explained answer; log-probabilities in nats."""

    id: int
    text: str
    base: float
    reward: float | None
    """None where no reward model ran along."""
    combined: float
    changed: bool
    """Whether the base alone, with the same noise, would have chosen another token here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer."""

    text: str
    token_ids: tuple[int, ...]
    """Without the end-of-text token; with those of a stop string that ended it."""
    finish_reason: FinishReason
    num_prompt_tokens: int
    """Of the base model, image tokens included."""
    num_changed: int
    """Tokens, the last end-of-text included, that the base alone would not have chosen there."""
    tokens: tuple[Token, ...] = ()
