"""A model without its weights: what preparing prompts and matching vocabularies need of it.

vLLM loads the weights in its own processes; this one only runs processors and tokenizers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from tita.recipes import ImageAspect
from tita.storage import Store
from tita.storage.locate import explicit_path
from tita.vlm.images import aspect_of
from tita.vlm.loading import (
    VLM,
    Models,
    locate_model,
    silence_transformers,
    translate_load_errors,
)
from tita.vlm.processors import load_processor


@dataclass(frozen=True, slots=True)
class _Embeddings:
    weight: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ModelOutline:
    """Stands for a transformers model wherever only its settings are read."""

    config: Any
    generation_config: Any

    def get_input_embeddings(self) -> _Embeddings:
        """An empty embedding for each token: of the right number, on the CPU."""
        return _Embeddings(torch.empty(self.config.get_text_config().vocab_size, 0))

    def get_submodule(self, path: str) -> torch.nn.Module:
        """A layer without weights: its shape is compared with that of an adapter."""
        found: torch.nn.Module = self._without_weights.get_submodule(path)
        return found

    @cached_property
    def _without_weights(self) -> Any:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(self.config)


def load_outline(
    where: str | Path, *, store: Store | None = None, image_aspect: ImageAspect = "auto"
) -> VLM:
    """Settings and processor of a model; arguments as of `tita.vlm.loading.load_vlm`.

    Raises:
        TitaError: there is nothing at `where`, or transformers cannot load it.
    """
    silence_transformers()
    where = explicit_path(where)
    source = locate_model(where, store=store)
    with translate_load_errors(where):
        processor = load_processor(source, where=where)
        config = AutoConfig.from_pretrained(source)
        try:
            generation = GenerationConfig.from_pretrained(source)
        except OSError:
            generation = GenerationConfig.from_model_config(config)
    outline = ModelOutline(config=config, generation_config=generation)
    aspect = aspect_of(config, wanted=image_aspect)
    return VLM(name=where, model=outline, processor=processor, image_aspect=aspect)


def saved_dtype(config: Any) -> str:
    """The dtype in which a checkpoint is saved."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return str(found or "float32").removeprefix("torch.")


def models_of(vlms: Mapping[str, VLM]) -> Models:
    """Models by role; roles other than `base`, `reward` and `reference` name reward models."""
    known = ("base", "reward", "reference")
    more = {role: vlm for role, vlm in vlms.items() if role not in known}
    return Models(vlms["base"], vlms.get("reward"), vlms.get("reference"), more=more)
