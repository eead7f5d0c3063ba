"""Where a model came from, and how its training went: `run.json` and the curves."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from tita import __version__
from tita.recipes import TrainRecipe
from tita.storage.manifest import describe, sha256_of
from tita.train.progress import ProgressLines, peak_memory_bytes

_PACKAGES = ("torch", "transformers", "trl", "deepspeed", "accelerate", "peft")


def write_history(
    folder: Path,
    *,
    recipe: TrainRecipe,
    model: str,
    pairs: Path,
    num_pairs: int,
    meta: Mapping[str, Any],
    progress: ProgressLines,
) -> None:
    """Write `run.json` and one SVG a curve into the run's folder."""
    start = Path(model)
    facts = dict(meta) | {
        "tita": __version__,
        "git": _git_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "hardware": _hardware(),
        "seed": recipe.seed,
        "start_model": {
            "name": recipe.model,
            "digest": describe(start).digest if start.is_dir() else None,
        },
        "pairs": {
            "path": recipe.pairs,
            "number": num_pairs,
            "digest": describe(pairs).digest if pairs.is_dir() else sha256_of(pairs),
        },
        "last": asdict(progress.lines[-1]) if progress.lines else None,
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=2))
    for name in ("loss", "reward_margin", "reward_accuracy"):
        (folder / f"{name}.svg").write_text(_curve(progress, name))


def _git_version() -> str | None:
    """The commit of the checkout that this code runs from; None in an installed package."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


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


def _curve(progress: ProgressLines, name: str) -> str:
    from matplotlib.figure import Figure

    from tita.report import new_axes, svg

    axes = new_axes(xlabel="step", ylabel=name.replace("_", " "))
    axes.plot(
        [line.step for line in progress.lines], [getattr(line, name) for line in progress.lines]
    )
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return svg(figure)
