"""Vision-language models: loading, prompts, images and model inputs.

Importing this package loads no torch; models, processors and inputs load it at first use.
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


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("loading", "processors", "inputs"):
            found = import_module(f"tita.vlm.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
