"""Prometheus metrics, with the names of vLLM's production metrics and the prefix `tita:`."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tita.align import TokenOutput
from tita.engine.interface import EngineCounts, StepEngine

MetricT = TypeVar("MetricT", Counter, Gauge, Histogram)

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TOKENS = tuple(lead * 10**power for power in range(5) for lead in (1, 2, 5))

_ROLES = ("base", "reward", "reference")
_FINISH_REASONS = ("stop", "length")
_REFUSALS = ("400", "401", "404", "405", "408", "413", "415", "429", "500", "503", "504")
_OUTCOMES = (*_FINISH_REASONS, "abort", "deadline", "refused", "error")


# A series per counter and histogram that says when the process started, which no dashboard uses.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """All metrics of one server, in their own registry."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._updates: list[Callable[[], None]] = []
        self.model_name = model_name
        gauge, counter, histogram = self._gauge, self._counter, self._histogram
        # fmt: off
        self.running = gauge("num_requests_running", "Running requests")
        self.waiting = gauge("num_requests_waiting", "Waiting requests")
        self.batch_size = gauge("batch_size", "Sequences in the batch")
        self.kv_usage = gauge("kv_cache_usage_perc", "Used fraction of the KV cache, 0 to 1")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens")
        self.generation_tokens = counter("generation_tokens", "Generated tokens")
        self.changed_tokens = counter("changed_tokens", "Tokens changed by guidance")
        self.prefix_queries = self._new(
            Counter, "prefix_cache_queries", "Prompts with images, by model role", "role")
        self.prefix_hits = self._new(
            Counter, "prefix_cache_hits", "Prompts whose images were cached, by model role", "role")
        self.base_s = counter("base_seconds", "Time in the base model")
        self.reward_s = counter("reward_seconds", "Time in the reward and reference models")
        self.drafts = counter("spec_decode_num_drafts", "Speculative decoding rounds")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Draft tokens")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Accepted draft tokens")
        self.preemptions = counter("num_preemptions", "Sequences evicted from the KV cache")
        self.prompt_size = histogram(
            "request_prompt_tokens", "Prompt tokens per request", _TOKENS)
        self.answer_size = histogram(
            "request_generation_tokens", "Generated tokens per request", _TOKENS)
        self.queue_s = histogram(
            "request_queue_time_seconds", "From arrival to admission to the batch", _FIRST_TOKEN_S)
        self.prefill_s = histogram(
            "request_prefill_time_seconds", "From admission to the first token", _FIRST_TOKEN_S)
        self.decode_s = histogram(
            "request_decode_time_seconds", "From the first to the last token", _REQUEST_S)
        self.inference_s = histogram(
            "request_inference_time_seconds", "From admission to the last token", _REQUEST_S)
        self.first_token_s = histogram(
            "time_to_first_token_seconds", "From arrival to the first token", _FIRST_TOKEN_S)
        between = self._new(
            Histogram, "inter_token_latency_seconds", "Between two tokens of a request",
            buckets=_TOKEN_S)
        self.between_s = between.labels(model_name)
        self.per_token_s = histogram(
            "request_time_per_output_token_seconds", "Mean time between tokens", _TOKEN_S)
        self.request_s = histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", _REQUEST_S)
        # fmt: on
        # Dashboards of older versions of vLLM know it by this name.
        self._registry.register(_Alias(between, "tita:time_per_output_token_seconds"))
        # Prometheus adapters for autoscalers often do not accept a metric name with a colon.
        self.waiting_plain = Gauge(
            "tita_num_requests_waiting", "As tita:num_requests_waiting", registry=self._registry
        )
        self._requests = self._new(Counter, "request", "Requests by outcome", "outcome")
        self._success = self._new(
            Counter, "request_success", "Completed requests", "finished_reason"
        )
        self._refused = self._new(
            Counter, "refused_requests", "Requests refused before an answer, by HTTP status", "code"
        )
        # PromQL's rate() misses the first event of a counter that appears with it.
        for outcome in _OUTCOMES:
            self._requests.labels(model_name, outcome)
        for reason in _FINISH_REASONS:
            self._success.labels(model_name, reason)
        for code in _REFUSALS:
            self._refused.labels(model_name, code)
        for role in _ROLES:
            self.prefix_queries.labels(model_name, role)
            self.prefix_hits.labels(model_name, role)

    def count_request(self, outcome: str) -> None:
        """Count a request: `stop`, `length`, `abort`, `deadline`, `refused` or `error`."""
        self._requests.labels(self.model_name, outcome).inc()
        if outcome in _FINISH_REASONS:
            self._success.labels(self.model_name, outcome).inc()

    def count_tokens(self, outputs: Sequence[TokenOutput]) -> None:
        """Count the tokens of a step."""
        self.generation_tokens.inc(sum(each.counted for each in outputs))
        self.changed_tokens.inc(sum(each.changed for each in outputs))

    def count_refusal(self, status: int) -> None:
        """Count a request that got an error status instead of an answer."""
        self._refused.labels(self.model_name, str(status)).inc()

    def set_load(self, *, running: int, waiting: int) -> None:
        self.running.set(running)
        self.waiting.set(waiting)
        self.waiting_plain.set(waiting)

    def on_read(self, update: Callable[[], None]) -> None:
        """Have `update` called each time before the metrics are read."""
        self._updates.append(update)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format. Call it on one thread."""
        for update in self._updates:
            update()
        return generate_latest(self._registry)

    def _new(
        self, kind: type[MetricT], name: str, help: str, *labels: str, **options: Any
    ) -> MetricT:
        labels = ("model_name", *labels)
        return kind(f"tita:{name}", help, labels, registry=self._registry, **options)

    def _gauge(self, name: str, help: str) -> Gauge:
        return self._new(Gauge, name, help).labels(self.model_name)

    def _counter(self, name: str, help: str) -> Counter:
        return self._new(Counter, name, help).labels(self.model_name)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return self._new(Histogram, name, help, buckets=buckets).labels(self.model_name)


class _Alias(Collector):
    """A metric under a second name, so that every event is recorded once."""

    def __init__(self, metric: Histogram, name: str) -> None:
        self._metric = metric
        self._name = name

    def collect(self) -> Iterator[Metric]:
        for metric in self._metric.collect():
            alias = Metric(self._name, f"As {metric.name.partition(':')[2]}", metric.type)
            for sample in metric.samples:
                name = sample.name.replace(metric.name, self._name, 1)
                alias.add_sample(name, sample.labels, sample.value)
            yield alias


class RequestMetrics:
    """Records the metrics of one request."""

    def __init__(self, metrics: Metrics, *, arrived: float, num_prompt_tokens: int) -> None:
        """`arrived` is the request's arrival on the monotonic clock, in seconds."""
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._arrived = self._last = arrived
        self._admitted: float | None = None
        self._first: float | None = None

    def admitted(self) -> None:
        """Record that the request has joined the batch."""
        self._admitted = time.monotonic()
        self._metrics.queue_s.observe(self._admitted - self._arrived)
        self._metrics.prompt_tokens.inc(self._num_prompt_tokens)
        self._metrics.prompt_size.observe(self._num_prompt_tokens)

    def token(self, *, counted: bool, now: float) -> None:
        """Record a token's times; `counted` is false for the end-of-text token.

        `Metrics.count_tokens` counts those of all requests.
        """
        metrics, waited_s = self._metrics, now - self._last
        if self._first is None:
            self._first = now
            metrics.first_token_s.observe(waited_s)
        else:
            metrics.between_s.observe(waited_s)
        self._last = now
        self._num_tokens += counted

    def finished(self, outcome: str) -> None:
        """Record the end of the request, with an outcome of `Metrics.count_request`."""
        metrics = self._metrics
        metrics.count_request(outcome)
        metrics.request_s.observe(time.monotonic() - self._arrived)
        if self._admitted is None or self._first is None:
            return
        decode_s = self._last - self._first
        metrics.answer_size.observe(self._num_tokens)
        metrics.prefill_s.observe(self._first - self._admitted)
        metrics.decode_s.observe(decode_s)
        metrics.inference_s.observe(self._last - self._admitted)
        if self._num_tokens > 1:
            metrics.per_token_s.observe(decode_s / (self._num_tokens - 1))


