"""The record of a run: progress lines while it trains; `run.json` and the curves at the end."""

import json
import os
import platform
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tita.provenance import software
from tita.recipes import TrainRecipe
from tita.records import TrainProgress
from tita.report import new_axes, svg
from tita.settings import settings
from tita.storage.manifest import build_manifest, sha256_of
from tita.terminal import say
from tita.train.training_data import TrainInputs, start_model_digest

PROGRESS_FILE = "train.jsonl"
"""The file of a run's progress lines."""
_PACKAGES = ("torch", "transformers", "trl", "deepspeed", "accelerate", "peft")


class _ProgressReporter(TrainerCallback, ABC):  # type: ignore[misc]
    """Reports every logging step on rank 0, with the time per step since this process started."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; a resumed run does not start at step 0."""
        self._started, self._first_step = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log the last step, which need not be a multiple of `logging_steps`."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """Report the step; the trainer's final summary has no loss and is skipped."""
        if state.is_world_process_zero and logs and "loss" in logs:
            self.elapsed_s = time.monotonic() - self._started
            self.per_step_s = self.elapsed_s / max(1, state.global_step - self._first_step)
            self.report(state, logs)

    @abstractmethod
    def report(self, state: Any, logs: Mapping[str, float]) -> None: ...


class ProgressLines(_ProgressReporter):
    """Prints `TrainProgress` lines and keeps them in `train.jsonl`."""

    def __init__(self, path: Path, *, pairs_per_step: int) -> None:
        super().__init__()
        self._path = path
        self._pairs_per_step = pairs_per_step

    def report(self, state: Any, logs: Mapping[str, float]) -> None:
        line = TrainProgress(
            step=state.global_step,
            steps=state.max_steps,
            loss=logs["loss"],
            reward_margin=logs.get("rewards/margins", 0.0),
            reward_accuracy=logs.get("rewards/accuracies", 0.0),
            learning_rate=logs.get("learning_rate", 0.0),
            samples_per_s=self._pairs_per_step / self.per_step_s,
            # TRL counts tokens from the start of this process.
            tokens_per_s=logs.get("num_tokens", 0.0) / self.elapsed_s,
            seconds_left=self.per_step_s * (state.max_steps - state.global_step),
            peak_memory_bytes=peak_memory_bytes(),
            image_margin=logs.get("image/margins"),
            image_accuracy=logs.get("image/accuracies"),
        )
        text = json.dumps({"progress": asdict(line)})
        print(text, flush=True)
        with self._path.open("a") as file:
            file.write(f"{text}\n")


class WarmUpProgress(_ProgressReporter):
    """Reports the warm-up as text; the JSON lines are for DPO only."""

    def report(self, state: Any, logs: Mapping[str, float]) -> None:
        left_s = self.per_step_s * (state.max_steps - state.global_step)
        step = f"{state.global_step}/{state.max_steps}"
        say(f"train-dpo: warm-up step {step}, loss {logs['loss']:.3f}, {left_s:.0f} s left")


def peak_memory_bytes() -> int:
    """This process's peak memory: of its GPU if it has one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_history(
    folder: Path,
    *,
    recipe: TrainRecipe,
    inputs: TrainInputs,
    start: TrainInputs,
    meta: Mapping[str, Any],
) -> None:
    """Write `run.json`, with `meta` in it, one SVG per curve and TensorBoard files to the folder.

    `start` is `inputs` with DPO's starting model, which differs after a warm-up.
    """
    # Only rank 0 needs TensorBoard, and its import takes seconds.
    from torch.utils.tensorboard import SummaryWriter

    path = folder / PROGRESS_FILE
    text = path.read_text() if path.is_file() else ""
    lines = [TrainProgress(**json.loads(line)["progress"]) for line in text.splitlines()]
    pairs = inputs.pairs_path
    facts = dict(meta) | {
        **software(_PACKAGES),
        "release": settings().release,
        "namespace": settings().namespace,
        "hardware": {
            "machine": platform.machine(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "peak_memory_bytes": peak_memory_bytes(),
        },
        "seed": recipe.seed,
        "start_model": _model_facts(inputs),
        "warmed_up_model": _model_facts(start) if start.model != inputs.model else None,
        "pairs": {
            "path": recipe.pairs,
            "number": len(inputs.pairs),
            "left_out": dict(inputs.left_out),
            "shortcuts": inputs.shortcuts and inputs.shortcuts.as_json(),
            "digest": build_manifest(pairs).digest if pairs.is_dir() else sha256_of(pairs),
        },
        "images": {"path": recipe.images, "digest": inputs.images_digest()},
        "last": asdict(lines[-1]) if lines else None,
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=2))
    for name in ("loss", "reward_margin", "reward_accuracy"):
        (folder / f"{name}.svg").write_text(plot_curve(lines, name))
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for line in lines:
            for name, value in asdict(line).items():
                if name not in ("step", "steps") and value is not None:
                    writer.add_scalar(f"train/{name}", value, line.step)


def _model_facts(inputs: TrainInputs) -> dict[str, str]:
    return {"name": inputs.model_name, "digest": start_model_digest(inputs.model)}


def plot_curve(lines: Sequence[TrainProgress], name: str) -> str:
    """One figure of the progress lines over the steps, as an `<svg>` element."""
    # Only rank 0 needs matplotlib.
    from matplotlib.ticker import MaxNLocator

    axes = new_axes(xlabel="step", ylabel=name.replace("_", " "))
    # Without markers, the single point of a short run would be invisible.
    axes.plot([x.step for x in lines], [getattr(x, name) for x in lines], "o-", markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return svg(axes)
