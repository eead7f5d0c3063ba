"""The reward model: loading it for training, its LoRA adapters, and saving it."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.integrations import unset_hf_deepspeed_config

from tita.errors import TitaError
from tita.recipes import TrainRecipe
from tita.storage.files import atomic_path
from tita.train.group import on_all_ranks
from tita.vlm.images import Aspect, write_aspect
from tita.vlm.loading import load_weights, translate_load_errors

_VISION_TOWERS = ("vision_tower", "vision_model", "high_res_vision_model", "visual")


def load_model(recipe: TrainRecipe, *, start: str) -> Any:
    """The model to train, on the CPU; under ZeRO-3 only this rank's shard of it.

    With `quantization` it is on this rank's GPU, where its weights are packed while they load.

    Raises:
        TitaError: transformers cannot load it, or it lacks the vision tower to freeze.
    """
    with translate_load_errors(recipe.model):
        model = load_weights(
            start,
            where=recipe.model,
            dtype=getattr(torch, recipe.dtype),
            attn_implementation=recipe.attention,
            **_quantization_options(recipe, start=start),
        )
    return _freeze(model, recipe=recipe)


def _quantization_options(recipe: TrainRecipe, *, start: str) -> dict[str, Any]:
    if recipe.quantization is None:
        return {}
    # QLoRA's settings (arXiv 2305.14314, section 3).
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, recipe.dtype),
        llm_int8_skip_modules=unquantized_modules(start),
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def unquantized_modules(start: str) -> list[str]:
    """Names of the modules that keep their dtype with `quantization`.

    All but the language model's layers: the vision tower sees less if it is quantized, and TRL
    multiplies by the head's weight directly.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(start))
    language_model = model.get_decoder()
    names = [
        f"model.{name}"
        for name, module in model.model.named_children()
        if module is not language_model
    ]
    return [*names, "lm_head"]


def meta_model(recipe: TrainRecipe, *, start: str) -> Any:
    """The model to train without its weights, on torch's meta device, with its adapters."""
    with translate_load_errors(recipe.model), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(start))
        model = _freeze(model, recipe=recipe)
        lora = lora_config(recipe)
        return model if lora is None else get_peft_model(model, lora)


def lora_config(recipe: TrainRecipe) -> LoraConfig | None:
    """The recipe's LoRA configuration; None for full fine-tuning."""
    if recipe.lora is None:
        return None
    modules = recipe.lora.target_modules
    return LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        # Otherwise peft adapts the linear layers of the frozen vision tower too.
        exclude_modules=rf".*\b({'|'.join(_VISION_TOWERS)})\..*" if recipe.freeze_vision else None,
    )


def _freeze(model: Any, *, recipe: TrainRecipe) -> Any:
    if not recipe.freeze_vision:
        return model
    towers = [m for name, m in model.named_modules() if name.rpartition(".")[2] in _VISION_TOWERS]
    if not towers:
        raise TitaError(
            "no vision tower found in the model",
            where=recipe.model,
            remedy="--set freeze_vision=false",
        )
    for tower in towers:
        tower.requires_grad_(False)
    return model


def save_weights(trainer: Any, folder: Path) -> None:
    """Save what is trained, the model or its adapter, gathered under ZeRO-3; every rank calls this.

    The folder is removed first.
    """
    on_all_ranks(lambda: shutil.rmtree(folder, True) if trainer.is_world_process_zero() else None)
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        # Pickled, with paths of this machine: it would differ between equal runs.
        (folder / "training_args.bin").unlink(missing_ok=True)


def save_model(
    trainer: Any, *, start: str, into: Path, name: str, kept: Path | None = None
) -> None:
    """Save weights for `from_pretrained`: gathered under ZeRO-3, and with LoRA merged.

    Every rank calls this. With LoRA, the adapter is saved too, in `adapter/` next to the model.

    Args:
        trainer: that trained the model.
        start: local path of the model that training started from.
        into: a folder.
        name: of the starting model on any machine: a hub name, or a tree in the store.
        kept: the folder of `save_weights` to use instead of the trainer's weights, on rank 0.
    """
    uses_lora = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    folder = into.with_name("adapter") if uses_lora else into
    if kept is None:
        save_weights(trainer, folder)
    elif trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)
        kept.rename(folder)
    if not uses_lora:
        return

    def merge() -> None:
        if trainer.is_world_process_zero():
            # While this is set, ZeRO-3 would shard this model too.
            unset_hf_deepspeed_config()
            full = AutoModelForImageTextToText.from_pretrained(start, dtype=trainer.model.dtype)
            merged = PeftModel.from_pretrained(full, str(folder)).merge_and_unload()
            merged.save_pretrained(str(into))
            # peft saved the local path of the starting model.
            config = folder / "adapter_config.json"
            fields = json.loads(config.read_text()) | {"base_model_name_or_path": name}
            # A new file: a checkpoint that is being uploaded may have a hard link to the old one.
            with atomic_path(config) as temporary:
                temporary.write_text(json.dumps(fields, indent=2, sort_keys=True))
            (folder / "README.md").unlink(missing_ok=True)

    on_all_ranks(merge)


def save_processor(processor: Any, *, image_aspect: Aspect, into: Path) -> None:
    """Save the processor and the aspect ratio next to the model, so that inference uses both."""
    processor.save_pretrained(str(into))
    write_aspect(into, image_aspect)
