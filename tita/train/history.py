"""Where a model came from, and how its training went: `run.json` and the curves."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tita.provenance import software
from tita.recipes import TrainRecipe
from tita.records import TrainProgress
from tita.storage.manifest import describe, sha256_of
from tita.train.inputs import Inputs
from tita.train.progress import PROGRESS, peak_memory_bytes, read_lines
from tita.train.reference import start_digest

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
