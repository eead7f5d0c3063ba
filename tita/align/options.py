"""How an engine decodes, whoever uses it; what one answer is asked for stands in its `Request`."""

from dataclasses import dataclass

from tita.align.guidance import check_form
from tita.errors import TitaError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What the same models can be made to do differently.

    Raises:
        TitaError: there is no such form, or a number means nothing.
    """

    form: str = "tita"
    """A key of `guidance.FORMS`, for requests that name none."""
    prefill_tokens: int = 8192
    """Prompt tokens taken in at once at most; fewer where running answers would wait for long."""
    prefix_cache_bytes: int = 0
    """Room for the KV of images, for the next question about the same one; 0 keeps none."""
    max_prompt_tokens: int | None = None
    """Longest prompt taken, image tokens included; the models' context if not given."""
    max_drafts: int = 8
    """Tokens drafted at once, where that pays; 0 keeps the models in lockstep."""
    pack: bool | None = None
    """Lay linear layers of float32 models on a CPU out as its kernels read them fastest
    (`tita.align.packing`); if not given, those of models too large for a processor's cache."""

    def __post_init__(self) -> None:
        check_form(self.form)
        for name in ("prefix_cache_bytes", "max_drafts"):
            if getattr(self, name) < 0:
                raise TitaError(f"{name} is {getattr(self, name)}", remedy="give 0 or more")
        if self.prefill_tokens < 1:
            raise TitaError(f"prefill_tokens is {self.prefill_tokens}", remedy="give 1 or more")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise TitaError(
                f"max_prompt_tokens is {self.max_prompt_tokens}", remedy="give 1 or more"
            )
