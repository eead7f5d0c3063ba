"""Vision-language models: loading them, and preparing questions and images for each."""

from tita.vlm.images import open_image, pad_to_square
from tita.vlm.loading import (
    VLM,
    hush_transformers,
    load_vlm,
    locate_model,
    model_digest,
    telling_load_errors,
)
from tita.vlm.prompts import Prompt, prepare, prompt_text

__all__ = [
    "VLM",
    "Prompt",
    "hush_transformers",
    "load_vlm",
    "locate_model",
    "model_digest",
    "open_image",
    "pad_to_square",
    "prepare",
    "prompt_text",
    "telling_load_errors",
]
