"""Guided decoding: a frozen base model, steered token by token by a reward model."""

from tita.align.engine import Engine
from tita.align.requests import Answer, Request, Sampling, Token

__all__ = ["Answer", "Engine", "Request", "Sampling", "Token"]
