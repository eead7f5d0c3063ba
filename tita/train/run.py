"""What all parts of one training run share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita.gang import num_cpus
from tita.jobspec import deepspeed_config
from tita.recipes import TrainRecipe
from tita.settings import settings
from tita.storage import Store
from tita.train.checkpoints import Checkpoints
from tita.train.group import local_world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every part of a run needs to know of it; the warm-up is a part with own folders."""

    recipe: TrainRecipe
    name: str
    out: str
    """Where in the store its folder goes."""
    folder: Path
    """Where it works, on this node's disk."""
    store: Store

    @property
    def meta(self) -> dict[str, Any]:
        """What the manifest says of the run's folder."""
        return {
            "job": "train-dpo",
            "run": self.name,
            "recipe": self.recipe.model_dump(mode="json"),
        }

    def checkpoints(self) -> Checkpoints:
        """Those below `out`."""
        here = settings()
        meta = {
            "recipe": self.recipe.model_dump(mode="json"),
            "processes": here.num_nodes * here.procs_per_node,
        }
        return Checkpoints(
            store=self.store, out=self.out, node=here.node_rank, num_nodes=here.num_nodes, meta=meta
        )


def dpo_options(recipe: TrainRecipe, *, folder: Path, on_gpu: bool) -> dict[str, Any]:
    """The keyword arguments of TRL's `DPOConfig`; `folder` is where the trainer writes."""
    nll = recipe.nll_weight
    return _shared(recipe, folder=folder, on_gpu=on_gpu) | {
        "beta": recipe.beta,
        "loss_type": ["sigmoid", "sft"] if nll else ["sigmoid"],
        "loss_weights": [1.0, nll] if nll else None,
        "learning_rate": recipe.learning_rate,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        "precompute_ref_log_probs": True,
    }


def sft_options(recipe: TrainRecipe, *, folder: Path, on_gpu: bool) -> dict[str, Any]:
    """The keyword arguments of TRL's `SFTConfig` for the warm-up."""
    assert recipe.sft is not None
    return _shared(recipe, folder=folder, on_gpu=on_gpu) | {
        "learning_rate": recipe.sft.learning_rate,
        "max_steps": recipe.sft.steps,
        # Our collator makes the labels.
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def _shared(recipe: TrainRecipe, *, folder: Path, on_gpu: bool) -> dict[str, Any]:
    # A GPU should not wait for images; without one, workers would take cores from the training.
    workers = min(4, max(1, num_cpus() // local_world_size() - 1)) if on_gpu else 0
    return {
        "output_dir": str(folder),
        "deepspeed": _deepspeed(recipe, on_gpu=on_gpu),
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup_ratio,
        "weight_decay": recipe.weight_decay,
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
        # Its files are made of the progress lines, which a run that was interrupted keeps.
        "report_to": "none",
        "seed": recipe.seed,
        "use_cpu": not on_gpu,
        "remove_unused_columns": False,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
    }


def _deepspeed(recipe: TrainRecipe, *, on_gpu: bool) -> dict[str, Any]:
    config = deepspeed_config(recipe.deepspeed)
    if not on_gpu:
        # Without a GPU there is nothing to offload from, and DeepSpeed's own CPU Adam would be
        # compiled for minutes on first use: torch's does the same.
        config["zero_force_ds_cpu_optimizer"] = False
    return config
