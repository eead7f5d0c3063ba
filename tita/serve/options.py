"""What the server is told once, at its start."""

from dataclasses import dataclass, field

from tita.records import DEFAULT_WEIGHT
from tita.serve.middleware import APIKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on what a client may ask; what lies beyond is refused, never cut."""

    max_body_bytes: int = 64 * 2**20
    max_image_bytes: int = 20 * 2**20
    max_pixels: int = 40_000_000
    max_images: int = 8
    """Of one request."""
    max_prompt_tokens: int = 16_384
    """Image tokens included; a model's own context may be shorter."""
    max_prompt_characters: int = 2**20
    """Looked at before tokens are counted, which takes a second for as many."""
    max_output_tokens: int = 4_096
    default_output_tokens: int = 512
    """Of a request that names no number."""
    max_choices: int = 16
    """Answers to one request (`n`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How one server behaves."""

    name: str = "tita"
    """The aligned model's name in the API; `NAME:base` is the base alone."""
    weight: float = DEFAULT_WEIGHT
    """Guidance weight of a request that names none."""
    form: str = "tita"
    """Guidance form of a request that names none."""
    plausibility: float = 0.0
    """Plausibility bound of a request that names none (`tita.align.Request`)."""
    max_drafts: int = 8
    """Tokens that the reward model drafts at once, where that pays; 0 keeps the models in step."""
    pack: bool | None = None
    """As `tita.align.EngineOptions` has it."""
    keys: APIKeys = field(default_factory=APIKeys)
    """That clients need; none for an open server."""
    image_hosts: tuple[str, ...] = ()
    """Hosts that images may be fetched from; `.example.org` also takes what lies below it."""
    allow_origins: tuple[str, ...] = ()
    """Web pages elsewhere that may ask from a browser, as `https://host`; `*` for all."""
    page: bool = True
    """Whether there is a page for people at `/`."""
    max_batch: int = 16
    """Answers that are written at once."""
    max_waiting: int = 64
    """Requests that wait for a place; beyond it 429."""
    prefill_tokens: int = 512
    """Prompt tokens taken in between two steps, so that running answers keep flowing."""
    prefix_cache_bytes: int = 256 * 2**20
    """KV of prompts up to their last image, kept for the next question about the same image."""
    deadline_s: float = 600.0
    """From the arrival of a request to its last token."""
    grace_s: float = 120.0
    """What running answers have left after SIGTERM."""
    log_prompts: bool = False
    limits: Limits = field(default_factory=Limits)

    @property
    def base_name(self) -> str:
        return f"{self.name}:base"
