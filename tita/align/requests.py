"""Requests and answers of an engine, and the engine's options. Imports no torch.

A `Request` goes in; `TokenOutput`s come out one by one (`Engine.stream`), or an `Answer` as a whole
(`Engine.generate`).
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from tita.align.forms import Guidance
from tita.errors import TitaError
from tita.vlm.images import Picture
from tita.vlm.prompts import Prompt, Turn

FinishReason = Literal["stop", "length"]

_LEAST, _MOST = 1e-30, 1e30
"""Beyond them, float32 has 0 or infinity for a number, or for a score that it divides."""


def _check(record: object, name: str, valid: bool, remedy: str) -> None:
    if not valid:
        raise TitaError(f"{name} is {getattr(record, name)}", remedy=remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are sampled from the combined distribution, and when an answer ends.

    Raises:
        TitaError: a value is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with this total probability (arXiv
    1904.09751)."""
    top_k: int = 0
    """Sample from this number of most likely tokens; 0 is all."""
    repetition_penalty: float = 1.0
    """Over tokens of the prompt and the answer (arXiv 1909.05858), as in transformers."""
    seed: int = 0
    """Noise is a function of seed and position alone: an answer does not depend on its batch."""
    stops: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """The answer ends before these tokens, as before the end-of-text token."""
    ignore_end: bool = False
    """Continue after the end-of-text token."""
    min_new_tokens: int = 0
    """The answer does not end before it has this number of tokens: until then, tokens that would
    end it have probability 0, and stop strings do not count."""

    def __post_init__(self) -> None:
        positive = 0 < self.repetition_penalty < float("inf")
        _check(self, "max_new_tokens", self.max_new_tokens >= 1, "give 1 or more")
        _check(self, "temperature", 0 <= self.temperature < float("inf"), "give 0 or more")
        _check(self, "top_p", 0 < self.top_p <= 1, "give more than 0, at most 1")
        _check(self, "top_k", self.top_k >= 0, "give 0 for all, or more")
        _check(self, "repetition_penalty", positive, "give more than 0")
        short = self.min_new_tokens <= self.max_new_tokens
        _check(self, "min_new_tokens", self.min_new_tokens >= 0, "give 0 or more")
        _check(self, "min_new_tokens", short, f"give at most max_new_tokens, {self.max_new_tokens}")
        if "" in self.stops:
            raise TitaError("an empty stop string", remedy="leave it out")
        for name in ("temperature", "top_p", "repetition_penalty"):
            if given := getattr(self, name):
                object.__setattr__(self, name, min(max(given, _LEAST), _MOST))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request: a prompt, its guidance and its sampling.

    The prompt takes one of the forms of a `Prompt`; `question` is the prompt's text.

    Raises:
        TitaError: the prompt is given in two forms.
    """

    question: str = ""
    images: tuple[Picture | str, ...] = ()
    """Images, or paths of their files."""
    turns: tuple[Turn, ...] = ()
    raw: str | None = None
    token_ids: tuple[int, ...] = ()
    guidance: Guidance = field(default_factory=Guidance)
    sampling: Sampling = field(default_factory=Sampling)
    explain: bool = False
    """Report log-probabilities of each token under every source and the combined distribution."""
    score: bool = False
    """Compute the implicit reward of each token, for best of n."""
    num_logprobs: int = -1
    """Number of alternatives to report with each token; 0 for the token alone, -1 for nothing."""
    reward_images: tuple[Picture | str, ...] | None = None
    """Images for the reward model instead of `images`: for controls that test whether it uses
    them."""

    def __post_init__(self) -> None:
        if self.turns and (self.question or self.images or self.raw is not None):
            raise TitaError("turns beside a question", remedy="put the question into the turns")
        if self.token_ids and (self.prompt.pictures or self.question or self.raw is not None):
            raise TitaError("token ids beside another prompt", remedy="give one of them")

    @property
    def detailed(self) -> bool:
        """Whether tokens are reported with log-probabilities."""
        return self.explain or self.num_logprobs >= 0

    @property
    def prompt(self) -> Prompt:
        """The prompt of the base model."""
        return Prompt(
            text=self.question,
            images=tuple(Path(each) if isinstance(each, str) else each for each in self.images),
            turns=self.turns,
            raw=self.raw,
            token_ids=self.token_ids,
        )

    @property
    def reward_view(self) -> "Request":
        """The request with the images that the reward model sees."""
        if self.reward_images is None:
            return self
        return dataclasses.replace(self, images=self.reward_images, reward_images=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One of the most likely tokens at a position."""

    text: str
    logprob: float
    bytes: bytes = b""
    """As of a `TokenOutput`."""


