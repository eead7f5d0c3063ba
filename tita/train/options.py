"""The recipe in the words of the libraries that train: TRL, DeepSpeed, peft."""

from pathlib import Path
from typing import Any

from tita.jobspec import deepspeed_config
from tita.recipes import TrainRecipe


def options_of(recipe: TrainRecipe, *, folder: Path, on_gpu: bool) -> dict[str, Any]:
    """The keyword arguments of TRL's `DPOConfig`; `folder` is where the trainer writes."""
    nll = recipe.nll_weight
    return {
        "output_dir": str(folder),
        "deepspeed": _deepspeed(recipe, on_gpu=on_gpu),
        "beta": recipe.beta,
        "loss_type": ["sigmoid", "sft"] if nll else ["sigmoid"],
        "loss_weights": [1.0, nll] if nll else None,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup_ratio,
        "weight_decay": recipe.weight_decay,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        # Checked beforehand: TRL would cut, and could cut image tokens.
        "max_length": None,
        "bf16": recipe.dtype == "bfloat16",
        "fp16": recipe.dtype == "float16",
        "activation_checkpointing": recipe.gradient_checkpointing,
        "logging_steps": recipe.logging_steps,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "precompute_ref_log_probs": True,
        "report_to": "tensorboard",
        "seed": recipe.seed,
        "use_cpu": not on_gpu,
        "remove_unused_columns": False,
        "dataloader_num_workers": 2 if on_gpu else 0,
    }


def _deepspeed(recipe: TrainRecipe, *, on_gpu: bool) -> dict[str, Any]:
    config = deepspeed_config(recipe.deepspeed)
    if not on_gpu:
        # Without a GPU there is nothing to offload from, and DeepSpeed's own CPU Adam would be
        # compiled for minutes on first use: torch's does the same.
        config["zero_force_ds_cpu_optimizer"] = False
    return config


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
    )
