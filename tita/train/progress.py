"""What a run says while it trains: one JSON line a logging step, for people's tools and ours."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tita.records import TrainProgress


class ProgressLines(TrainerCallback):  # type: ignore[misc]
    """Prints `TrainProgress` lines on rank 0 and keeps them in `train.jsonl`."""

    def __init__(self, path: Path, *, pairs_per_step: int) -> None:
        self._path = path
        self._pairs_per_step = pairs_per_step
        self._started = time.monotonic()
        self._first_step = 0
        self.lines: list[TrainProgress] = []

    def go_on(self, before: Path) -> None:
        """Begin with the lines that a run had written when its checkpoint was saved."""
        if not before.is_file():
            return
        text = before.read_text()
        self.lines = [TrainProgress(**json.loads(line)["progress"]) for line in text.splitlines()]
        if os.environ.get("RANK", "0") == "0":
            self._path.write_text(text)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock where training starts, which after a restart is not at step 0."""
        self._started, self._first_step = time.monotonic(), state.global_step

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """Write down what the trainer logs for a step; its closing summary has no loss."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        elapsed = time.monotonic() - self._started
        per_step = elapsed / max(1, state.global_step - self._first_step)
        line = TrainProgress(
            step=state.global_step,
            steps=state.max_steps,
            loss=logs["loss"],
            reward_margin=logs.get("rewards/margins", 0.0),
            reward_accuracy=logs.get("rewards/accuracies", 0.0),
            learning_rate=logs.get("learning_rate", 0.0),
            samples_per_s=self._pairs_per_step / per_step,
            seconds_left=per_step * (state.max_steps - state.global_step),
            peak_memory_bytes=peak_memory_bytes(),
        )
        self.lines.append(line)
        text = json.dumps({"progress": asdict(line)})
        print(text, flush=True)
        with self._path.open("a") as file:
            file.write(f"{text}\n")


def peak_memory_bytes() -> int:
    """The most memory that this process has used: on its GPU if it has one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
