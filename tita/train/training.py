"""One training run from start to end, as every rank executes it."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from trl import DPOConfig

from tita.activity import enter_stage
from tita.errors import Preempted
from tita.recipes import Tracker, TrainRecipe
from tita.settings import settings
from tita.storage import Store, is_done
from tita.terminal import say
from tita.train.best_weights import BestWeights
from tita.train.checkpoints import BEST, retry_store
from tita.train.contact_sheet import write_contact_sheet
from tita.train.group import (
    finish_on_rank_0,
    from_rank_0,
    join_group,
    local_rank,
    on_all_ranks,
    shared_folder,
)
from tita.train.history import PROGRESS_FILE, ProgressLines, write_history
from tita.train.liveness import PEER_MONITOR
from tita.train.model import save_processor
from tita.train.preemption import PreemptionHandler
from tita.train.preflight import preflight
from tita.train.reference import Compute, LogProbs, recall_reference, reference_key
from tita.train.run import TrainRun, dpo_options
from tita.train.trackers import PROJECT, tracked_runs
from tita.train.trainer import PairTrainer, train_stage
from tita.train.training_data import TrainInputs, cache_rows, data_identity, read_inputs
from tita.train.warmup import warm_up
from tita.vlm.adapters import write_adapter_aspect
from tita.vlm.loading import silence_transformers, translate_load_errors
from tita.vlm.processors import load_processor


def train(recipe: TrainRecipe, *, run: str, store: Store) -> None:
    """Train the reward model, and write it with its history to `runs/<run>` (or `recipe.out`).

    Every rank calls this; rank 0 writes. The folder contains `run.json` (where the model comes
    from), `train.jsonl` (one line per logging step), curves, and `model/` for `from_pretrained`. A
    run that was stopped resumes from its newest complete checkpoint.

    Raises:
        TitaError: an input is missing or invalid; no weights were loaded.
        Preempted: SIGTERM was received; the state is in the store.
    """
    out = recipe.out or f"runs/{run}"
    if is_done(out, recipe=recipe, store=store):
        if settings().node_rank == 0 and local_rank() == 0:
            say(f"train-dpo: {out} exists already, with the same recipe: nothing to do")
            store.delete_tree(f"{out}/checkpoints")
        return
    silence_transformers()
    enter_stage("joining the other ranks")
    join_group(timeout_s=recipe.hang_timeout_s)
    with shared_folder() as folder:
        this_run = TrainRun(recipe=recipe, name=run, out=out, folder=folder, store=store)
        preemption = PreemptionHandler(folder=folder)

        def read() -> tuple[TrainInputs, Any]:
            inputs = read_inputs(recipe, store=store)
            with translate_load_errors(recipe.model):
                return inputs, load_processor(inputs.model, where=recipe.model)

        enter_stage("reading the data")
        # One process of each node reads the rows; the others map what it has written.
        on_all_ranks(lambda: cache_rows(recipe, store=store) if local_rank() == 0 else None)
        inputs, processor = on_all_ranks(read)
        enter_stage("checking the data")
        kept = preflight(this_run, inputs=inputs, processor=processor)
        this_run = identify_data(this_run, replace(inputs, image_digests=kept.image_digests))
        inputs = kept
        dist.barrier()
        start: TrainInputs | None = inputs
        with tracked_runs(this_run) as trackers:
            if recipe.sft is not None:
                start = warm_up(this_run, inputs=inputs, processor=processor, preemption=preemption)
            if start is not None:
                trainer, best = _train_dpo(
                    this_run, start, processor, preemption=preemption, trackers=trackers
                )
            PEER_MONITOR.stop()
            if start is None or preemption.stopped:
                raise Preempted("stopped by SIGTERM; the state is in the store", where=out)
        _upload_run(
            this_run,
            trainer.processing_class,
            inputs=inputs,
            start=start,
            kept_step=None if best is None else best.step,
        )


def identify_data(run: TrainRun, inputs: TrainInputs) -> TrainRun:
    """The run with the identity of its data; every rank calls this.

    Args:
        run: with or without checkpoints in the store.
        inputs: as they were read, with the images' digests.

    Raises:
        TitaError: the run would resume from a checkpoint of other data.
    """
    identity = from_rank_0(lambda: data_identity(inputs, recipe=run.recipe))
    run = replace(run, data=identity)

    def check() -> None:
        if run.recipe.sft is not None:
            run.warm_up_stage().check_data()
        run.check_data()

    from_rank_0(lambda: retry_store(check))
    return run


def _train_dpo(
    run: TrainRun,
    start: TrainInputs,
    processor: Any,
    *,
    preemption: PreemptionHandler,
    trackers: Sequence[Tracker],
) -> tuple[PairTrainer, BestWeights | None]:
    preemption.begin_stage()
    recipe = run.recipe
    options = dpo_options(
        recipe, folder=run.folder, on_gpu=torch.cuda.is_available(), trackers=trackers
    )
    pairs_per_step = recipe.batch_size * recipe.gradient_accumulation * dist.get_world_size()
    best = None
    if recipe.validation is not None:
        best = BestWeights(
            run.folder / BEST, keep=recipe.keep == "best", patience=recipe.early_stopping
        )

    def recall(compute: Compute, is_held_out: bool) -> LogProbs:
        pairs = start.validation if is_held_out else start.pairs
        others = start.validation_others if is_held_out else start.negatives
        return recall_reference(
            compute,
            key=lambda: reference_key(
                start,
                pairs=pairs,
                negatives=others,
                dtype=recipe.dtype,
                ld_alpha=recipe.ld_alpha,
                quantization=recipe.quantization,
                held_out=is_held_out,
            ),
            store=run.store,
            num_pairs=len(pairs),
            num_parts=4 if is_held_out else 3 if others else 2,
        )

    trainer: PairTrainer = train_stage(
        PairTrainer,
        DPOConfig(**options, project=PROJECT, run_name=run.name),
        run=run,
        start=start,
        processor=processor,
        progress_callback=ProgressLines(run.folder / PROGRESS_FILE, pairs_per_step=pairs_per_step),
        preemption=preemption,
        best=best,
        recall=recall,
        image_preference=recipe.image_preference,
    )
    return trainer, best


def _upload_run(
    run: TrainRun,
    processor: Any,
    *,
    inputs: TrainInputs,
    start: TrainInputs,
    kept_step: int | None,
) -> None:
    """Rank 0 writes the run's complete folder to the store; the others wait."""

    recipe = run.recipe.model_dump(mode="json")
    meta = {"job": "train-dpo", "run": run.name, "recipe": recipe}

    def upload() -> None:
        save_processor(processor, image_aspect=start.image_aspect, into=run.folder / "model")
        if (run.folder / "adapter").is_dir():
            write_adapter_aspect(run.folder / "adapter", start.image_aspect)
        write_history(
            run.folder,
            recipe=run.recipe,
            inputs=inputs,
            start=start,
            meta=meta,
            kept_step=kept_step,
        )
        if inputs.negatives:
            write_contact_sheet(inputs, title=run.name, into=run.folder / "contact_sheet.html")
        shutil.rmtree(run.folder / BEST, ignore_errors=True)
        for folder in (*run.folder.glob("checkpoint-*"), *run.folder.glob("upload-*")):
            shutil.rmtree(folder)
        manifest = retry_store(lambda: run.store.push_tree(run.folder, run.out, meta=meta))
        # After the push: a retry of a failed push resumes from them.
        run.store.delete_tree(f"{run.out}/checkpoints")
        say(f"train-dpo: uploaded the reward model to {run.out} ({manifest.size_bytes:,} bytes)")

    enter_stage("uploading the model")
    finish_on_rank_0(upload)
