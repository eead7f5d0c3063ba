"""The model families that the plugin supports, and vLLM's config overrides for a pair of models.

Imports neither vLLM nor torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from tita.errors import TitaError

STEERING_MARK = ":"
"""Between a steering model's name and that of an image tensor that it reads instead of the base's.
"""
Split = Literal["image", "patches", "tiles"]
"""How a processor's tensor is split by images: along its first dimension, by their patches, or by
their tiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of vision-language models."""

    architecture: str
    """As in `architectures` of config.json."""
    module: str
    """Of vLLM's class, below `vllm.model_executor.models`."""
    vllm_class: str
    """Name of vLLM's class."""
    tensors: Mapping[str, Split]
    """Image tensors of the processor that the model reads."""
    num_tiles: str = ""
    """Tensor with the number of tiles of each image, which the processor does not give."""
    image_token: str = ""
    """Tensor with the token that stands for images, which the processor does not give."""
    tokens_by_size: bool = False
    """Whether images of one prompt have numbers of tokens that depend on their sizes."""
    flat_tower: bool = False
    """Whether transformers writes the weights of the vision tower without `vision_model.`, which
    vLLM expects."""
    mrope: bool = False
    """Whether tokens have positions of several dimensions (M-RoPE)."""


def _family(
    architecture: str,
    module: str,
    *,
    vllm_class: str = "",
    num_tiles: str = "",
    image_token: str = "",
    tokens_by_size: bool = False,
    flat_tower: bool = False,
    mrope: bool = False,
    **tensors: Split,
) -> Family:
    return Family(
        architecture=architecture,
        module=module,
        vllm_class=vllm_class or architecture,
        tensors=MappingProxyType(tensors),
        num_tiles=num_tiles,
        image_token=image_token,
        tokens_by_size=tokens_by_size,
        flat_tower=flat_tower,
        mrope=mrope,
    )


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.architecture: family
        for family in (
            _family(
                "LlavaForConditionalGeneration", "llava", flat_tower=True, pixel_values="image"
            ),
            _family(
                "LlavaNextForConditionalGeneration",
                "llava_next",
                tokens_by_size=True,
                flat_tower=True,
                pixel_values="image",
                image_sizes="image",
            ),
            _family(
                "LlavaOnevisionForConditionalGeneration",
                "llava_onevision",
                flat_tower=True,
                pixel_values="image",
                image_sizes="image",
            ),
            _family(
                "Qwen2_5_VLForConditionalGeneration",
                "qwen2_5_vl",
                mrope=True,
                pixel_values="patches",
                image_grid_thw="image",
            ),
            _family(
                "Qwen2VLForConditionalGeneration",
                "qwen2_vl",
                mrope=True,
                pixel_values="patches",
                image_grid_thw="image",
            ),
            _family(
                "Qwen3VLForConditionalGeneration",
                "qwen3_vl",
                mrope=True,
                pixel_values="patches",
                image_grid_thw="image",
            ),
            _family(
                "InternVLForConditionalGeneration",
                "interns1",
                vllm_class="InternS1ForConditionalGeneration",
                num_tiles="image_num_patches",
                image_token="image_token_id",
                pixel_values="tiles",
            ),
        )
    }
)
"""By architecture. `tests/vllm` compares each with the transformers engine token for token."""


def guided_name(family: Family) -> str:
    """The combined model's name in vLLM's registry."""
    return f"TitaGuided{family.architecture}"


def plain_name(family: Family) -> str:
    """Name in vLLM's registry of one model alone, loadable as transformers 5 saves it."""
    return f"TitaPlain{family.architecture}"


def draft_name(family: Family) -> str:
    """Name in vLLM's registry of a reward model that drafts for the combined model."""
    return f"TitaDraft{family.architecture}"


def family_of(config: Any, *, where: str) -> Family:
    """The family of a model's configuration.

    Args:
        config: a transformers config.
        where: the model's name for errors.

    Raises:
        TitaError: the vLLM engine does not support it.
    """
    names = getattr(config, "architectures", None) or ["an architecture without a name"]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise TitaError(
        f"engine vllm does not support {names[0]}",
        where=where,
        remedy=f"choose --engine transformers; engine vllm has {', '.join(FAMILIES)}",
    )


def config_overrides(
    configs: Mapping[str, Any],
    paths: Mapping[str, str],
    *,
    names: Mapping[str, str],
    adapters: Sequence[str] = (),
) -> dict[str, Any]:
    """What vLLM's `hf_overrides` must be, so that it loads the combined model.

    Args:
        configs: transformers configs by role; `base` always.
        paths: folder or hub name by role.
        names: of the models by role, for errors.
        adapters: roles of LoRA adapters; the first is that of their model in `paths`.

    Raises:
        TitaError: a model is not supported, or the models are of different families.
    """
    families = {role: family_of(config, where=names[role]) for role, config in configs.items()}
    base = families["base"]
    for role, family in families.items():
        if family != base:
            raise TitaError(
                f"the {role} model is a {family.architecture}, the base model a "
                f"{base.architecture}; engine vllm needs models of one architecture",
                where=names[role],
                remedy="choose --engine transformers, or a reward model of the base's architecture",
            )
    # vLLM takes the width of its buffer of embeddings from `projection_dim` (for embedding models,
    # which project them), and of nothing else: embeddings of all models lie side by side.
    widths = [config.get_text_config().hidden_size for config in configs.values()]
    text = {"projection_dim": sum(widths)}
    nested = configs["base"].get_text_config() is not configs["base"]
    return {
        "architectures": [guided_name(base)],
        "tita_models": {role: path for role, path in paths.items() if role != "base"},
        "tita_adapters": list(adapters),
        **({"text_config": text} if nested else text),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOverrides:
    """vLLM's `hf_overrides` if a reward model drafts.

    vLLM applies a callable to the configurations of both the combined model and the draft model.
    """

    combined: Mapping[str, Any]
    """As of `config_overrides`."""
    drafter: str
    """Folder or hub name of the draft model, which is not that of the base."""
    draft_class: str
    """The draft model's name in vLLM's registry."""

    def __call__(self, config: Any) -> Any:
        if config.name_or_path == self.drafter:
            config.architectures = [self.draft_class]
            return config
        for name, value in self.combined.items():
            nested = getattr(config, name, None)
            if isinstance(value, dict) and nested is not None:
                nested.update(value)
            else:
                setattr(config, name, value)
        return config
