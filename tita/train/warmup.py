"""The supervised warm-up, which brings the reward model close to the base model before DPO.

The warmed-up model is cached in the store under a digest of everything it depends on, so that a
second run or a sweep over DPO's settings does not train it again.
"""

import gc
import hashlib
import json
import shutil
from dataclasses import astuple, replace
from typing import Any

import torch
import torch.distributed as dist
from trl import SFTConfig, SFTTrainer

from tita.data.digest_set import distinct
from tita.recipes import TrainRecipe
from tita.terminal import say
from tita.train.checkpoints import retry_store
from tita.train.group import from_rank_0, on_all_ranks
from tita.train.history import WarmUpProgress
from tita.train.model import save_processor
from tita.train.preemption import PreemptionHandler
from tita.train.run import TrainRun, sft_options
from tita.train.trainer import train_stage
from tita.train.training_data import TrainInputs, start_model_digest
from tita.vlm.loading import locate_model

_WARM_UP_VERSION = "3"
"""Increased when the warm-up's procedure changes."""
_RECIPE_KEYS = {
    *("seed", "sft", "schedule", "warmup_ratio", "weight_decay", "batch_size"),
    *("gradient_accumulation", "dtype", "lora", "freeze_vision"),
}
"""Keys of the recipe that the warmed-up model depends on."""


def warm_up(
    run: TrainRun, *, inputs: TrainInputs, processor: Any, preemption: PreemptionHandler
) -> TrainInputs | None:
    """The inputs with the warmed-up model as the starting model; every rank calls this.

    Returns:
        None after a SIGTERM: the state is in the store, and the next start resumes from it.
    """
    store, on_rank_0 = run.store, dist.get_rank() == 0
    key = from_rank_0(lambda: warm_up_key(run.recipe, inputs=inputs))
    is_cached = from_rank_0(lambda: store.read_manifest(key) is not None)
    stage = run.warm_up_stage()
    if is_cached:
        if on_rank_0:
            say("train-dpo: warmed-up model read from the store")
    else:
        options = sft_options(run.recipe, folder=stage.folder, on_gpu=torch.cuda.is_available())
        trainer = train_stage(
            SFTTrainer,
            SFTConfig(**options),
            run=stage,
            start=inputs,
            processor=processor,
            progress_callback=WarmUpProgress(),
            preemption=preemption,
        )
        if preemption.stopped:
            return None
        on_all_ranks(lambda: _upload(stage, inputs, processor, key=key) if on_rank_0 else None)
        _free_memory(trainer)
        dist.barrier()
        shutil.rmtree(stage.folder, ignore_errors=True)
    on_all_ranks(lambda: store.delete_tree(f"{stage.out}/checkpoints") if on_rank_0 else None)
    model = on_all_ranks(lambda: locate_model(key, store=store))
    return replace(inputs, model=model, model_name=key)


def _upload(stage: TrainRun, inputs: TrainInputs, processor: Any, *, key: str) -> None:
    folder = stage.folder / "model"
    save_processor(processor, image_aspect=inputs.image_aspect, into=folder)
    meta = {"job": "train-dpo", "warm_up_of": stage.recipe.model}
    retry_store(lambda: stage.store.push_tree(folder, key, meta=meta))


def warm_up_key(recipe: TrainRecipe, *, inputs: TrainInputs) -> str:
    """The store key of the model that this warm-up produces."""
    facts = {
        "form": _WARM_UP_VERSION,
        "model": start_model_digest(inputs.model),
        "processes": dist.get_world_size(),
        "image_aspect": inputs.image_aspect,
        **recipe.model_dump(mode="json", include=_RECIPE_KEYS),
    }
    if recipe.quantization is not None:
        facts["quantization"] = recipe.quantization
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for question in inputs.answers:
        digest.update(json.dumps(astuple(question)).encode())
    for name in distinct(str(question.image) for question in inputs.answers):
        digest.update(inputs.image_digests[name].encode())
    return f"cache/warm-up/{digest.hexdigest()}"


def _free_memory(trainer: Any) -> None:
    """Release the memory of a finished trainer before the next one is built."""
    engine = trainer.model_wrapped
    if hasattr(engine, "destroy"):
        engine.destroy()
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
