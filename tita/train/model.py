"""The reward model at the start: loaded, or only its shape, with what is trained of it."""

import json
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.recipes import TrainRecipe
from tita.train.group import together
from tita.vlm import Aspect, telling_load_errors, write_aspect

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


def save_model(trainer: Any, *, start: str, into: Path, name: str) -> None:
    """Write weights that `from_pretrained` loads, whole under ZeRO-3 and with LoRA merged.

    Every rank calls this. Beside a merged model its adapter stays in `adapter/`.

    Args:
        trainer: has trained it.
        start: where the model lies here that the training started from.
        into: a folder.
        name: what that model is called elsewhere: a hub name, or a tree in the store.
    """
    from peft import PeftModel

    if not isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel):
        trainer.save_model(str(into))
        _leave_out_arguments(trainer, into)
        return
    adapter = into.with_name("adapter")
    trainer.save_model(str(adapter))
    _leave_out_arguments(trainer, adapter)

    def merge() -> None:
        if trainer.is_world_process_zero():
            _merge(adapter, start=start, into=into, dtype=trainer.model.dtype)
            _name_base(adapter, name)

    together(merge)


def save_preparation(processor: Any, *, image_aspect: Aspect, into: Path) -> None:
    """Write beside a saved model how it was shown prompts and images, so that inference does so."""
    processor.save_pretrained(str(into))
    write_aspect(into, image_aspect)


def _leave_out_arguments(trainer: Any, folder: Path) -> None:
    """Drop what differs from run to run of the same training: paths of this machine, pickled."""
    if trainer.is_world_process_zero():
        (folder / "training_args.bin").unlink(missing_ok=True)


def _name_base(adapter: Path, name: str) -> None:
    """Say what the adapter is for: peft has written down a path of this machine."""
    (adapter / "README.md").unlink(missing_ok=True)
    config = adapter / "adapter_config.json"
    told = json.loads(config.read_text()) | {"base_model_name_or_path": name}
    config.write_text(json.dumps(told, indent=2, sort_keys=True))


def _merge(adapter: Path, *, start: str, into: Path, dtype: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText
    from transformers.integrations import unset_hf_deepspeed_config

    # While it is set, ZeRO-3 would share this model out among the ranks too.
    unset_hf_deepspeed_config()
    whole = AutoModelForImageTextToText.from_pretrained(start, dtype=dtype)
    PeftModel.from_pretrained(whole, str(adapter)).merge_and_unload().save_pretrained(str(into))