class EngineMetrics:
    """Copies the counts that an engine keeps itself into the server's metrics, when they are read.

    Counts from before its creation, such as those of the warm-up, are not included.
    """

    def __init__(self, engine: StepEngine, *, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._counts = self._of(engine.counts())
        metrics.on_read(self.update)

    def update(self) -> None:
        """Copy the counts as they are now."""
        found = self._engine.counts()
        counts = self._of(found)
        for counter, count in counts.items():
            counter.inc(count - self._counts[counter])
        self._counts = counts
        self._metrics.batch_size.set(found.num_sequences)
        self._metrics.kv_usage.set(found.kv_usage)

    def _of(self, found: EngineCounts) -> dict[Counter, float]:
        metrics = self._metrics
        counts: dict[Counter, float] = {
            metrics.base_s: found.base_s,
            metrics.reward_s: found.reward_s,
            metrics.drafts: found.num_drafts,
            metrics.draft_tokens: found.num_draft_tokens,
            metrics.accepted_tokens: found.num_accepted_tokens,
            metrics.preemptions: found.num_preemptions,
        }
        for role, number in found.prefix_queries.items():
            counts[metrics.prefix_queries.labels(metrics.model_name, role)] = number
        for role, number in found.prefix_hits.items():
            counts[metrics.prefix_hits.labels(metrics.model_name, role)] = number
        return counts
