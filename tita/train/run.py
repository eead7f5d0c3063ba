"""What all parts of one run share, and the recipe as arguments of TRL and DeepSpeed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tita.errors import TitaError
from tita.gang import num_cpus
from tita.jobspec import deepspeed_config
from tita.recipes import Tracker, TrainRecipe
from tita.settings import settings
from tita.storage import Store
from tita.train.checkpoints import Checkpoints
from tita.train.group import local_world_size
from tita.train.training_data import input_places

CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(TrainingArguments, "activation_checkpointing")
    else "gradient_checkpointing"
)
"""The name of gradient checkpointing in transformers, which has changed since 5.19."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRun:
    """One training run; the warm-up is a stage of it with its own folders."""

    recipe: TrainRecipe
    name: str
    out: str
    """Destination of its folder in the store."""
    folder: Path
    """Working folder on this node's disk."""
    store: Store
    data: Mapping[str, str] = field(default_factory=dict)
    """What identifies the data, as of `data_identity`."""

    def warm_up_stage(self) -> "TrainRun":
        """The warm-up of this run."""
        return replace(self, out=f"{self.out}/warm-up", folder=self.folder / "warm-up")

    def checkpoints(self) -> Checkpoints:
        """The checkpoints below `out`."""
        environment = settings()
        processes = environment.num_nodes * environment.procs_per_node
        return Checkpoints(
            store=self.store,
            out=self.out,
            node=environment.node_rank,
            num_nodes=environment.num_nodes,
            meta={
                "recipe": self.recipe.model_dump(mode="json"),
                "processes": processes,
                "data": dict(self.data),
            },
            is_same_run=lambda meta: (
                meta.get("processes") == processes
                and self.recipe.is_equivalent_to(meta.get("recipe"))
            ),
        )

    def check_data(self) -> None:
        """Check that the checkpoint from which this run would resume is of the same data.

        Over other rows the rest of its epoch would repeat some and leave out others.

        Raises:
            TitaError: it is of other data. It stays in the store.
        """
        saved = self.checkpoints().newest()
        recorded = {} if saved is None else saved.get("data", {})
        # Earlier versions of tita record no data.
        if saved is None or recorded.get("version") != self.data.get("version"):
            return
        places = input_places(self.recipe)
        changed = [name for name in places if recorded.get(name) != self.data.get(name)]
        if len(changed) > 1 and "images" in changed:
            # Those that the rows name, which may be others only because the rows are.
            changed.remove("images")
        if changed:
            named = ", ".join(f"{name} ({places[name]})" for name in changed)
            raise TitaError(
                f"inputs have changed since checkpoint {saved['step']} was saved: {named}",
                where=self.out,
                remedy="put the former content back there to resume, or choose another run name to "
                "train on the new",
            )


def dpo_options(
    recipe: TrainRecipe, *, folder: Path, on_gpu: bool, trackers: Sequence[Tracker] = ()
) -> dict[str, Any]:
    """Arguments of TRL's `DPOConfig`.

    Args:
        recipe: of the run.
        folder: the trainer's output directory.
        on_gpu: whether the run is on GPUs.
        trackers: that are open.
    """
    losses = dict(recipe.loss) | ({"sft": recipe.nll_weight} if recipe.nll_weight else {})
    alpha = recipe.f_alpha_divergence_coef
    return _common_options(recipe, folder=folder, on_gpu=on_gpu) | {
        "beta": recipe.beta,
        "loss_type": list(losses),
        "loss_weights": list(losses.values()),
        "label_smoothing": recipe.label_smoothing,
        "ld_alpha": recipe.ld_alpha,
        "f_divergence_type": recipe.f_divergence,
        **({} if alpha is None else {"f_alpha_divergence_coef": alpha}),
        "learning_rate": recipe.learning_rate,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        # `write_history` also writes TensorBoard files, from progress lines that survive a restart.
        "report_to": list(trackers) or "none",
        "precompute_ref_log_probs": True,
        **_evaluation_options(recipe),
    }


def _evaluation_options(recipe: TrainRecipe) -> dict[str, Any]:
    if recipe.validation is None:
        return {}
    return {
        "eval_strategy": "steps",
        "eval_steps": recipe.eval_steps,
        # Twice the sequences of a training step, without their activations.
        "per_device_eval_batch_size": recipe.batch_size,
    }


def sft_options(recipe: TrainRecipe, *, folder: Path, on_gpu: bool) -> dict[str, Any]:
    """Arguments of TRL's `SFTConfig` for the warm-up."""
    assert recipe.sft is not None
    return _common_options(recipe, folder=folder, on_gpu=on_gpu) | {
        "learning_rate": recipe.sft.learning_rate,
        "max_steps": recipe.sft.steps,
        # `AnswerCollator` makes the labels.
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def _common_options(recipe: TrainRecipe, *, folder: Path, on_gpu: bool) -> dict[str, Any]:
    # Workers keep a GPU from waiting for images; on the CPU they would compete with training.
    workers = min(4, max(1, num_cpus() // local_world_size() - 1)) if on_gpu else 0
    deepspeed = deepspeed_config(recipe.deepspeed)
    if not on_gpu:
        # DeepSpeed's CPU Adam compiles for minutes on first use; torch's is equivalent here.
        deepspeed["zero_force_ds_cpu_optimizer"] = False
    return {
        "output_dir": str(folder),
        "deepspeed": deepspeed,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup_ratio,
        "weight_decay": recipe.weight_decay,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        # Preflight checks lengths; TRL would truncate, and might cut image tokens.
        "max_length": None,
        "bf16": recipe.dtype == "bfloat16",
        "fp16": recipe.dtype == "float16",
        CHECKPOINTING: recipe.gradient_checkpointing,
        "logging_steps": recipe.logging_steps,
        # By default a loss that is NaN counts as the mean of those before, or as 0.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "report_to": "none",
        "seed": recipe.seed,
        "use_cpu": not on_gpu,
        "remove_unused_columns": False,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
    }
