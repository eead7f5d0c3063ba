"""One training run, as every rank goes through it."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from tita.data import read_pairs
from tita.errors import Preempted, TitaError
from tita.jobspec import deepspeed_config
from tita.recipes import TrainRecipe
from tita.records import Pair
from tita.settings import settings
from tita.storage import Store, resolve
from tita.terminal import say
from tita.train.checkpoints import Checkpoints, patiently, remove_tree
from tita.train.collate import PairCollator
from tita.train.dataset import check_fits, make_dataset, read_checked
from tita.train.history import write_history
from tita.train.options import lora_of, options_of
from tita.train.progress import ProgressLines
from tita.train.reference import recall, reference_key
from tita.train.saving import save_model
from tita.train.stopping import StopOnSignal, Watchdog
from tita.train.trainer import LogProbs
from tita.vlm import hush_transformers, locate_model, telling_load_errors


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A trainer and the callbacks that are asked afterwards."""

    trainer: Any
    progress: ProgressLines
    checkpoints: Checkpoints
    stop: StopOnSignal


def train(recipe: TrainRecipe, *, run: str, store: Store) -> None:
    """Train, and leave the reward model with its history in `runs/<run>` (or `recipe.out`).

    Every rank calls this; rank 0 writes. The folder holds `run.json` (where the model came from),
    `train.jsonl` (one line a logging step), curves, and `model/`, which `from_pretrained` loads.
    A run that was stopped goes on from its newest complete checkpoint.

    Raises:
        Preempted: SIGTERM came, and the state is in the store.
    """
    out = recipe.out or f"runs/{run}"
    if _is_done(recipe, out=out, store=store):
        say(f"train-dpo: {out} is there already, of the same recipe: nothing to do")
        return
    inputs = read_inputs(recipe, store=store)
    with _shared_folder(recipe) as folder:
        training = _set_up(recipe, inputs=inputs, folder=folder, out=out, store=store)
        resumed = training.checkpoints.restore(folder)
        if resumed is not None:
            training.progress.go_on(resumed / "train.jsonl")
        training.trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        if training.stop.stopped:
            training.checkpoints.finish()
            training.trainer.accelerator.wait_for_everyone()
            raise Preempted("stopped by SIGTERM; the state is in the store", where=out)
        _finish(training, recipe=recipe, inputs=inputs, run=run, out=out, store=store)


def _finish(
    training: Training, *, recipe: TrainRecipe, inputs: Inputs, run: str, out: str, store: Store
) -> None:
    trainer = training.trainer
    folder = Path(trainer.args.output_dir)
    save_model(trainer, start=inputs.model, into=folder / "model")
    training.checkpoints.finish()
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        trainer.processing_class.save_pretrained(str(folder / "model"))
        meta = _meta(recipe, run=run)
        write_history(
            folder,
            recipe=recipe,
            model=inputs.model,
            pairs=inputs.pairs_path,
            num_pairs=len(inputs.pairs),
            meta=meta,
            progress=training.progress,
        )
        for left in folder.glob("checkpoint-*"):
            shutil.rmtree(left)
        remove_tree(store, f"{out}/checkpoints")
        manifest = patiently(lambda: store.push_tree(folder, out, meta=meta))
        say(f"train-dpo: {out} holds the reward model ({manifest.size_bytes:,} bytes)")
    trainer.accelerator.wait_for_everyone()


@contextmanager
def _shared_folder(recipe: TrainRecipe) -> Iterator[Path]:
    """A working folder for the ranks of this node, removed at the end; the gang begins here."""
    import torch
    import torch.distributed as dist

    _join_gang(on_gpu=torch.cuda.is_available(), timeout_s=recipe.hang_timeout_s)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    parent = settings().scratch_dir
    mine = tempfile.mkdtemp(prefix="tita-train-", dir=parent) if local == 0 else None
    folders: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(folders, mine)
    # Ranks of a node are consecutive, and its first one made the folder.
    found = folders[dist.get_rank() - local]
    assert found is not None
    try:
        yield Path(found)
    finally:
        if mine is not None:
            shutil.rmtree(mine, ignore_errors=True)


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


def _set_up(
    recipe: TrainRecipe, *, inputs: Inputs, folder: Path, out: str, store: Store
) -> Training:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import DPOConfig

    from tita.train.trainer import PairTrainer, encode_images_once

    hush_transformers()
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    on_gpu = torch.cuda.is_available()
    config = DPOConfig(**options_of(recipe, folder=folder, on_gpu=on_gpu))
    with telling_load_errors(recipe.model):
        processor = AutoProcessor.from_pretrained(inputs.model)
    dataset = make_dataset(
        inputs.pairs, images=inputs.images, processor=processor, image_aspect=recipe.image_aspect
    )
    check_fits(dataset, processor=processor, max_length=recipe.max_length)
    with telling_load_errors(recipe.model):
        model = AutoModelForImageTextToText.from_pretrained(
            inputs.model, dtype=getattr(torch, recipe.dtype)
        )
    if recipe.freeze_vision:
        _freeze_vision(model, where=inputs.model)
    encode_images_once(model)
    pairs_per_step = recipe.batch_size * recipe.gradient_accumulation * max(1, config.world_size)
    progress = ProgressLines(folder / "train.jsonl", pairs_per_step=pairs_per_step)
    stop, checkpoints = StopOnSignal(), _checkpoints(recipe, out=out, store=store)
    trainer = PairTrainer(
        recall=partial(_recall, recipe=recipe, inputs=inputs, store=store),
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=PairCollator(processor),
        processing_class=processor,
        peft_config=lora_of(recipe),
        callbacks=[progress, stop, checkpoints, Watchdog(timeout_s=recipe.hang_timeout_s)],
    )
    # Their printer writes Python dicts between our lines.
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return Training(trainer=trainer, progress=progress, checkpoints=checkpoints, stop=stop)


def _checkpoints(recipe: TrainRecipe, *, out: str, store: Store) -> Checkpoints:
    here = settings()
    return Checkpoints(
        store=store,
        out=out,
        node=here.node_rank,
        num_nodes=here.num_nodes,
        meta={
            "recipe": recipe.model_dump(mode="json"),
            "processes": here.num_nodes * here.procs_per_node,
        },
    )


def _recall(
    compute: Callable[[], LogProbs], *, recipe: TrainRecipe, inputs: Inputs, store: Store
) -> LogProbs:
    key = reference_key(
        inputs.pairs,
        model=inputs.model,
        images=inputs.images,
        image_aspect=recipe.image_aspect,
        dtype=recipe.dtype,
    )
    return recall(compute, key=key, store=store, number=len(inputs.pairs))


def _join_gang(*, on_gpu: bool, timeout_s: float) -> None:
    """Meet the other ranks before a model is loaded: under ZeRO-3 on CPUs it fails later."""
    import deepspeed

    if not on_gpu:
        # Its shared-memory collectives are compiled for half a minute on first use, and need a
        # compiler; gloo's own do for the few processes of one machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s), verbose=False
    )


def _freeze_vision(model: Any, *, where: str) -> None:
    towers = [m for name, m in model.named_modules() if name.endswith(("vision_tower", "visual"))]
    if not towers:
        raise TitaError("no vision tower found in it", where=where, remedy="freeze_vision=false")
    for tower in towers:
        tower.requires_grad_(False)
