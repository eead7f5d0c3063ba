"""The reward model at the start: loaded, or only its shape, with what is trained of it."""

from typing import Any

from tita.errors import TitaError
from tita.recipes import TrainRecipe
from tita.vlm import telling_load_errors

_VISION = ("vision_tower", "vision_model", "visual")


def load_model(recipe: TrainRecipe, *, start: str) -> Any:
    """The model to train, on the CPU; under ZeRO-3 this rank's part of it.

    Raises:
        TitaError: not a model that transformers can load, or without the part that is to be frozen.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    with telling_load_errors(recipe.model):
        model = AutoModelForImageTextToText.from_pretrained(
            start, dtype=getattr(torch, recipe.dtype), attn_implementation=recipe.attention
        )
    return _frozen(model, recipe=recipe)


def shape_of(recipe: TrainRecipe, *, start: str) -> Any:
    """The model to train without its weights, on torch's meta device; LoRA included."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForImageTextToText

    with telling_load_errors(recipe.model), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(start))
        model = _frozen(model, recipe=recipe)
        lora = lora_of(recipe)
        return model if lora is None else get_peft_model(model, lora)


def lora_of(recipe: TrainRecipe) -> Any:
    """The recipe's `LoraConfig`, None for full fine-tuning."""
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    modules = recipe.lora.target_modules
    return LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        # peft would adapt the frozen tower's layers too: they are linear like any others.
        exclude_modules=rf".*\b({'|'.join(_VISION)})\..*" if recipe.freeze_vision else None,
    )


def _frozen(model: Any, *, recipe: TrainRecipe) -> Any:
    if not recipe.freeze_vision:
        return model
    towers = [m for name, m in model.named_modules() if name.rpartition(".")[2] in _VISION]
    if not towers:
        raise TitaError(
            "no vision tower found in it", where=recipe.model, remedy="--set freeze_vision=false"
        )
    for tower in towers:
        tower.requires_grad_(False)
    return model
