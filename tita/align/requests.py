"""What is asked: a question or a conversation, how strongly to guide, how to choose tokens."""

import dataclasses
from dataclasses import dataclass, field

from tita.errors import TitaError
from tita.vlm import Picture, Prompt, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen from the combined distribution, and when an answer ends."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """The fewest likeliest tokens that have this much together may be chosen (arXiv 1904.09751)."""
    top_k: int = 0
    """So many likeliest tokens may be chosen; 0 is all."""
    repetition_penalty: float = 1.0
    """Over tokens of the prompt and the answer (arXiv 1909.05858), as transformers has it."""
    seed: int = 0
    """Noise is a function of seed and position alone: an answer does not hang on its batch."""
    stops: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """The answer ends before these tokens, as before the end-of-text token."""
    ignore_end: bool = False
    """Take the end-of-text token for any other."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise TitaError(f"max_new_tokens is {self.max_new_tokens}", remedy="give 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise TitaError(f"temperature is {self.temperature}", remedy="give 0 or more")
        if not 0 < self.top_p <= 1:
            raise TitaError(f"top_p is {self.top_p}", remedy="give more than 0, at most 1")
        if self.top_k < 0:
            raise TitaError(f"top_k is {self.top_k}", remedy="give 0 for all, or more")
        if not 0 < self.repetition_penalty < float("inf"):
            raise TitaError(
                f"repetition_penalty is {self.repetition_penalty}", remedy="give more than 0"
            )
        if "" in self.stops:
            raise TitaError("an empty stop string", remedy="leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer that is wanted, and how strongly it is to be guided.

    It asks in one of the three ways of a `Prompt`; `question` is the prompt's text.
    """

    question: str = ""
    images: "tuple[Picture, ...]" = ()
    turns: tuple[Turn, ...] = ()
    raw: str | None = None
    weight: float = 0.3
    """Guidance weight; 0 is the base alone."""
    form: str | None = None
    """A key of `guidance.FORMS`; the engine's own if not given."""
    plausibility: float = 0.0
    """Guided tokens must have this share of the base's likeliest token's chance; 0 is no bound
    (alpha of contrastive decoding, arXiv 2210.15097)."""
    sampling: Sampling = field(default_factory=Sampling)
    explain: bool = False
    """Whether each token comes with its log-probabilities under base, reward and both."""
    num_logprobs: int = -1
    """Alternatives to report with each token; 0 for the token alone, -1 for nothing."""
    reward_images: "tuple[Picture, ...] | None" = None
    """Images for the reward model instead of `images`: for controls that ask whether it looks."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise TitaError(f"guidance weight is {self.weight}", remedy="give 0 or more")
        if not 0 <= self.plausibility <= 1:
            raise TitaError(f"plausibility is {self.plausibility}", remedy="give 0 to 1")
        if self.turns and (self.question or self.images or self.raw is not None):
            raise TitaError("turns beside a question", remedy="put the question into the turns")

    @property
    def guided(self) -> bool:
        """Whether the reward model has to run along."""
        return self.weight > 0 or self.explain

    @property
    def detailed(self) -> bool:
        """Whether tokens are told with log-probabilities."""
        return self.explain or self.num_logprobs >= 0

    @property
    def prompt(self) -> Prompt:
        """What the base is asked."""
        return Prompt(text=self.question, images=self.images, turns=self.turns, raw=self.raw)

    @property
    def as_the_reward_sees_it(self) -> "Request":
        """The request with the images that the reward model is shown."""
        if self.reward_images is None:
            return self
        return dataclasses.replace(self, images=self.reward_images, reward_images=None)
