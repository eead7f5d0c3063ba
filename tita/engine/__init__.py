"""Inference engines behind one interface: transformers in this process, or vLLM."""
