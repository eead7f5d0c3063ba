"""TRL's trainers for vision-language pairs, with reference log-probabilities cached in the store.

TRL 1.16 refuses `precompute_ref_log_probs` for datasets with an image column, and runs the vision
tower separately for the chosen and the rejected answer to the same image.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOTrainer
from trl.models import prepare_deepspeed

from tita.activity import enter_stage
from tita.errors import TitaError
from tita.records import TRAINING_STAGE
from tita.storage import Store
from tita.terminal import progress, say
from tita.train.checkpoints import retry_store
from tita.train.group import from_rank_0, on_all_ranks
from tita.train.liveness import PEER_MONITOR, StepWatchdog
from tita.train.model import load_model, lora_config, save_model
from tita.train.preemption import PreemptionHandler
from tita.train.run import TrainRun
from tita.train.training_data import (
    REFERENCE,
    AnswerCollator,
    PairCollator,
    TrainInputs,
    make_dataset,
    start_model_digest,
)

LogProbs = tuple[list[float], list[float]]
"""Of the chosen and of the rejected answers, in the order of the pairs."""

_REFERENCE_VERSION = "2"
"""Increased when the prompt format or the format of the cached values changes."""


def train_stage(
    kind: type[Any],
    config: Any,
    *,
    run: TrainRun,
    start: TrainInputs,
    processor: Any,
    progress_callback: TrainerCallback,
    preemption: PreemptionHandler,
    **options: Any,
) -> Any:
    """Train one stage, the warm-up or DPO, from its newest checkpoint; every rank calls this.

    On return all checkpoints are uploaded, and the model is in `run.folder / "model"` unless
    training was stopped.

    Args:
        kind: type of the trainer: `SFTTrainer` for the warm-up, `PairTrainer` for DPO.
        config: of the trainer; under ZeRO-3 it must exist before the model is loaded.
        options: further arguments of the trainer.
    """
    is_dpo, checkpoints = kind is PairTrainer, run.checkpoints()
    enter_stage("loading the model")
    model = on_all_ranks(lambda: load_model(run.recipe, start=start.model))
    if is_dpo:
        encode_images_once(model)
    enter_stage("preparing the trainer")
    trainer = kind(
        model=model,
        args=config,
        train_dataset=make_dataset(
            start.pairs if is_dpo else start.answers,
            images=start.images,
            processor=processor,
            image_aspect=start.image_aspect,
        ),
        data_collator=(PairCollator if is_dpo else AnswerCollator)(processor),
        processing_class=processor,
        peft_config=lora_config(run.recipe),
        callbacks=[
            *(progress_callback, preemption, checkpoints),
            StepWatchdog(stage=TRAINING_STAGE if is_dpo else "warm-up"),
        ],
        **options,
    )
    remove_printers(trainer)
    enter_stage("looking for a checkpoint")
    resumed = checkpoints.restore(run.folder)
    enter_stage("preparing the first step")
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    if not preemption.stopped:
        save_model(trainer, start=start.model, into=run.folder / "model", name=start.model_name)
    if is_dpo:
        # Before the last synchronisation, because ranks may exit right after it.
        PEER_MONITOR.stop()
    enter_stage("uploading checkpoints")
    on_all_ranks(checkpoints.finish)
    return trainer


def remove_printers(trainer: Any) -> None:
    """Keep transformers from printing dicts and progress bars between our lines."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


