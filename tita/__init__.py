"""Token-level inference-time alignment for vision-language models (arXiv 2510.21794)."""

__version__ = "0.1.0"
