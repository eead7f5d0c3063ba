"""How much the demo does, and with which hyperparameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WEIGHTS = (0.0, 0.1, 0.3, 0.5, 1.0)
"""Guidance weights that are compared; 0 is the base alone, 1 the reward model alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much the demo does; three questions a scene."""

    num_train: int
    num_validation: int
    num_test: int
    pairs: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


# SeVa's noise is mild: it leaves the big, bright digits of 32 pixels readable.
_PAIRS = {"dtype": "float32", "max_new_tokens": 8, "batch_size": 128, "noise": "ddpm"}
_TRAIN = {
    "dtype": "float32",
    "gradient_checkpointing": False,
    "freeze_vision": False,
    "learning_rate": 5e-4,
    "epochs": 2,
    "batch_size": 8,
    "max_length": 64,
}
FULL = Plan(num_train=800, num_validation=200, num_test=400, pairs=_PAIRS, train=_TRAIN)
QUICK = Plan(
    num_train=100, num_validation=30, num_test=60, pairs=_PAIRS, train={**_TRAIN, "max_steps": 10}
)