class PairTrainer(DPOTrainer):  # type: ignore[misc]
    """`DPOTrainer` for the rows of `PairCollator`, without a reference model in memory."""

    def __init__(self, *, recall: Callable[[Callable[[], LogProbs]], LogProbs], **options: Any):
        """As `DPOTrainer`.

        Args:
            recall: returns cached log-probabilities, or calls its argument on every rank to compute
                them and caches the result.
        """
        self._recall = recall
        super().__init__(**options)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: TRL's would name a working folder as the model; `run.json` describes the run."""

    # TRL calls these two methods from its constructor. It has no public hook for rows that are
    # formatted already, nor for log-probabilities from elsewhere.

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        found = self._recall(lambda: self._compute_reference(dataset, batch_size))
        for column, values in zip(REFERENCE, found, strict=True):
            dataset = dataset.add_column(column, values)
        return dataset

    def _compute_reference(self, dataset: Any, batch_size: int) -> LogProbs:
        """One pass of the untrained model over all pairs, which the ranks share."""
        loader = self.accelerator.prepare(
            DataLoader(
                dataset,
                batch_size=batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
            )
        )
        # The trainer's own engine does not exist yet, and under ZeRO-3 the weights are sharded.
        sharded = self.is_deepspeed_enabled
        engine = prepare_deepspeed(self.model, self.accelerator) if sharded else self.model
        engine.eval()
        parts: list[tuple[Any, Any]] = []
        with progress("reference pass", total=len(loader), unit="batches") as advance:
            for batch in loader:
                both = self.compute_ref_log_probs(engine, batch)
                chosen, rejected = self.accelerator.gather_for_metrics(both)
                parts.append((chosen.float().cpu(), rejected.float().cpu()))
                advance()
        chosen, rejected = (torch.cat(part).tolist() for part in zip(*parts, strict=True))
        return chosen, rejected


def reference_key(start: TrainInputs, *, dtype: str) -> str:
    """The store key of the reference log-probabilities of these pairs under this model."""
    facts = [_REFERENCE_VERSION, start_model_digest(start.model), start.image_aspect, dtype]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for pair in start.pairs:
        digest.update(json.dumps(astuple(pair)).encode())
    for name in sorted({pair.image for pair in start.pairs}):
        digest.update(start.image_digests[name].encode())
    return f"cache/reference/{digest.hexdigest()}.json"


def recall_reference(
    compute: Callable[[], LogProbs], *, key: Callable[[], str], store: Store, num_pairs: int
) -> LogProbs:
    """The log-probabilities cached at `key()`; without any, computes and caches them.

    Every rank calls this. Only rank 0 computes the key, which reads all weights, and accesses the
    store.
    """
    where = ""

    def read() -> LogProbs | None:
        nonlocal where
        where = key()
        if not store.exists(where):
            return None
        try:
            body = json.loads(store.get(where))
            chosen, rejected = body["chosen"], body["rejected"]
        except (ValueError, KeyError, TypeError):
            chosen = rejected = []
        if not len(chosen) == len(rejected) == num_pairs:
            raise TitaError(
                "not the log-probabilities of these pairs",
                where=f"{store.uri}/{where}",
                remedy="delete it; the next run computes them again",
            )
        say("train-dpo: reference log-probabilities read from the store")
        return chosen, rejected

    found = from_rank_0(read)
    if found is None:
        found = compute()
        if dist.get_rank() == 0:
            body = json.dumps({"chosen": found[0], "rejected": found[1]})
            retry_store(lambda: store.put(where, body.encode()))
    return found


_ENCODED_ONCE = (
    *("aya_vision", "gemma3", "idefics3", "internvl", "llava", "llava_next", "llava_onevision"),
    *("qwen2_5_vl", "qwen2_vl", "smolvlm"),
)
"""Families whose image features depend only on the image and are one tensor or a list."""
_IMAGE_INPUTS = (
    "batch_num_images",
    "image_grid_thw",
    "image_sizes",
    "pixel_attention_mask",
    "pixel_values",
)


def encode_images_once(model: Any) -> bool:
    """Make a model run its vision tower once for both answers of a pair; False if it cannot.

    A batch contains every image twice, first for all chosen answers and then for all rejected ones,
    so the second half of the features equals the first, tiles and grids included. Families that
    were not verified are unchanged: some return features of several layers.
    """
    if model.config.model_type not in _ENCODED_ONCE:
        return False
    inner = model.model
    # transformers has no hook between the tower and the language model, so the instance's public
    # method is replaced.
    encode = inner.get_image_features
    names = tuple(inspect.signature(encode).parameters)

    def encode_once(*given: Any, **named: Any) -> Any:
        options = dict(zip(names, given, strict=False)) | named
        for name in _IMAGE_INPUTS:
            if (value := options.get(name)) is not None:
                options[name] = value[: len(value) // 2]
        features = encode(**options)
        found = features.pooler_output
        # One tensor, or one per prompt.
        both = torch.cat([found, found]) if isinstance(found, torch.Tensor) else (*found, *found)
        features.pooler_output = both
        return features

    inner.get_image_features = encode_once
    return True
