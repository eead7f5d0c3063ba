"""What Prometheus may read; names are vLLM's with our prefix (docs.vllm.ai, production metrics)."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tita.align.batch import Batch

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TOKENS = tuple(lead * 10**power for power in range(5) for lead in (1, 2, 5))

_COMPLETE = ("stop", "length")
_OUTCOMES = (*_COMPLETE, "abort", "deadline", "refused", "error")


class Metrics:
    """The server's counters, in a registry of their own."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model_name
        self.running = self._gauge("num_requests_running", "Requests being answered")
        self.waiting = self._gauge("num_requests_waiting", "Requests waiting for a place")
        # Prometheus adapters for autoscalers often cannot name a metric with a colon.
        self.waiting_plain = Gauge(
            "tita_num_requests_waiting", "As tita:num_requests_waiting", registry=self._registry
        )
        self.batch_size = self._gauge("batch_size", "Rows of the last step")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Used part of the KV room, 0 to 1")
        self._requests = Counter(
            "tita:request", "Requests by outcome", ["model_name", "outcome"],
            registry=self._registry,
        )  # fmt: skip
        self._success = Counter(
            "tita:request_success", "Complete answers", ["model_name", "finished_reason"],
            registry=self._registry,
        )  # fmt: skip
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens taken in")
        self.generation_tokens = self._counter("generation_tokens", "Tokens written")
        self.changed_tokens = self._counter("changed_tokens", "Tokens that alignment changed")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompts with images")
        self.prefix_hits = self._counter("prefix_cache_hits", "Of these, with the image's KV kept")
        self.base_s = self._counter("base_seconds", "Time in the base model")
        self.reward_s = self._counter("reward_seconds", "Time in the reward model")
        self.drafts = self._counter("spec_decode_num_drafts", "Rounds in which it drafted")
        self.draft_tokens = self._counter(
            "spec_decode_num_draft_tokens", "Tokens that the reward model drafted"
        )
        self.accepted_tokens = self._counter(
            "spec_decode_num_accepted_tokens", "Of these, those that the answer has"
        )
        self._add_histograms()
        # A counter that appears with its first event hides that event from PromQL's rate().
        for outcome in _OUTCOMES:
            self._requests.labels(model_name, outcome)
        for reason in _COMPLETE:
            self._success.labels(model_name, reason)

    def _add_histograms(self) -> None:
        self.prompt_size = self._histogram("request_prompt_tokens", "Of one prompt", _TOKENS)
        self.answer_size = self._histogram("request_generation_tokens", "Of one answer", _TOKENS)
        self.queue_s = self._histogram(
            "request_queue_time_seconds", "From arrival to a place in the batch", _FIRST_TOKEN_S
        )
        self.prefill_s = self._histogram(
            "request_prefill_time_seconds", "From a place to the first token", _FIRST_TOKEN_S
        )
        self.decode_s = self._histogram(
            "request_decode_time_seconds", "From first to last token", _REQUEST_S
        )
        self.inference_s = self._histogram(
            "request_inference_time_seconds", "From a place to the last token", _REQUEST_S
        )
        self.first_token_s = self._histogram(
            "time_to_first_token_seconds", "From arrival to first token", _FIRST_TOKEN_S
        )
        self.between_s = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one answer", _TOKEN_S
        )
        self.between_s_before = self._histogram(
            "time_per_output_token_seconds", "As inter_token_latency_seconds", _TOKEN_S
        )
        self.per_token_s = self._histogram(
            "request_time_per_output_token_seconds", "Mean between two tokens of one", _TOKEN_S
        )
        self.request_s = self._histogram(
            "e2e_request_latency_seconds", "From arrival to last token", _REQUEST_S
        )

    def outcome(self, name: str) -> None:
        """Count one request: `stop`, `length`, `abort`, `deadline`, `refused` or `error`."""
        self._requests.labels(self._model, name).inc()
        if name in _COMPLETE:
            self._success.labels(self._model, name).inc()

    def load(self, *, running: int, waiting: int) -> None:
        self.running.set(running)
        self.waiting.set(waiting)
        self.waiting_plain.set(waiting)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(f"tita:{name}", what, ["model_name"], registry=self._registry).labels(
            self._model
        )

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(f"tita:{name}", what, ["model_name"], registry=self._registry).labels(
            self._model
        )

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"tita:{name}", what, ["model_name"], buckets=buckets, registry=self._registry
        ).labels(self._model)


