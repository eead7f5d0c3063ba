"""One training run, as every rank goes through it."""

import json
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tita import __version__
from tita.data import read_pairs
from tita.errors import TitaError
from tita.jobspec import deepspeed_config
from tita.recipes import TrainRecipe
from tita.records import Pair
from tita.storage import Store, resolve
from tita.storage.manifest import describe
from tita.terminal import say
from tita.train.dataset import check_fits, make_dataset, read_checked
from tita.train.progress import ProgressLines
from tita.vlm import hush_transformers, locate_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run reads, on this machine."""

    model: str
    """A local folder or a hub name."""
    pairs: tuple[Pair, ...]
    pairs_path: Path
    images: Path


def read_inputs(recipe: TrainRecipe, *, store: Store) -> Inputs:
    """Find and check everything a run reads, before anything expensive begins.

    Raises:
        TitaError: something is missing or broken; nothing was started.
    """
    deepspeed_config(recipe.deepspeed)
    model = locate_model(recipe.model, store=store)
    path = resolve(recipe.pairs, store=store)
    images = resolve(recipe.images, store=store)
    pairs = tuple(read_pairs(path))
    if not pairs:
        raise TitaError("no pairs", where=str(path), remedy="build some with `tita build-pairs`")
    read_checked(pairs, images=images)
    return Inputs(model=model, pairs=pairs, pairs_path=path, images=images)


def train(recipe: TrainRecipe, *, run: str, store: Store) -> None:
    """Train, and leave the reward model with its history in `runs/<run>` (or `recipe.out`).

    Every rank calls this; rank 0 writes. The folder holds `run.json` (where the model came from),
    `train.jsonl` (one line a logging step), curves, and `model/`, which `from_pretrained` loads.
    """
    out = recipe.out or f"runs/{run}"
    if _is_done(recipe, out=out, store=store):
        say(f"train-dpo: {out} is there already, of the same recipe: nothing to do")
        return
    inputs = read_inputs(recipe, store=store)
    folder = Path(tempfile.mkdtemp(prefix="tita-train-"))
    try:
        trainer, progress = _trainer(recipe, inputs=inputs, folder=folder)
        trainer.train()
        trainer.save_model(str(folder / "model"))
        if trainer.is_world_process_zero():
            trainer.processing_class.save_pretrained(str(folder / "model"))
            _write_history(folder, recipe=recipe, inputs=inputs, run=run, progress=progress)
            manifest = store.push_tree(folder, out, meta=_meta(recipe, run=run))
            say(f"train-dpo: {out} holds the reward model ({manifest.size_bytes:,} bytes)")
        trainer.accelerator.wait_for_everyone()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_done(recipe: TrainRecipe, *, out: str, store: Store) -> bool:
    done = store.read_manifest(out)
    if done is None:
        return False
    if done.meta.get("recipe") != recipe.model_dump(mode="json"):
        raise TitaError(
            "there is a run of another recipe", where=out, remedy="choose another run name"
        )
    return True


def _meta(recipe: TrainRecipe, *, run: str) -> dict[str, Any]:
    return {"job": "train-dpo", "run": run, "recipe": recipe.model_dump(mode="json")}


def _trainer(recipe: TrainRecipe, *, inputs: Inputs, folder: Path) -> tuple[Any, ProgressLines]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import DPOConfig, DPOTrainer

    hush_transformers()
    on_gpu = torch.cuda.is_available()
    config = DPOConfig(**_options(recipe, folder=folder, on_gpu=on_gpu))
    _join_gang(on_gpu=on_gpu)
    processor = AutoProcessor.from_pretrained(inputs.model)
    dataset = make_dataset(
        inputs.pairs, images=inputs.images, processor=processor, image_aspect=recipe.image_aspect
    )
    check_fits(dataset, processor=processor, max_length=recipe.max_length)
    model = AutoModelForImageTextToText.from_pretrained(
        inputs.model, dtype=getattr(torch, recipe.dtype)
    )
    if recipe.freeze_vision:
        _freeze_vision(model, where=inputs.model)
    pairs_per_step = recipe.batch_size * recipe.gradient_accumulation * max(1, config.world_size)
    progress = ProgressLines(folder / "train.jsonl", pairs_per_step=pairs_per_step)
    trainer = DPOTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=processor,
        peft_config=_lora(recipe),
        callbacks=[progress],
    )
    # Their printer writes Python dicts between our lines.
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer, progress


def _options(recipe: TrainRecipe, *, folder: Path, on_gpu: bool) -> dict[str, Any]:
    """The recipe in the words of TRL's `DPOConfig`."""
    nll = recipe.nll_weight
    return {
        "output_dir": str(folder),
        "deepspeed": deepspeed_config(recipe.deepspeed),
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
        "save_strategy": "no",
        "report_to": "none",
        "seed": recipe.seed,
        "use_cpu": not on_gpu,
        "remove_unused_columns": False,
        "dataloader_num_workers": 2 if on_gpu else 0,
    }


def _join_gang(*, on_gpu: bool) -> None:
    """Meet the other ranks before a model is loaded: under ZeRO-3 on CPUs it fails later."""
    import deepspeed

    if not on_gpu:
        # Its shared-memory collectives are compiled for half a minute on first use, and need a
        # compiler; gloo's own do for the few processes of one machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if on_gpu else "gloo")


def _freeze_vision(model: Any, *, where: str) -> None:
    towers = [m for name, m in model.named_modules() if name.endswith(("vision_tower", "visual"))]
    if not towers:
        raise TitaError("no vision tower found in it", where=where, remedy="freeze_vision=false")
    for tower in towers:
        tower.requires_grad_(False)


def _lora(recipe: TrainRecipe) -> Any:
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


def _write_history(
    folder: Path, *, recipe: TrainRecipe, inputs: Inputs, run: str, progress: ProgressLines
) -> None:
    versions = {
        name: metadata.version(name)
        for name in ("torch", "transformers", "trl", "deepspeed", "accelerate", "peft")
    }
    model = Path(inputs.model)
    facts = _meta(recipe, run=run) | {
        "tita": __version__,
        "packages": versions,
        "hardware": {"machine": platform.machine(), "python": platform.python_version()},
        "start_model": {
            "name": recipe.model,
            "digest": describe(model).digest if model.is_dir() else None,
        },
        "pairs": {"path": recipe.pairs, "number": len(inputs.pairs)},
        "last": asdict(progress.lines[-1]) if progress.lines else None,
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=2))
    for name in ("loss", "reward_margin", "reward_accuracy"):
        (folder / f"{name}.svg").write_text(_curve(progress, name))


def _curve(progress: ProgressLines, name: str) -> str:
    from matplotlib.figure import Figure

    from tita.report import new_axes, svg

    axes = new_axes(xlabel="step", ylabel=name.replace("_", " "))
    axes.plot(
        [line.step for line in progress.lines], [getattr(line, name) for line in progress.lines]
    )
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return svg(figure)
