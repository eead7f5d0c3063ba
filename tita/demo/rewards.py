"""The reward models that are compared: recipes of their pairs and of their training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tita.demo.methods import Condition, uses_noise

# SeVa's noise is too weak here: the large, bright digits of 32 pixels stay readable.
PAIRS: Mapping[str, Any] = {
    "dtype": "float32",
    "max_new_tokens": 8,
    "batch_size": 128,
    "noise": "ddpm",
}
"""Recipe of `build-pairs`: the answer to an image is preferred to that to the image under noise."""
TRAIN: Mapping[str, Any] = {
    "dtype": "float32",
    "gradient_checkpointing": False,
    "freeze_vision": False,
    "learning_rate": 5e-4,
    "epochs": 2,
    "batch_size": 8,
    "max_length": 64,
}
"""Recipe of `train-dpo`. A model this small needs a higher learning rate than 2e-6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """How one reward model is made: overrides of the recipes of both jobs."""

    name: str
    pairs: Mapping[str, Any]
    train: Mapping[str, Any]


def noise_config(pairs: Mapping[str, Any], train: Mapping[str, Any]) -> RewardConfig:
    """Pairs of distorted images, and DPO alone."""
    return RewardConfig(name="noise pairs", pairs=pairs, train=train)


def contrast_config(
    pairs: Mapping[str, Any], train: Mapping[str, Any], teacher: Condition
) -> RewardConfig:
    """Pairs that a contrast teaches, balanced, and DPO with the terms of the image.

    Args:
        pairs: recipe for the rejected answers.
        train: recipe of the training.
        teacher: a form that needs no reward model.
    """
    guidance = teacher.guidance
    contrast: dict[str, Any] = {"form": guidance.form, "weight": guidance.weight}
    if uses_noise(teacher):
        contrast["noise_step"] = guidance.noise_step
    return RewardConfig(
        name="contrast pairs",
        pairs={**pairs, "strategy": "contrast", "contrast": contrast},
        train={**train, "image_preference": {"weight": 1.0}, "balance": "answers"},
    )
