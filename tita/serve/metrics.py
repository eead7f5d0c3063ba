"""What Prometheus may read; names are vLLM's with our prefix (docs.vllm.ai, production metrics)."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

_COMPLETE = ("stop", "length")


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
        self.draft_tokens = self._counter(
            "spec_decode_num_draft_tokens", "Tokens that the reward model drafted"
        )
        self.accepted_tokens = self._counter(
            "spec_decode_num_accepted_tokens", "Of these, those that the answer has"
        )
        self.queue_s = self._histogram(
            "request_queue_time_seconds", "From arrival to a place in the batch", _FIRST_TOKEN_S
        )
        self.first_token_s = self._histogram(
            "time_to_first_token_seconds", "From arrival to first token", _FIRST_TOKEN_S
        )
        self.per_token_s = self._histogram(
            "time_per_output_token_seconds", "Between two tokens of one answer", _TOKEN_S
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
