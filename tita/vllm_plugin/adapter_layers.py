"""Names of the layers that LoRA adapters change, in vLLM's combined model.

vLLM applies one adapter per request, to the modules that `get_mm_mapping` of the model names. Those
of the combined model are modules of the steering model that has adapters, so base and other models
stay as they are.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from vllm.model_executor.models.utils import WeightsMapper


def steering_name(number: int) -> str:
    """Name of a steering model's module. It has no dot, and a reward model's name may."""
    return f"steering{number}"


def adapter_mapper(vllm_class: Any, module: str) -> WeightsMapper:
    """From transformers' names of layers to those of vLLM below a module of the combined model."""
    known: WeightsMapper = vllm_class.hf_to_vllm_mapper.get_rename_mapper()
    prefixes = {old: f"{module}.{new}" for old, new in known.orig_to_new_prefix.items()}
    return dataclasses.replace(known, orig_to_new_prefix=prefixes)


def adapted_layers(paths: Iterable[str], *, vllm_class: Any, module: str) -> dict[str, str]:
    """vLLM's names of layers by transformers' names; those that it packs into one have one name.

    Args:
        paths: transformers' names.
        vllm_class: of the model.
        module: its name in the combined model.
    """
    mapper = adapter_mapper(vllm_class, module)
    found = {}
    for path in paths:
        name = str(mapper.map_name(path))
        parent, _, leaf = name.rpartition(".")
        found[path] = f"{parent}.{_PACKED.get(leaf, leaf)}"
    return found


_PACKED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Layers that the language models of all families have as one in vLLM."""
