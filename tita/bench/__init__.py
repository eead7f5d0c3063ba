"""Benchmarks of vision-language endpoints and models: quality, latency, tokens and cost."""
