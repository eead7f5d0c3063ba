"""What a run says while it trains: one JSON line a logging step, for people's tools and ours."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tita.records import TrainProgress
from tita.terminal import say

PROGRESS = "train.jsonl"
"""The file of a run's progress lines."""


class _Clocked(TrainerCallback):  # type: ignore[misc]
    """Knows how long a step takes, from where this process began."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock where training starts, which after a restart is not at step 0."""
        self._started, self._first_step = time.monotonic(), state.global_step

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def per_step_s(self, state: Any) -> float:
        num_done: int = state.global_step - self._first_step
        return self.elapsed_s() / max(1, num_done)


class ProgressLines(_Clocked):
    """Prints `TrainProgress` lines on rank 0 and keeps them in `train.jsonl`."""

    def __init__(self, path: Path, *, pairs_per_step: int) -> None:
        super().__init__()
        self._path = path
        self._pairs_per_step = pairs_per_step

    def go_on(self, before: Path) -> None:
        """Begin with the lines that a run had written when its checkpoint was saved."""
        if before.is_file() and os.environ.get("RANK", "0") == "0":
            shutil.copyfile(before, self._path)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """Write down what the trainer logs for a step; its closing summary has no loss."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        per_step = self.per_step_s(state)
        line = TrainProgress(
            step=state.global_step,
            steps=state.max_steps,
            loss=logs["loss"],
            reward_margin=logs.get("rewards/margins", 0.0),
            reward_accuracy=logs.get("rewards/accuracies", 0.0),
            learning_rate=logs.get("learning_rate", 0.0),
            samples_per_s=self._pairs_per_step / per_step,
            # TRL counts from where this process began.
            tokens_per_s=logs.get("num_tokens", 0.0) / self.elapsed_s(),
            seconds_left=per_step * (state.max_steps - state.global_step),
            peak_memory_bytes=peak_memory_bytes(),
        )
        text = json.dumps({"progress": asdict(line)})
        print(text, flush=True)
        with self._path.open("a") as file:
            file.write(f"{text}\n")


def read_lines(path: Path) -> list[TrainProgress]:
    """The lines that `ProgressLines` has written; none without a file."""
    if not path.is_file():
        return []
    return [TrainProgress(**json.loads(text)["progress"]) for text in path.read_text().splitlines()]


class SpokenProgress(_Clocked):
    """Says on rank 0 how far the warm-up is; the JSON lines are about the run itself."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """Say a line for what the trainer logs of a step."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        left_s = self.per_step_s(state) * (state.max_steps - state.global_step)
        say(
            f"train-dpo: warm-up step {state.global_step}/{state.max_steps}, loss "
            f"{logs['loss']:.3f}, {left_s:.0f} s left"
        )


def peak_memory_bytes() -> int:
    """The most memory that this process has used: on its GPU if it has one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
