"""Two trained models, weight by weight."""

from pathlib import Path

import torch

from tita.vlm import load_vlm


def weights(model: Path) -> dict[str, torch.Tensor]:
    """As `from_pretrained` loads them: files of ZeRO-3 and of merged LoRA have other names."""
    state: dict[str, torch.Tensor] = load_vlm(str(model), dtype="float32").model.state_dict()
    return state


def largest_difference(one: Path, other: Path) -> float:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)
