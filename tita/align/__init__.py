"""Guided decoding: a frozen base model, steered token by token by a reward model."""

from tita.align.answers import Alternative, Answer, Said, Token
from tita.align.engine import Engine
from tita.align.options import EngineOptions
from tita.align.requests import Request, Sampling
from tita.vlm import Turn

__all__ = [
    "Alternative",
    "Answer",
    "Engine",
    "EngineOptions",
    "Request",
    "Said",
    "Sampling",
    "Token",
    "Turn",
]
