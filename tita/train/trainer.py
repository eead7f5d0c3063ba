"""TRL's trainers for vision-language pairs, with reference log-probabilities cached in the store.

TRL 1.16 refuses `precompute_ref_log_probs` for datasets with an image column, and runs the vision
tower separately for the chosen and the rejected answer to the same image.
"""

from collections.abc import Callable, Sequence
from functools import partial
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
from tita.train.best_weights import BestWeights
from tita.train.collators import OTHER_REFERENCE, REFERENCE, AnswerCollator, PairCollator
from tita.train.group import on_all_ranks
from tita.train.image_preference import image_loss
from tita.train.liveness import PEER_MONITOR, StepWatchdog
from tita.train.model import load_model, lora_config, save_model, save_weights
from tita.train.parted_batch import PartedBatch
from tita.train.preemption import PreemptionHandler
from tita.train.reference import AddBatch, Compute, LogProbs
from tita.train.run import TrainRun
from tita.train.shared_images import SharedImages, encode_images_once
from tita.train.trackers import guard_trackers
from tita.train.training_data import TrainInputs, make_dataset
from tita.train.validation import summarise, validation_logs


def train_stage(
    kind: type[Any],
    config: Any,
    *,
    run: TrainRun,
    start: TrainInputs,
    processor: Any,
    progress_callback: TrainerCallback,
    preemption: PreemptionHandler,
    best: BestWeights | None = None,
    **options: Any,
) -> Any:
    """Train one stage, the warm-up or DPO, from its newest checkpoint; every rank calls this.

    On return all checkpoints are uploaded, and the model is in `run.folder / "model"` unless
    training was stopped.

    Args:
        kind: type of the trainer: `SFTTrainer` for the warm-up, `PairTrainer` for DPO.
        config: of the trainer; under ZeRO-3 it must exist before the model is loaded.
        best: follows the validation loss, if pairs are held out.
        options: further arguments of the trainer.
    """
    is_dpo, checkpoints = kind is PairTrainer, run.checkpoints()
    enter_stage("loading the model")
    model = on_all_ranks(lambda: load_model(run.recipe, start=start.model))
    if is_dpo:
        options["shared_images"] = encode_images_once(model)
        options |= _held_out_options(run, start, processor)
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
            *(progress_callback, preemption),
            # Before checkpoints, which take the best weights along.
            *([] if best is None else [best]),
            checkpoints,
            StepWatchdog(stage=TRAINING_STAGE if is_dpo else "warm-up"),
        ],
        **options,
    )
    remove_printers(trainer)
    guard_trackers(trainer)
    if best is not None:
        best.save = lambda folder: save_weights(trainer, folder)
    enter_stage("looking for a checkpoint")
    resumed = checkpoints.restore(run.folder)
    enter_stage("preparing the first step")
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    if not preemption.stopped:
        kept = None if best is None else best.kept
        save_model(
            trainer,
            start=start.model,
            into=run.folder / "model",
            name=start.model_name,
            kept=kept,
        )
    if is_dpo:
        # Before the last synchronisation, because ranks may exit right after it.
        PEER_MONITOR.stop()
    enter_stage("uploading checkpoints")
    on_all_ranks(checkpoints.finish)
    return trainer


def _held_out_options(run: TrainRun, start: TrainInputs, processor: Any) -> dict[str, Any]:
    """The trainer's options for held-out pairs."""
    if not start.validation:
        return {}
    return {
        "eval_dataset": make_dataset(
            start.validation,
            images=start.images,
            processor=processor,
            image_aspect=start.image_aspect,
            negatives=start.validation_others,
            held_out=True,
        ),
        "pictures": [start.image_digests[pair.image] for pair in start.validation],
    }


