"""What a run says while it trains: one JSON line a logging step, for people's tools and ours."""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tita.provenance import software
from tita.recipes import TrainRecipe
from tita.records import TrainProgress
from tita.storage.manifest import describe, sha256_of
from tita.terminal import say
from tita.train.dataset import Inputs, start_digest

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


_PACKAGES = ("torch", "transformers", "trl", "deepspeed", "accelerate", "peft")


def write_history(
    folder: Path,
    *,
    recipe: TrainRecipe,
    inputs: Inputs,
    start: Inputs,
    meta: Mapping[str, Any],
) -> None:
    """Write `run.json`, one SVG a curve and TensorBoard files into the run's folder.

    Args:
        folder: has the progress lines in it already.
        recipe: of the run.
        inputs: what the run read.
        start: the same with the model that DPO started from, another one after a warm-up.
        meta: goes into `run.json` too.
    """
    lines = read_lines(folder / PROGRESS)
    pairs = inputs.pairs_path
    facts = dict(meta) | {
        **software(_PACKAGES),
        "hardware": _hardware(),
        "seed": recipe.seed,
        "start_model": _named(inputs),
        "warmed_up_model": _named(start) if start.model != inputs.model else None,
        "pairs": {
            "path": recipe.pairs,
            "number": len(inputs.pairs),
            "digest": describe(pairs).digest if pairs.is_dir() else sha256_of(pairs),
        },
        "images": {"path": recipe.images, "digest": _images_digest(inputs)},
        "last": asdict(lines[-1]) if lines else None,
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=2))
    for name in ("loss", "reward_margin", "reward_accuracy"):
        (folder / f"{name}.svg").write_text(curve(lines, name))
    _write_tensorboard(lines, folder / "tensorboard")


def _named(inputs: Inputs) -> dict[str, str]:
    return {"name": inputs.model_name, "digest": start_digest(inputs.model)}


def _images_digest(inputs: Inputs) -> str:
    """SHA-256 over names and digests of the images that the run has seen."""
    shown = {p.image for p in inputs.pairs} | {str(q.image) for q in inputs.answers}
    listing = "".join(f"{sha256_of(inputs.images / name)} {name}\n" for name in sorted(shown))
    return hashlib.sha256(listing.encode()).hexdigest()


def _write_tensorboard(lines: Sequence[TrainProgress], folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for line in lines:
            for name, value in asdict(line).items():
                if name not in ("step", "steps"):
                    writer.add_scalar(f"train/{name}", value, line.step)


def _hardware() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def curve(lines: Sequence[TrainProgress], name: str) -> str:
    """One figure of the progress lines over the steps, as an `<svg>` element."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from tita.report import new_axes, svg

    axes = new_axes(xlabel="step", ylabel=name.replace("_", " "))
    # A short run has one line, which without a mark nobody would see.
    axes.plot([x.step for x in lines], [getattr(x, name) for x in lines], "o-", markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return svg(figure)
