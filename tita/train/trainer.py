"""TRL's trainers for vision-language pairs, with reference log-probabilities cached in the store.

TRL 1.16 refuses `precompute_ref_log_probs` for datasets with an image column, and runs the vision
tower separately for the chosen and the rejected answer to the same image.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOTrainer
from trl.models import prepare_deepspeed

from tita.activity import enter_stage
from tita.recipes import ImagePreferenceRecipe
from tita.records import TRAINING_STAGE
from tita.terminal import progress
from tita.train.collators import OTHER_REFERENCE, REFERENCE, AnswerCollator, PairCollator
from tita.train.group import on_all_ranks
from tita.train.image_preference import image_loss
from tita.train.liveness import PEER_MONITOR, StepWatchdog
from tita.train.model import load_model, lora_config, save_model
from tita.train.parted_batch import PartedBatch
from tita.train.preemption import PreemptionHandler
from tita.train.reference import LogProbs
from tita.train.run import TrainRun
from tita.train.shared_images import SharedImages, encode_images_once
from tita.train.training_data import TrainInputs, make_dataset


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
        options["shared_images"] = encode_images_once(model)
    enter_stage("preparing the trainer")
    trainer = kind(
        model=model,
        args=config,
        train_dataset=make_dataset(
            start.pairs if is_dpo else start.answers,
            images=start.images,
            processor=processor,
            image_aspect=start.image_aspect,
            negatives=start.negatives if is_dpo else (),
        ),
        data_collator=PairCollator(processor, getattr(model.config, "image_token_id", None))
        if is_dpo
        else AnswerCollator(processor),
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

    def __init__(
        self,
        *,
        recall: Callable[[Callable[[], LogProbs]], LogProbs],
        image_preference: ImagePreferenceRecipe | None = None,
        shared_images: SharedImages | None = None,
        **options: Any,
    ):
        """As `DPOTrainer`.

        Args:
            recall: returns cached log-probabilities, or calls its argument on every rank to compute
                them and caches the result.
            image_preference: terms of the loss that depend on the image.
            shared_images: of the model, if its vision tower reads them.
        """
        self._recall = recall
        self._image_preference = image_preference
        self._shared_images = shared_images
        self._image_margins: list[torch.Tensor] = []
        """Of the pairs since the last logging step, `[B]` each."""
        super().__init__(**options)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: TRL's would name a working folder as the model; `run.json` describes the run."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss of the pairs, and the terms that depend on the image.

        One forward pass computes everything, as ZeRO-3 and gradient accumulation expect.
        """
        if self._image_preference is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = PartedBatch(inputs, shared_images=self._shared_images)
        loss = super().compute_loss(
            batch.forward(model), batch.pairs(), return_outputs, num_items_in_batch
        )
        own = batch.log_probs(0) - inputs[REFERENCE[0]]
        other = None
        if batch.num_parts > 2:
            other = batch.log_probs(2) - inputs[OTHER_REFERENCE[0]]
            margins = self.beta * (own - other).detach()
            self._image_margins.append(self.accelerator.gather(margins))
        return loss + image_loss(own, other, preference=self._image_preference, beta=self.beta)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `DPOTrainer`, with the image term's figures."""
        if "loss" in logs and self._image_margins:
            margins = torch.cat(self._image_margins)
            logs["image/margins"] = margins.mean().item()
            logs["image/accuracies"] = (margins > 0).float().mean().item()
            self._image_margins.clear()
        super().log(logs, start_time)

    # TRL calls these two methods from its constructor. It has no public hook for rows that are
    # formatted already, nor for log-probabilities from elsewhere.

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        found = self._recall(lambda: self._compute_reference(dataset, batch_size))
        for column, values in zip((*REFERENCE, *OTHER_REFERENCE), found, strict=False):
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
        parts: list[tuple[Any, ...]] = []
        with progress("reference pass", total=len(loader), unit="batches") as advance:
            for inputs in loader:
                batch = PartedBatch(inputs, shared_images=self._shared_images)
                found = self.compute_ref_log_probs(batch.forward(engine), batch.pairs())
                others = [batch.log_probs(number) for number in range(2, batch.num_parts)]
                found = self.accelerator.gather_for_metrics((*found, *others))
                parts.append(tuple(part.float().cpu() for part in found))
                advance()
        return [torch.cat(part).tolist() for part in zip(*parts, strict=True)]
