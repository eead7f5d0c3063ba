"""Options of the server, fixed when it starts. Imports no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from tita.align.forms import REFERENCE_FORMS, VIEW_FORMS, Guidance
from tita.align.requests import EngineOptions
from tita.engine.engine_options import EngineName, VllmOptions
from tita.errors import TitaError
from tita.recipes import ImageAspect
from tita.serve.api_keys import APIKeys
from tita.serve.errors import APIError, context_length_exceeded

_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/*?#@A-Z]+")
"""As browsers send it, in lower case and without a path."""

Quantization = Literal["8bit", "4bit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The models to load, each a tree in the store, a pointer, a path or a hub name.

    Raises:
        TitaError: the default guidance needs a model that is not given.
    """

    base: str
    reward: str | None = None
    rewards: Mapping[str, str] = field(default_factory=dict)
    """Several reward models by name, instead of `reward`."""
    reference: str | None = None
    """The reward model before DPO, for the guidance forms that need it."""
    guidance: Guidance = field(default_factory=Guidance)
    """The server's default guidance, which these models must support."""
    dtype: str = "auto"
    """Weight dtype."""
    device_map: str | None = None
    """Device map of the base model; the other models are loaded on the first GPU, if any."""
    quantization: Quantization | None = None
    """Quantization of the base model by bitsandbytes; the other models are small."""
    image_aspect: ImageAspect = "auto"
    """How images that are not square are resized for all models."""
    engine: EngineName = "transformers"
    """The engine that runs them; vLLM loads the weights itself."""

    def __post_init__(self) -> None:
        if self.engine == "vllm":
            given = {"--device-map": self.device_map, "--quantization": self.quantization}
            option = next((name for name, value in given.items() if value), None)
            if option is not None:
                raise TitaError(
                    f"{option} with --engine vllm",
                    remedy="give --tensor-parallel-size, or a base model that is saved quantized",
                )
            if self.guidance.form in VIEW_FORMS:
                raise TitaError(
                    f"--form {self.guidance.form} with --engine vllm, which does not run the base "
                    "model on a second view",
                    remedy="choose another form, or --engine transformers",
                )
        if self.guidance.form in REFERENCE_FORMS and not self.reference:
            raise TitaError(
                f"--form {self.guidance.form} without --reference",
                remedy="give the reward model before DPO as --reference",
            )
        if self.reference and not self.all_rewards:
            raise TitaError("--reference without --reward", remedy="give --reward too")
        if self.guidance.weights:
            self.guidance.reward_weights(tuple(self.all_rewards))

    def check_weights(self, weights: Mapping[str, float]) -> None:
        """Check that requests may have these weights by default.

        Raises:
            TitaError: there is no such reward model, or the default form uses none.
        """
        replace(self.guidance, weights=weights).reward_weights(tuple(self.all_rewards))

    @property
    def all_rewards(self) -> dict[str, str]:
        """The reward models by name; one that was given without is called `reward`."""
        return ({"reward": self.reward} if self.reward else {}) | dict(self.rewards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a request; a request beyond them is rejected, not truncated."""

    max_body_bytes: int = 64 * 2**20
    max_image_bytes: int = 20 * 2**20
    max_pixels: int = 40_000_000
    """Of one image."""
    max_images: int = 8
    max_prompt_characters: int = 2**20
    """Checked before tokenizing, which takes a second for a prompt of this length."""
    max_output_tokens: int = 4_096
    default_output_tokens: int = 512
    """Maximum number of output tokens if the request does not specify it."""
    max_choices: int = 16
    """Maximum of `n`, the number of responses to one request."""

    def check_prompt(
        self, *, num_characters: int, num_images: int, param: str = "messages"
    ) -> None:
        """Check what is known before an image is fetched or a token counted.

        Args:
            param: the field that has the prompt, for errors.

        Raises:
            APIError: the prompt is too long or has too many images.
        """
        if num_characters > self.max_prompt_characters:
            raise context_length_exceeded(
                f"the prompt has {num_characters:,} characters, more than "
                f"{self.max_prompt_characters:,}",
                param=param,
            )
        if num_images > self.max_images:
            raise APIError(
                f"the request has {num_images} images, more than {self.max_images}",
                param=param, code="too_many_images",
            )  # fmt: skip


DEFAULT_ENGINE_OPTIONS = EngineOptions(
    # Short prefill chunks keep running requests flowing.
    prefill_tokens=512, prefix_cache_bytes=256 * 2**20, max_prompt_tokens=16_384,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Options of one server.

    Raises:
        TitaError: the root path or an origin is not one, or an option is of another engine.
    """

    name: str = "tita"
    """The aligned model's name in the API; `NAME:base` is the base model alone."""
    guidance: Guidance = field(default_factory=Guidance)
    """Guidance of requests that do not specify it."""
    engine: EngineOptions = DEFAULT_ENGINE_OPTIONS
    engine_name: EngineName = "transformers"
    """Which engine answers."""
    vllm: VllmOptions = field(default_factory=VllmOptions)
    """Options of vLLM, if that is the engine; `max_batch` is that of the server."""
    keys: APIKeys = field(default_factory=APIKeys)
    """Accepted API keys; without keys the server is open."""
    image_hosts: tuple[str, ...] = ()
    """Hosts that images may be fetched from; `.example.org` allows all its subdomains."""
    allow_origins: tuple[str, ...] = ()
    """Origins whose web pages may call the API from a browser, as `https://host`; `*` for all."""
    page: bool = True
    """Whether to serve the page at `/`."""
    max_batch: int = 16
    """Maximum number of running requests."""
    max_waiting: int = 64
    """Maximum number of waiting requests; above it, requests are rejected with status 429."""
    deadline_s: float = 600.0
    """Maximum time from the arrival of a request to its last token."""
    header_timeout_s: float = 10.0
    """Maximum time for the headers of a request; the connection is closed then."""
    max_bodies_bytes: int = 256 * 2**20
    """Maximum size of the bodies of requests in progress together; above it, status 429."""
    root_path: str = ""
    """Path prefix under which a proxy serves the server, such as `/models/tita`."""
    grace_s: float = 120.0
    """Time for running requests to finish after SIGTERM."""
    log_prompts: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.engine_name == "vllm":
            engine, usual = self.engine, DEFAULT_ENGINE_OPTIONS
            kept = engine.prefix_cache_bytes not in (0, usual.prefix_cache_bytes)
            given = {
                "--max-draft-rows": engine.max_draft_rows > 1,
                "--pack": engine.pack,
                "--prefix-cache-mib": kept,
            }
            option = next((name for name, value in given.items() if value), None)
            if option is not None:
                raise TitaError(f"{option} with --engine vllm", remedy="leave it out")
        for origin in self.allow_origins:
            if not _ORIGIN.fullmatch(origin):
                raise TitaError(
                    f"{origin!r} is not the origin of a web page",
                    remedy="give --allow-origin as https://example.org, without a slash at the end",
                )
        if self.root_path and not _ROOT_PATH.fullmatch(self.root_path):
            raise TitaError(
                f"root path {self.root_path!r} is not a path prefix",
                remedy="give it as /models/tita, without a slash at the end",
            )

    @property
    def base_name(self) -> str:
        return f"{self.name}:base"

    @property
    def num_places(self) -> int:
        """Maximum number of running and waiting requests together."""
        return self.max_batch + self.max_waiting