def remove_printers(trainer: Any) -> None:
    """Keep transformers from printing dicts and progress bars between our lines."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


class PairTrainer(DPOTrainer):  # type: ignore[misc]
    """`DPOTrainer` for the rows of `PairCollator`, without a reference model in memory."""

    def __init__(
        self,
        *,
        recall: Callable[[Compute, bool], LogProbs],
        pictures: Sequence[str] = (),
        image_preference: ImagePreferenceRecipe | None = None,
        shared_images: SharedImages | None = None,
        **options: Any,
    ):
        """As `DPOTrainer`.

        Args:
            recall: returns cached log-probabilities, and calls its first argument on every rank to
                compute those that are not. The second says whether the pairs are held out.
            pictures: the picture of each held-out pair.
            image_preference: terms of the loss that depend on the image.
            shared_images: of the model, if its vision tower reads them.
        """
        self._recall = recall
        self._image_preference = image_preference
        self._shared_images = shared_images
        self._image_margins: list[torch.Tensor] = []
        """Of the pairs since the last logging step, `[B]` each."""
        self._pictures = pictures
        self._held_out: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Margins of the held-out pairs of this evaluation, under their own images and others."""
        self._reference_engine: Any = None
        super().__init__(**options)
        self._reference_engine = None

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
        # Also for plain batches: the one before may have been one of held-out pairs.
        batch = PartedBatch(inputs, shared_images=self._shared_images)
        if self._image_preference is None and batch.num_parts == 2:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = super().compute_loss(
            batch.forward(model), batch.pairs(), return_outputs, num_items_in_batch
        )
        if not self.model.training and batch.num_parts == 4:
            margins = tuple(self._margins(batch, inputs, number) for number in (0, 1))
            self._held_out.append(self.accelerator.gather_for_metrics(margins))
        if self._image_preference is None:
            return loss
        own = batch.log_probs(0) - inputs[REFERENCE[0]]
        other = None
        if batch.num_parts > 2 and self._image_preference.weight:
            other = batch.log_probs(2) - inputs[OTHER_REFERENCE[0]]
            if self.model.training:
                margins = self.beta * (own - other).detach()
                self._image_margins.append(self.accelerator.gather(margins))
        return loss + image_loss(own, other, preference=self._image_preference, beta=self.beta)

    def _margins(self, batch: PartedBatch, inputs: dict[str, Any], number: int) -> torch.Tensor:
        """Margins `[B]` of the pairs under their own images, or with `number` 1 under others."""
        # TRL's own function for log-probabilities, on what the forward pass has computed already.
        chosen, rejected = self.compute_ref_log_probs(
            batch.forward(None, number), batch.pairs(number)
        )
        names = OTHER_REFERENCE if number else REFERENCE
        ratios = (chosen - inputs[names[0]]) - (rejected - inputs[names[1]])
        margins: torch.Tensor = self.beta * ratios.detach().float()
        return margins

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `DPOTrainer`, with figures of the image term and of the held-out pairs."""
        if "loss" in logs and self._image_margins:
            margins = torch.cat(self._image_margins)
            logs["image/margins"] = margins.mean().item()
            logs["image/accuracies"] = (margins > 0).float().mean().item()
            self._image_margins.clear()
        if "eval_loss" in logs and self._held_out:
            own, other = (torch.cat(part).cpu() for part in zip(*self._held_out, strict=True))
            figures = summarise(own, other, pictures=self._pictures, step=self.state.global_step)
            logs |= validation_logs(figures)
            self._held_out.clear()
        super().log(logs, start_time)

    # TRL calls these two methods from its constructor. It has no public hook for rows that are
    # formatted already, nor for log-probabilities from elsewhere.

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        is_held_out = name == "eval"
        compute = partial(self._compute_reference, dataset, batch_size)
        found = self._recall(compute, is_held_out)
        for column, values in zip((*REFERENCE, *OTHER_REFERENCE), found, strict=False):
            dataset = dataset.add_column(column, values)
        return dataset

    def _compute_reference(self, dataset: Any, batch_size: int, first: int, add: AddBatch) -> None:
        """One pass of the untrained model over the pairs from `first` on, which the ranks share."""
        loader = self.accelerator.prepare(
            DataLoader(
                dataset.select(range(first, len(dataset))),
                batch_size=batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
            )
        )
        # The trainer's own engine does not exist yet, and under ZeRO-3 the weights are sharded.
        if self._reference_engine is None:
            sharded = self.is_deepspeed_enabled
            self._reference_engine = (
                prepare_deepspeed(self.model, self.accelerator) if sharded else self.model
            )
        engine = self._reference_engine
        engine.eval()
        with progress("reference pass", total=len(loader), unit="batches") as advance:
            for inputs in loader:
                batch = PartedBatch(inputs, shared_images=self._shared_images)
                found = self.compute_ref_log_probs(batch.forward(engine), batch.pairs())
                others: Sequence[torch.Tensor] = ()
                if batch.num_parts == 3:
                    others = [batch.log_probs(2)]
                elif batch.num_parts == 4:
                    # With `ld_alpha` a log-probability depends on the other answer of the pair.
                    run = batch.forward(engine, 1)
                    others = self.compute_ref_log_probs(run, batch.pairs(1))
                found = self.accelerator.gather_for_metrics((*found, *others))
                add([part.float().cpu().tolist() for part in found])
                advance()
