"""The supervised warm-up: the reward model comes near the base before DPO corrects it.

Its outcome is a model like any other, and it is kept in the store under the digest of all it
depends on: a second run, or a sweep over the DPO's settings, does not pay for it again.
"""

import gc
import hashlib
import json
import shutil
from dataclasses import astuple, replace
from typing import Any

from tita.recipes import TrainRecipe
from tita.storage.manifest import sha256_of
from tita.terminal import say
from tita.train.checkpoints import Checkpoints, patiently
from tita.train.dataset import AnswerCollator, Inputs, make_answers, start_digest
from tita.train.group import gathered, together
from tita.train.history import SpokenProgress
from tita.train.model import load_model, lora_of, save_model, save_preparation
from tita.train.preemption import StopOnSignal, Watchdog
from tita.train.run import Run, sft_options
from tita.vlm import locate_model

_FORM = "1"
"""Counts up when the warm-up is done otherwise."""


def warmed_up(this: Run, *, inputs: Inputs, processor: Any, stop: StopOnSignal) -> Inputs | None:
    """The inputs with the warmed-up model for the start; every rank calls this.

    Returns:
        None after a SIGTERM: the state is in the store, and the run goes on from there later.
    """
    import torch.distributed as dist

    recipe, store, on_rank_0 = this.recipe, this.store, dist.get_rank() == 0
    # Rank 0 alone reads every image and weight for the key.
    key = gathered(lambda: warm_up_key(recipe, inputs=inputs) if on_rank_0 else "")[0]
    there = gathered(lambda: on_rank_0 and store.read_manifest(key) is not None)[0]
    part = replace(this, out=f"{this.out}/warm-up", folder=this.folder / "warm-up")
    checkpoints = part.checkpoints()
    if not there:
        trainer = _trained(part, inputs, processor, checkpoints=checkpoints, stop=stop)
        if stop.stopped:
            return None
        together(lambda: _keep(part, inputs, processor, key=key) if on_rank_0 else None)
        _release(trainer)
        dist.barrier()
        shutil.rmtree(part.folder, ignore_errors=True)
    elif on_rank_0:
        say("train-dpo: the warmed-up model from the store")
    together(lambda: checkpoints.remove() if on_rank_0 else None)
    model = together(lambda: locate_model(key, store=store))
    return replace(inputs, model=model, model_name=key)


def _trained(
    part: Run, inputs: Inputs, processor: Any, *, checkpoints: Checkpoints, stop: StopOnSignal
) -> Any:
    """The trainer after its last step, its model in the part's folder, or after a SIGTERM."""
    trainer = _trainer(part, inputs, processor, callbacks=[checkpoints, stop])
    resumed = checkpoints.restore(part.folder)
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    if not stop.stopped:
        name = part.recipe.model
        save_model(trainer, start=inputs.model, into=part.folder / "model", name=name)
    together(checkpoints.finish)
    return trainer


def _keep(part: Run, inputs: Inputs, processor: Any, *, key: str) -> None:
    folder = part.folder / "model"
    save_preparation(processor, image_aspect=inputs.image_aspect, into=folder)
    meta = {"job": "train-dpo", "warm_up_of": part.recipe.model}
    patiently(lambda: part.store.push_tree(folder, key, meta=meta))


def warm_up_key(recipe: TrainRecipe, *, inputs: Inputs) -> str:
    """Where in the store the model lies that this warm-up ends in."""
    import torch.distributed as dist

    assert recipe.sft is not None
    facts = {
        "form": _FORM,
        "model": start_digest(inputs.model),
        "processes": dist.get_world_size(),
        "image_aspect": inputs.image_aspect,
        **recipe.model_dump(mode="json", include=_DEPENDS_ON),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for question in inputs.answers:
        digest.update(json.dumps(astuple(question)).encode())
    for name in sorted({str(question.image) for question in inputs.answers}):
        digest.update(sha256_of(inputs.images / name).encode())
    return f"cache/warm-up/{digest.hexdigest()}"


_DEPENDS_ON = {
    *("seed", "sft", "schedule", "warmup_ratio", "weight_decay", "batch_size"),
    *("gradient_accumulation", "dtype", "lora", "freeze_vision"),
}


def _trainer(part: Run, inputs: Inputs, processor: Any, *, callbacks: list[Any]) -> Any:
    import torch
    from trl import SFTConfig, SFTTrainer

    recipe, on_gpu = part.recipe, torch.cuda.is_available()
    config = SFTConfig(**sft_options(recipe, folder=part.folder, on_gpu=on_gpu))
    trainer = SFTTrainer(
        model=together(lambda: load_model(recipe, start=inputs.model)),
        args=config,
        train_dataset=make_answers(
            inputs.answers,
            images=inputs.images,
            processor=processor,
            image_aspect=inputs.image_aspect,
        ),
        data_collator=AnswerCollator(processor),
        processing_class=processor,
        peft_config=lora_of(recipe),
        callbacks=[SpokenProgress(), *callbacks, Watchdog(timeout_s=recipe.hang_timeout_s)],
    )
    hush_trainer(trainer)
    return trainer


def hush_trainer(trainer: Any) -> None:
    """Keep transformers' printers from writing Python dicts between our lines."""
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def _release(trainer: Any) -> None:
    """Give back the memory of a trainer that has done its work: another comes."""
    import torch

    engine = trainer.model_wrapped
    if hasattr(engine, "destroy"):
        engine.destroy()
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
