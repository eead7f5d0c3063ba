"""How a model is shown images that are not square: with bars to make them so, or as they are."""

import json
from pathlib import Path
from typing import Any, Literal

from tita.recipes import ImageAspect

Aspect = Literal["pad", "keep"]

_KEY = "image_aspect_ratio"
"""Of `config.json`, as LLaVA's own checkpoints have it (`llava/train/train.py`)."""
_LLAVAS_WORDS: dict[Aspect, str] = {"pad": "pad", "keep": "square"}


def aspect_of(config: Any, *, wanted: ImageAspect = "auto") -> Aspect:
    """How images are shown to the model of this configuration.

    `auto` is as its checkpoint says it was trained. Where that says nothing, LLaVA-1.5 and what was
    trained as it was (type `llava` with CLIP for its tower, BakLLaVA too) get bars; other families'
    processors keep or tile what they are given, and so does a `llava` with another tower (Pixtral).
    """
    if wanted != "auto":
        return wanted
    for aspect, word in _LLAVAS_WORDS.items():
        if getattr(config, _KEY, None) == word:
            return aspect
    padded = config.model_type == "llava" and config.vision_config.model_type == "clip_vision_model"
    return "pad" if padded else "keep"


def write_aspect(folder: Path, aspect: Aspect) -> None:
    """Have a saved model say how it was shown images, wherever its folder goes."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {_KEY: _LLAVAS_WORDS[aspect]}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
