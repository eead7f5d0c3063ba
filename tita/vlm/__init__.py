"""Vision-language models: loading, prompts, images and model inputs.

Importing this package loads no torch; the names in `_LAZY` load it at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tita.vlm.images import (
    Aspect,
    Picture,
    aspect_of,
    decode_image,
    open_image,
    pad_to_square,
    write_aspect,
)
from tita.vlm.prompts import BadConversation, Prompt, Turn, adds_special_tokens, prompt_text

if TYPE_CHECKING:
    from tita.vlm.inputs import Inputs, prepare, prepare_alike, prepare_each
    from tita.vlm.loading import (
        VLM,
        Models,
        load_vlm,
        locate_model,
        model_digest,
        silence_transformers,
        translate_load_errors,
    )
    from tita.vlm.processors import load_processor

__all__ = [
    "VLM",
    "Aspect",
    "BadConversation",
    "Inputs",
    "Models",
    "Picture",
    "Prompt",
    "Turn",
    "adds_special_tokens",
    "aspect_of",
    "decode_image",
    "load_processor",
    "load_vlm",
    "locate_model",
    "model_digest",
    "open_image",
    "pad_to_square",
    "prepare",
    "prepare_alike",
    "prepare_each",
    "prompt_text",
    "silence_transformers",
    "translate_load_errors",
    "write_aspect",
]

_LAZY = {
    **dict.fromkeys(("Inputs", "prepare", "prepare_alike", "prepare_each"), "inputs"),
    **dict.fromkeys(
        (
            "VLM",
            "Models",
            "load_vlm",
            "locate_model",
            "model_digest",
            "silence_transformers",
            "translate_load_errors",
        ),
        "loading",
    ),
    "load_processor": "processors",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"tita.vlm.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
