"""Inference server: OpenAI's API, LLaVA's worker protocol and a web page on one engine."""

from tita.serve.serve_options import Limits, ServeOptions

__all__ = ["Limits", "ServeOptions"]