@dataclass(slots=True, kw_only=True)
class TokenOutput:
    """One token of an answer, and the text that it completes.

    Not frozen: to make a frozen one takes as long as to decode its text.
    """

    id: int
    text: str
    """Text that is final now; empty while a stop string or a character may be incomplete."""
    token: str
    """The token's own text; empty unless log-probabilities were requested."""
    bytes: bytes = b""
    """What the token adds to the answer in UTF-8, which may be a part of a character; blanks at the
    answer's end, and what a stop string cuts off, included. Empty for the end-of-text token, and
    unless log-probabilities were requested."""
    changed: bool
    """Whether the base model alone, with the same noise, would have chosen another token here."""
    logprob: float | None = None
    """Under the combined distribution, before temperature; nats."""
    base: float | None = None
    reward: float | None = None
    """None unless one reward model ran."""
    terms: tuple[tuple[str, float], ...] = ()
    """Log-probability under every source by its name: `base`, a reward model, `base/no-image`."""
    score: float | None = None
    """Implicit reward: log p_reward - log p_reference, or - log p_base without a reference; the
    mean of several reward models. If requested."""
    alternatives: tuple[Alternative, ...] = ()
    counted: bool = True
    """False for the end-of-text token, which is no part of the answer."""
    finish_reason: FinishReason | None = None
    base_s: float = 0.0
    """Seconds of this answer's share in the base model since its last token; the first token
    includes the prefill."""
    reward_s: float = 0.0
    num_cached_tokens: int = 0
    """Tokens of the base model's prompt that the prefix cache had; the same with every token."""


Outcome: TypeAlias = TokenOutput | TitaError
"""The next token of an answer, or the error that ended it."""


def is_last(outcome: Outcome) -> bool:
    """Whether the answer ends here."""
    return not isinstance(outcome, TokenOutput) or outcome.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of an explained answer; log-probabilities in nats."""

    id: int
    text: str
    base: float
    reward: float | None
    """None unless one reward model ran."""
    combined: float
    changed: bool
    """Whether the base model alone, with the same noise, would have chosen another token here."""
    terms: tuple[tuple[str, float], ...] = ()
    """As of a `TokenOutput`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One complete answer."""

    text: str
    token_ids: tuple[int, ...]
    """Without the end-of-text token; with those of a stop string that ended it."""
    finish_reason: FinishReason
    num_prompt_tokens: int
    """Of the base model, image tokens included."""
    num_changed: int
    """Tokens, a final end-of-text included, that the base model alone would not have chosen."""
    tokens: tuple[Token, ...] = ()
    scores: tuple[float, ...] = ()
    """Of best of n: the summed implicit rewards of all n answers, this one's the largest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Options of an engine, the same for all requests.

    Raises:
        TitaError: a value is out of range.
    """

    prefill_tokens: int = 8192
    """Maximum number of prompt tokens per prefill chunk; chunks are shorter where running requests
    would wait too long."""
    prefix_cache_bytes: int = 0
    """Size of the prefix cache, which keeps the KV of images for the next question about the same
    image; 0 disables it."""
    max_prompt_tokens: int | None = None
    """Maximum prompt length, image tokens included; the models' context if not given."""
    max_model_len: int | None = None
    """Maximum number of tokens of prompt and answer together; the models' context if not given."""
    max_drafts: int = 8
    """Maximum number of draft tokens per step; 0 disables drafting."""
    max_draft_rows: int = 1
    """Maximum number of running answers for which drafts are made; with more there are none."""
    max_adapters: int = 16
    """Maximum number of LoRA adapters of one model in memory, and so in a batch; the least recently
    used are evicted."""
    pack: bool | None = None
    """Pack linear layers of float32 models on a CPU (`tita.vlm.packing`); if not given, those of
    models that are too large for a processor's cache."""

    def __post_init__(self) -> None:
        longest, together = self.max_prompt_tokens, self.max_model_len
        _check(self, "prefix_cache_bytes", self.prefix_cache_bytes >= 0, "give 0 or more")
        _check(self, "max_drafts", self.max_drafts >= 0, "give 0 or more")
        _check(self, "max_adapters", self.max_adapters >= 1, "give 1 or more")
        _check(self, "max_draft_rows", self.max_draft_rows >= 1, "give 1 or more")
        _check(self, "prefill_tokens", self.prefill_tokens >= 1, "give 1 or more")
        _check(self, "max_prompt_tokens", longest is None or longest >= 1, "give 1 or more")
        _check(self, "max_model_len", together is None or together >= 2, "give 2 or more")
