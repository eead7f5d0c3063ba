"""One training run from its beginning to its end, as every rank goes through it."""

import shutil
from collections.abc import Callable
from typing import Any

from tita.errors import Preempted
from tita.recipes import TrainRecipe
from tita.settings import settings
from tita.storage import Store, is_done
from tita.terminal import say
from tita.train.checkpoints import patiently, remove_tree
from tita.train.dataset import Inputs, PairCollator, make_dataset, read_inputs
from tita.train.group import finally_by_rank_0, join_group, local_rank, shared_folder, together
from tita.train.history import PROGRESS, ProgressLines, write_history
from tita.train.liveness import PEERS
from tita.train.model import load_model, lora_of, save_model, save_preparation
from tita.train.preemption import StopOnSignal, Watchdog
from tita.train.preflight import preflight
from tita.train.reference import recall, reference_key
from tita.train.run import Run, dpo_options
from tita.train.trainer import LogProbs
from tita.train.warmup import hush_trainer, warmed_up
from tita.vlm import hush_transformers, load_processor, telling_load_errors


def train(recipe: TrainRecipe, *, run: str, store: Store) -> None:
    """Train, and leave the reward model with its history in `runs/<run>` (or `recipe.out`).

    Every rank calls this; rank 0 writes. The folder holds `run.json` (where the model came from),
    `train.jsonl` (one line a logging step), curves, and `model/`, which `from_pretrained` loads.
    A run that was stopped goes on from its newest complete checkpoint.

    Raises:
        TitaError: something that the run reads or needs is missing; no weights were loaded.
        Preempted: SIGTERM came, and the state is in the store.
    """
    out = recipe.out or f"runs/{run}"
    if is_done(out, recipe=recipe.model_dump(mode="json"), store=store):
        if settings().node_rank == 0 and local_rank() == 0:
            say(f"train-dpo: {out} is there already, of the same recipe: nothing to do")
            remove_tree(store, f"{out}/checkpoints")
        return
    hush_transformers()
    join_group(timeout_s=recipe.hang_timeout_s)
    with shared_folder() as folder:
        this = Run(recipe=recipe, name=run, out=out, folder=folder, store=store)
        stop = StopOnSignal(folder=folder)
        inputs, processor = _prepare(this)
        start: Inputs | None = inputs
        if recipe.sft is not None:
            start = warmed_up(this, inputs=inputs, processor=processor, stop=stop)
        trainer = None if start is None else _dpo(this, start, processor, stop=stop)
        PEERS.end()
        if start is None or trainer is None:
            raise Preempted("stopped by SIGTERM; the state is in the store", where=out)
        _finish(this, trainer, inputs=inputs, start=start)


def _prepare(this: Run) -> tuple[Inputs, Any]:
    """What the run reads, with all that can be wrong with it looked at, and the processor."""
    import torch.distributed as dist

    def read() -> tuple[Inputs, Any]:
        inputs = read_inputs(this.recipe, store=this.store)
        with telling_load_errors(this.recipe.model):
            return inputs, load_processor(inputs.model, where=this.recipe.model)

    inputs, processor = together(read)
    kept = preflight(
        this.recipe, inputs=inputs, processor=processor, folder=this.folder, store=this.store
    )
    dist.barrier()
    return kept, processor


def _dpo(this: Run, start: Inputs, processor: Any, *, stop: StopOnSignal) -> Any:
    """Train from where the run stands; the trainer, or None after a SIGTERM."""
    stop.begin_anew()
    checkpoints = this.checkpoints()
    trainer, progress = _trainer(this, start, processor, callbacks=[stop, checkpoints])
    resumed = checkpoints.restore(this.folder)
    if resumed is not None:
        progress.go_on(resumed / PROGRESS)
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    if not stop.stopped:
        save_model(trainer, start=start.model, into=this.folder / "model", name=start.model_name)
    # Before all meet: whoever comes from there may go.
    PEERS.end()
    together(checkpoints.finish)
    return None if stop.stopped else trainer


def _trainer(
    this: Run, start: Inputs, processor: Any, *, callbacks: list[Any]
) -> tuple[Any, ProgressLines]:
    import torch
    from trl import DPOConfig

    from tita.train.trainer import PairTrainer, encode_images_once

    recipe = this.recipe
    config = DPOConfig(**dpo_options(recipe, folder=this.folder, on_gpu=torch.cuda.is_available()))
    model = together(lambda: load_model(recipe, start=start.model))
    encode_images_once(model)
    pairs_per_step = recipe.batch_size * recipe.gradient_accumulation * max(1, config.world_size)
    progress = ProgressLines(this.folder / PROGRESS, pairs_per_step=pairs_per_step)
    trainer = PairTrainer(
        recall=lambda compute: _recall(compute, this=this, start=start),
        model=model,
        args=config,
        train_dataset=make_dataset(
            start.pairs,
            images=start.images,
            processor=processor,
            image_aspect=start.image_aspect,
        ),
        data_collator=PairCollator(processor),
        processing_class=processor,
        peft_config=lora_of(recipe),
        callbacks=[progress, *callbacks, Watchdog(timeout_s=recipe.hang_timeout_s)],
    )
    hush_trainer(trainer)
    return trainer, progress


def _recall(compute: Callable[[], LogProbs], *, this: Run, start: Inputs) -> LogProbs:
    def key() -> str:
        return reference_key(
            start.pairs,
            model=start.model,
            images=start.images,
            image_aspect=start.image_aspect,
            dtype=this.recipe.dtype,
        )

    return recall(compute, key=key, store=this.store, number=len(start.pairs))


def _finish(this: Run, trainer: Any, *, inputs: Inputs, start: Inputs) -> None:
    """Rank 0 leaves the run's folder in the store, complete; the others wait."""

    def work() -> None:
        save_preparation(
            trainer.processing_class, image_aspect=start.image_aspect, into=this.folder / "model"
        )
        write_history(this.folder, recipe=this.recipe, inputs=inputs, start=start, meta=this.meta)
        for left in (*this.folder.glob("checkpoint-*"), *this.folder.glob("upload-*")):
            shutil.rmtree(left)
        manifest = patiently(lambda: this.store.push_tree(this.folder, this.out, meta=this.meta))
        # Not before: whoever tries again after a failure here goes on from them.
        this.checkpoints().remove()
        say(f"train-dpo: {this.out} holds the reward model ({manifest.size_bytes:,} bytes)")

    finally_by_rank_0(work)
