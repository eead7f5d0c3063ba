"""Vision-language models: loading them, and preparing questions and images for each."""

from tita.vlm.aspect import Aspect, aspect_of, write_aspect
from tita.vlm.images import Picture, decoded, open_image, pad_to_square
from tita.vlm.loading import (
    VLM,
    hush_transformers,
    load_vlm,
    locate_model,
    model_digest,
    telling_load_errors,
)
from tita.vlm.processors import load_processor
from tita.vlm.prompts import (
    BadConversation,
    Inputs,
    Prompt,
    Turn,
    adds_special_tokens,
    prepare,
    prepare_alike,
    prepare_each,
    prompt_text,
)

__all__ = [
    "VLM",
    "Aspect",
    "BadConversation",
    "Inputs",
    "Picture",
    "Prompt",
    "Turn",
    "adds_special_tokens",
    "aspect_of",
    "decoded",
    "hush_transformers",
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
    "telling_load_errors",
    "write_aspect",
]
