"""One answer to be written, as the scheduler knows it: no HTTP, no wire format."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of a conversation; `parts` are words and images in the client's order."""

    role: Literal["system", "user", "assistant"]
    parts: "tuple[str | Image, ...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen from the combined distribution."""

    max_new_tokens: int | None = None
    """None: as many as the server gives by default."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    ignore_end: bool = False
    """Take the end-of-text token for any other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked, and how strongly the answer is guided."""

    turns: tuple[Turn, ...] = ()
    raw: str | None = None
    """A prompt already in the model's template, `<image>` where images go; then `turns` only
    carry the images. LLaVA's front ends send such prompts."""
    weight: float = 0.0
    form: str = "tita"
    sampling: Sampling = Sampling()
    num_logprobs: int = -1
    """Alternatives to report with each token; 0 for the token alone, -1 for nothing."""
    explain: bool = False

    @property
    def images(self) -> "tuple[Image, ...]":
        return tuple(
            part for turn in self.turns for part in turn.parts if not isinstance(part, str)
        )

    @property
    def guided(self) -> bool:
        """Whether the reward model has to run along."""
        return self.weight > 0 or self.explain


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A job whose prompt each model's processor has been through."""

    job: Job
    base: dict[str, Any]
    reward: dict[str, Any] | None
    num_prompt_tokens: int
    max_new_tokens: int
    image_digest: str = ""
    """Of the images' pixels, in order; empty without images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A token that could have stood somewhere."""

    text: str
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One step of an answer."""

    text: str
    """Words that are certain now; empty while a stop string or a character may be beginning."""
    token: str
    changed: bool
    logprob: float | None = None
    base: float | None = None
    reward: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    counted: bool = True
    """False for the end-of-text token, which is no token of the answer."""
    finish_reason: Literal["stop", "length"] | None = None
    base_s: float = 0.0
    """Seconds of the answer's share in the base model since its last step; the first has the
    prompt's, too."""
    reward_s: float = 0.0