class RequestMetrics:
    """One answer as its metrics see it: it is told what happens, when it happens."""

    def __init__(self, metrics: Metrics, *, arrived: float, num_prompt_tokens: int) -> None:
        """Args:
        metrics: of the server.
        arrived: when its request came, on the monotonic clock, in seconds.
        num_prompt_tokens: of its prompt.
        """
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._arrived = self._newest = arrived
        self._admitted: float | None = None
        self._first: float | None = None

    def admitted(self) -> None:
        """It has a place among those that are written."""
        self._admitted = time.monotonic()
        self._metrics.queue_s.observe(self._admitted - self._arrived)
        self._metrics.prompt_tokens.inc(self._num_prompt_tokens)
        self._metrics.prompt_size.observe(self._num_prompt_tokens)

    def said(self, *, counted: bool, changed: bool, now: float) -> None:
        """It went on: by a token that counts, which guidance changed, or by its end alone."""
        metrics, waited_s = self._metrics, now - self._newest
        if self._first is None:
            self._first = now
            metrics.first_token_s.observe(waited_s)
        else:
            metrics.between_s.observe(waited_s)
            metrics.between_s_before.observe(waited_s)
        self._newest = now
        self._num_tokens += counted
        metrics.generation_tokens.inc(counted)
        metrics.changed_tokens.inc(changed)

    def ended(self, outcome: str) -> None:
        """It is over; `outcome` is one of `Metrics.outcome`'s."""
        metrics = self._metrics
        metrics.outcome(outcome)
        metrics.request_s.observe(time.monotonic() - self._arrived)
        if self._admitted is None or self._first is None:
            return
        decode_s = self._newest - self._first
        metrics.answer_size.observe(self._num_tokens)
        metrics.prefill_s.observe(self._first - self._admitted)
        metrics.decode_s.observe(decode_s)
        metrics.inference_s.observe(self._newest - self._admitted)
        if self._num_tokens > 1:
            metrics.per_token_s.observe(decode_s / (self._num_tokens - 1))


class EngineMetrics:
    """Between a batch, which counts for itself, and counters that only go up.

    What the batch did before, as in a warm-up, nobody asked for: it does not count.
    """

    def __init__(self, batch: Batch, *, metrics: Metrics, max_batch: int) -> None:
        self._batch = batch
        self._metrics = metrics
        self._room = max_batch * batch.runners["base"].vlm.context_length
        self._read = self._counts()

    def take(self) -> None:
        """Call it after a step, in the batch's thread."""
        counts = self._counts()
        for counter, count in counts.items():
            counter.inc(count - self._read[counter])
        self._read = counts
        self._metrics.batch_size.set(len(self._batch.runners["base"].keys))
        self._metrics.kv_usage.set(min(self._batch.runners["base"].num_cells / self._room, 1.0))

    def _counts(self) -> dict[Counter, float]:
        batch, metrics = self._batch, self._metrics
        # The reference steers, too: as in the usage block, its time is the reward model's.
        steering = [runner for role, runner in batch.runners.items() if role != "base"]
        return {
            metrics.base_s: batch.runners["base"].seconds,
            metrics.reward_s: sum(runner.seconds for runner in steering),
            metrics.prefix_queries: batch.prefix_cache.num_queries,
            metrics.prefix_hits: batch.prefix_cache.num_hits,
            metrics.drafts: batch.draft_policy.num_rounds,
            metrics.draft_tokens: batch.draft_policy.num_drafted,
            metrics.accepted_tokens: batch.draft_policy.num_accepted,
        }
