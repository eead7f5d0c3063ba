"""A worker of `train-dpo` that saves logits for the tests, or fails on demand.

`SAID` names a file for the trained model's logits of the first pairs, before the model is saved.
`FAULT` is one of: `oom` or `hang`, in the last rank's second step; `slow-reference`, the last rank
does not finish the reference log-probabilities; `no-model`, the store rejects only the final model;
`slow-model`, its upload is slow; `slow-word`, rank 0 reports an error late; `freeze-<phase>`, the
last rank is frozen in that phase; `kill-reference`, rank 0 is killed in the third batch of the
reference pass, of which every batch is stored.
"""

import os
import signal
import time
from typing import Any

import torch

from tita.activity import mark_progress
from tita.errors import StoreUnavailable
from tita.storage.directory import DirectoryStore
from tita.train import __main__ as started
from tita.train import checkpoints, group, reference
from tita.train import trainer as trainer_module
from tita.train.trainer import PairTrainer

batches: list[int] = []
report_error = started.report_error
save_model, training_step = trainer_module.save_model, PairTrainer.training_step
compute_ref_log_probs, push_tree = PairTrainer.compute_ref_log_probs, DirectoryStore.push_tree


def first_batch(collate: Any, rows: Any) -> dict[str, Any]:
    """Model inputs of the first two pairs."""
    batch = collate([rows[i] for i in range(2)])
    return {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}


def save_logits_and_model(trainer: Any, **options: Any) -> None:
    # Not after the warm-up.
    if isinstance(trainer, PairTrainer):
        batch = first_batch(trainer.data_collator, trainer.train_dataset)
        trainer.model_wrapped.eval()
        with torch.no_grad():
            logits = trainer.model_wrapped(**trainer._prepare_inputs(batch)).logits
        if trainer.is_world_process_zero():
            torch.save(logits.float().cpu(), os.environ["SAID"])
    save_model(trainer, **options)


def is_last_rank() -> bool:
    return int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


def slow_reference(self: Any, *arguments: Any) -> Any:
    if is_last_rank():
        print("the last rank computes slowly", flush=True)
        time.sleep(600)
    return compute_ref_log_probs(self, *arguments)


def killed_reference(self: Any, *arguments: Any) -> Any:
    batches.append(len(arguments))
    if len(batches) == 3 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return compute_ref_log_probs(self, *arguments)


def push_model_slowly(self: Any, folder: Any, prefix: str, **options: Any) -> Any:
    if prefix == "runs/a":
        print("the upload is slow", flush=True)
        for _ in range(20):
            time.sleep(0.5)
            mark_progress()  # as each part that is sent does
    return push_tree(self, folder, prefix, **options)


def push_no_model(self: Any, folder: Any, prefix: str, **options: Any) -> Any:
    if prefix == "runs/a":
        raise StoreUnavailable("away")
    return push_tree(self, folder, prefix, **options)


def failing_step(self: Any, *arguments: Any, **options: Any) -> Any:
    if self.state.global_step == 1 and is_last_rank():
        if os.environ["FAULT"] == "oom":
            if torch.cuda.is_available():
                torch.empty(2**46, device="cuda")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        time.sleep(600)
    return training_step(self, *arguments, **options)


def report_late(error: BaseException, **options: Any) -> int:
    if os.environ["RANK"] == "0":
        time.sleep(3)
    return report_error(error, **options)


def freezing(work: Any) -> Any:
    """`work`, before which the last rank stops for ever."""

    def frozen(*arguments: Any, **options: Any) -> Any:
        if is_last_rank():
            print("the last rank freezes", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        return work(*arguments, **options)

    return frozen


def freeze(phase: str) -> None:
    if phase == "start":
        started.main = freezing(started.main)
    elif phase == "rendezvous":
        group.deepspeed.init_distributed = freezing(group.deepspeed.init_distributed)
    elif phase == "load":
        trainer_module.load_model = freezing(trainer_module.load_model)
    elif phase == "reference":
        PairTrainer.compute_ref_log_probs = freezing(compute_ref_log_probs)
    elif phase == "step":
        PairTrainer.training_step = freezing(training_step)
    elif phase == "checkpoint":
        checkpoints.Checkpoints.on_save = freezing(checkpoints.Checkpoints.on_save)
    else:
        raise ValueError(phase)


if __name__ == "__main__":
    if "SAID" in os.environ:
        trainer_module.save_model = save_logits_and_model
    if os.environ.get("FAULT") == "slow-reference":
        PairTrainer.compute_ref_log_probs = slow_reference
    elif os.environ.get("FAULT") == "kill-reference":
        reference.STORE_EVERY_S = 0.0
        PairTrainer.compute_ref_log_probs = killed_reference
    elif os.environ.get("FAULT") == "slow-model":
        DirectoryStore.push_tree = push_model_slowly
    elif os.environ.get("FAULT") == "slow-word":
        started.report_error = report_late
    elif os.environ.get("FAULT") == "no-model":
        DirectoryStore.push_tree = push_no_model
        checkpoints.retry_store.__kwdefaults__["pauses_s"] = (0.1,)
    elif os.environ.get("FAULT", "").startswith("freeze-"):
        freeze(os.environ["FAULT"].removeprefix("freeze-"))
    elif "FAULT" in os.environ:
        PairTrainer.training_step = failing_step
    started.main()
