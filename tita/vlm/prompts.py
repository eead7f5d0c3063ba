"""Preparing questions: each model has its own chat template, image tokens and image processor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tita.errors import TitaError
from tita.vlm.images import pad_to_square

if TYPE_CHECKING:
    from PIL.Image import Image

    from tita.vlm.loading import VLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question as it came, before any model's template: the same for base and reward."""

    text: str
    images: "tuple[Image, ...]" = ()


def conversation(prompt: Prompt) -> list[dict[str, Any]]:
    """The prompt as one user turn in transformers' chat format, images first."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in prompt.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt.text}]}]


def prompt_text(processor: Any, prompt: Prompt, *, where: str = "model") -> str:
    """The prompt in the model's chat template, up to where its answer begins.

    Raises:
        TitaError: the processor has no chat template.
    """
    try:
        text: str = processor.apply_chat_template(
            conversation(prompt), add_generation_prompt=True, tokenize=False
        )
    except ValueError as error:
        raise TitaError(
            "has no chat template", where=where, remedy="save chat_template.jinja beside the model"
        ) from error
    return text


def prepare(vlm: "VLM", prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Model inputs for a batch of prompts, padded on the left.

    Returns:
        `input_ids[B, L]`, `attention_mask[B, L]`, and the model's image tensors, on its device.
    """
    texts = [prompt_text(vlm.processor, prompt, where=vlm.name) for prompt in prompts]
    images = [[_aspect(vlm, image) for image in prompt.images] for prompt in prompts]
    inputs = vlm.processor(
        text=texts,
        images=images if any(images) else None,
        # The template has put the beginning-of-text token where the model wants it.
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return dict(inputs.to(vlm.device))


def _aspect(vlm: "VLM", image: "Image") -> "Image":
    return pad_to_square(image) if vlm.image_aspect == "pad" else image
