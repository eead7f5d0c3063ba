"""The inference server: OpenAI's API, LLaVA's worker protocol and a page, on one guided engine."""

from tita.serve.options import Limits, ServeOptions

__all__ = ["Limits", "ServeOptions"]
