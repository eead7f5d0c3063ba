"""Guided decoding: a frozen base model, steered token by token by a reward model.

Importing this package loads no torch; `Engine` loads it at first use.
"""

from typing import TYPE_CHECKING, Any

from tita.align.forms import Guidance
from tita.align.requests import (
    Alternative,
    Answer,
    EngineOptions,
    Request,
    Sampling,
    Token,
    TokenOutput,
)
from tita.vlm.prompts import Turn

if TYPE_CHECKING:
    from tita.align.engine import Engine

__all__ = [
    "Alternative",
    "Answer",
    "Engine",
    "EngineOptions",
    "Guidance",
    "Request",
    "Sampling",
    "Token",
    "TokenOutput",
    "Turn",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from tita.align.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
