"""The record of a run: progress lines while it trains; `run.json` and the curves at the end."""

import math
import os
import platform
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tita.data.rows import dataset_files
from tita.json_text import dump_json
from tita.provenance import software
from tita.recipes import TrainRecipe
from tita.records import TrainProgress, ValidationFigures, read_progress
from tita.report import new_axes, svg
from tita.settings import settings
from tita.storage.locate import known_digest
from tita.storage.manifest import build_manifest, sha256_of
from tita.terminal import say
from tita.train.training_data import TrainInputs, start_model_digest
from tita.train.validation import read_logs, sight_warning

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
        # transformers would keep the intervals of the start that saved the checkpoint.
        state.compute_steps(args, state.max_steps)

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
        self._last: TrainProgress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Continue with the lines of the checkpoint."""
        super().on_train_begin(args, state, control, **options)
        lines = read_lines(self._path)
        self._last = lines[-1] if lines else None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """Report the step, and again with the figures of the held-out pairs."""
        super().on_log(args, state, control, logs)
        figures = read_logs(logs or {})
        if figures is not None and self._last is not None and state.is_world_process_zero:
            self._write(replace(self._last, validation=figures))

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
            validation=None if self._last is None else self._last.validation,
        )
        self._write(line)

    def _write(self, line: TrainProgress) -> None:
        self._last = line
        text = dump_json({"progress": asdict(line)})
        print(text, flush=True)
        with self._path.open("a") as file:
            file.write(f"{text}\n")


def read_lines(path: Path) -> list[TrainProgress]:
    """The progress records of a `train.jsonl`; of a repeated step, the last one."""
    text = path.read_text() if path.is_file() else ""
    lines = (read_progress(line) for line in text.splitlines())
    return list({line.step: line for line in lines if line is not None}.values())


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
    kept_step: int | None = None,
) -> None:
    """Write `run.json`, with `meta` in it, one SVG per curve and TensorBoard files to the folder.

    `start` is `inputs` with DPO's starting model, which differs after a warm-up; `kept_step` the
    step of the weights that the run ends with, if they are not the last ones.
    """
    # Only rank 0 needs TensorBoard, and its import takes seconds.
    from torch.utils.tensorboard import SummaryWriter

    lines = read_lines(folder / PROGRESS_FILE)
    kept = kept_figures(lines, step=kept_step)
    found = (divergence_warning(lines), None if kept is None else sight_warning(kept))
    warnings = [warning for warning in found if warning is not None]
    for warning in warnings:
        say(f"train-dpo: warning: {warning}")
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
            "digest": _digest_pairs(inputs.pairs_path),
        },
        "images": {"path": recipe.images, "digest": inputs.images_digest()},
        "last": asdict(lines[-1]) if lines else None,
        "validation": kept and _validation_facts(inputs, kept, source=recipe.validation),
        "warnings": warnings,
    }
    (folder / "run.json").write_text(dump_json(facts, indent=2))
    for name in ("loss", "reward_margin", "reward_accuracy"):
        (folder / f"{name}.svg").write_text(plot_curve(lines, name))
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for line in lines:
            for name, value in asdict(line).items():
                if name not in ("step", "steps", "validation") and value is not None:
                    writer.add_scalar(f"train/{name}", value, line.step)
        for figures in evaluations(lines):
            for name, value in asdict(figures).items():
                if name != "step":
                    writer.add_scalar(f"validation/{name}", value, figures.step)


def _digest_pairs(path: Path) -> str:
    """The digest of a file; that of a folder in the store; of another folder that of its rows.

    Folders may have terabytes of images beside the rows, whose digests are known already.
    """
    if not path.is_dir():
        return sha256_of(path)
    if (digest := known_digest(path)) is not None:
        return digest
    files = (file.relative_to(path).as_posix() for file in dataset_files(path))
    return build_manifest(path, paths=files).digest


def _model_facts(inputs: TrainInputs) -> dict[str, str]:
    return {"name": inputs.model_name, "digest": start_model_digest(inputs.model)}


def divergence_warning(lines: Sequence[TrainProgress]) -> str | None:
    """A warning if the loss ends as NaN or infinite; else None."""
    step = None
    for line in reversed(lines):
        if math.isfinite(line.loss):
            break
        step = line.step
    if step is None:
        return None
    return (
        f"the loss is {lines[-1].loss} from step {step} on: training diverged; lower learning_rate"
    )


def evaluations(lines: Sequence[TrainProgress]) -> list[ValidationFigures]:
    """The figures of the held-out pairs at each step where they were evaluated."""
    found = (line.validation for line in lines)
    return list({figures.step: figures for figures in found if figures is not None}.values())


def kept_figures(lines: Sequence[TrainProgress], *, step: int | None) -> ValidationFigures | None:
    """The figures at `step`, or the last ones; None without held-out pairs."""
    found = evaluations(lines)
    return next((f for f in reversed(found) if step in (None, f.step)), None)


def _validation_facts(
    inputs: TrainInputs, kept: ValidationFigures, *, source: str | float | None
) -> dict[str, Any]:
    pictures = {inputs.image_digests[pair.image] for pair in inputs.validation}
    numbers = {"pairs": len(inputs.validation), "images": len(pictures)}
    return {"source": source, **numbers, **asdict(kept)}


def plot_curve(lines: Sequence[TrainProgress], name: str) -> str:
    """One figure of the progress lines over the steps, as an `<svg>` element.

    With held-out pairs, also the same figure of these, under their own images and under others.
    """
    # Only rank 0 needs matplotlib.
    from matplotlib.ticker import MaxNLocator

    axes = new_axes(xlabel="step", ylabel=name.replace("_", " "))
    # Without markers, the single point of a short run would be invisible.
    draw = partial(axes.plot, markersize=3)
    draw([x.step for x in lines], [getattr(x, name) for x in lines], "o-", label="training")
    held_out, figure = evaluations(lines), name.removeprefix("reward_")
    if held_out:
        for prefix, label in (("", "held out"), ("other_", "held out, other images")):
            values = [getattr(each, prefix + figure) for each in held_out]
            draw([each.step for each in held_out], values, "s--", label=label)
        axes.legend()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return svg(axes)
