"""The server's own figures of a run, from its Prometheus metrics before and after it.

Names: vLLM's production metrics (docs.vllm.ai, "Metrics"), which `tita serve` has with the prefix
`tita:`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from tita.bench.endpoint import http_get
from tita.json_text import dump_json
from tita.storage.files import atomic_path

_TIMEOUT_S = 5.0
_HISTOGRAMS = (
    "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
)  # fmt: skip
_COUNTERS = (
    "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits",
    "num_preemptions", "request_success",
)  # fmt: skip

Samples = Mapping[str, float]
"""Sums over all labels, by the name of the sample without the prefix of the server."""


def read_metrics(base_url: str, *, key: SecretStr | None) -> Samples | None:
    """The metrics at `/metrics` beside `/v1`; None if there are none."""
    url = f"{base_url.removesuffix('/v1')}/metrics"
    try:
        response = http_get(url, key=key, timeout_s=_TIMEOUT_S)
        response.raise_for_status()
        return parse_metrics(response.text)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None


def parse_metrics(text: str) -> Samples | None:
    """The known samples of a text in Prometheus' format; None if it has none.

    Raises:
        ValueError: the text has another format.
    """
    wanted = {f"{name}_{part}" for name in _HISTOGRAMS for part in ("sum", "count")}
    wanted |= {f"{name}_total" for name in _COUNTERS}
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            _, colon, name = sample.name.partition(":")
            # `tita serve` counts the prefix cache of each model, and every prompt in each of them.
            is_base = sample.labels.get("role", "base") == "base"
            if colon and name in wanted and is_base:
                samples[name] = samples.get(name, 0.0) + sample.value
    return samples or None


def difference(before: Samples, after: Samples) -> dict[str, Any] | None:
    """What the server counted in between: means of times in seconds, and counts.

    None if a counter went back or is no number: the server was restarted, or another replica
    answered.
    """
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    if not all(math.isfinite(value) and value >= 0 for value in gained.values()):
        return None
    figures: dict[str, Any] = {}
    for name in _HISTOGRAMS:
        num = gained.get(f"{name}_count", 0.0)
        if num > 0:
            title = name.removesuffix("_seconds")
            figures[title] = {"num": int(num), "mean": gained[f"{name}_sum"] / num}
    for name in _COUNTERS:
        if f"{name}_total" in gained:
            figures[name] = int(gained[f"{name}_total"])
    return figures


def figures_path(results: Path) -> Path:
    """The file beside a results file that has the server's figures by session."""
    return results.with_name(f"{results.stem}.server.json")


def write_figures(results: Path, *, session: str, figures: Mapping[str, Any]) -> None:
    """Add the server's figures of one session."""
    path = figures_path(results)
    with atomic_path(path) as temporary:
        temporary.write_text(
            dump_json({**read_figures(results), session: figures}, indent=2) + "\n"
        )


def read_figures(results: Path) -> dict[str, Any]:
    """The server's figures by session; empty without a file, or if it is damaged."""
    try:
        figures = json.loads(figures_path(results).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return figures if isinstance(figures, dict) else {}
