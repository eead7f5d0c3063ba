"""What the engine is asked and what it answers."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tita.errors import TitaError
from tita.vlm import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen from the combined distribution."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Each request draws from a stream of its own: its answer does not hang on the batch."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise TitaError(f"max_new_tokens is {self.max_new_tokens}", remedy="give 1 or more")
        if not self.temperature >= 0:
            raise TitaError(f"temperature is {self.temperature}", remedy="give 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question with its images, and how strongly the answer is to be guided."""

    question: str
    images: "tuple[Image, ...]" = ()
    weight: float = 0.3
    sampling: Sampling = field(default_factory=Sampling)
    explain: bool = False
    """Whether the answer carries per-token log-probabilities."""
    reward_images: "tuple[Image, ...] | None" = None
    """Images for the reward model instead of `images`: for controls that ask whether it looks."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise TitaError(f"guidance weight is {self.weight}", remedy="give 0 or more")

    @property
    def base_prompt(self) -> Prompt:
        return Prompt(text=self.question, images=self.images)

    @property
    def reward_prompt(self) -> Prompt:
        images = self.images if self.reward_images is None else self.reward_images
        return Prompt(text=self.question, images=images)


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of an explained answer; log-probabilities in nats."""

    id: int
    text: str
    base: float
    reward: float
    combined: float
    changed: bool
    """Whether the base alone would have said another token here (under greedy decoding)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer."""

    text: str
    token_ids: tuple[int, ...]
    """Without the end-of-text token."""
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    """Of the base model, image tokens included."""
    num_changed: int
    """Tokens, the last end-of-text included, that the base alone would not have chosen there."""
    tokens: tuple[Token, ...] = ()
