"""The interface of an inference engine: requests in, tokens out.

`StepEngine` is what the server's scheduler thread drives; `AnswerEngine` answers lists of requests.
The same `Request`, `PreparedRequest` and `TokenOutput` go in and out of every engine.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tita.align.prompts import PreparedRequest, Preparer
from tita.align.requests import Answer, Outcome, Request
from tita.engine.engine_options import EngineName
from tita.errors import TitaError


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an engine can do beyond answering, in which engines differ."""

    name: EngineName
    drafts: bool
    """Whether the reward model can draft tokens that the base model verifies."""
    views: bool
    """Whether the base model can run a second time, on another view of the request."""
    reports_seconds: bool
    """Whether the time in each model is known."""

    def describe(self) -> str:
        """The engine, and what it lacks, for the log."""
        lacks = {
            "does not draft": not self.drafts,
            "has no forms with a second view": not self.views,
            "does not tell the time in each model": not self.reports_seconds,
        }
        return "; ".join(
            [f"engine {self.name}", *(what for what, missing in lacks.items() if missing)]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounts:
    """Counts since an engine was created, and its present load."""

    num_sequences: int = 0
    """Sequences in the batch."""
    kv_usage: float = 0.0
    """Used fraction of the KV cache, 0 to 1."""
    num_preemptions: int = 0
    """Sequences that were evicted from the KV cache and computed again."""
    base_s: float = 0.0
    """Seconds in the base model; 0 if the engine does not measure them."""
    reward_s: float = 0.0
    """Seconds in reward and reference model; 0 if the engine does not measure them."""
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    prefix_queries: Mapping[str, int] = field(default_factory=dict)
    """Lookups in the prefix cache by model role."""
    prefix_hits: Mapping[str, int] = field(default_factory=dict)


class StepEngine(Protocol):
    """A continuous batch. Not thread-safe, except where a method says so and for `preparer`."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def preparer(self) -> Preparer: ...

    @property
    def alive(self) -> bool:
        """False if the engine's processes have ended: only a new engine can answer. Thread-safe."""

    def __len__(self) -> int: ...

    def admit(self, key: Hashable, prepared: PreparedRequest) -> None:
        """Add a request.

        Raises:
            TitaError: the engine cannot answer it.
        """

    def release(self, key: Hashable) -> None:
        """Abort a request, whatever its state."""

    def clear(self) -> None:
        """Abort all requests."""

    def step(self) -> list[tuple[Hashable, Outcome]]:
        """Wait for the next tokens; a request that got its last outcome is removed."""

    def counts(self) -> EngineCounts:
        """The counts, during a step perhaps of a part of it. Thread-safe.

        Not for every step: vLLM collects all its metrics for them.
        """

    def close(self) -> None:
        """Free the engine's processes and memory."""


class AnswerEngine(Protocol):
    """Answers lists of requests."""

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers in the order of the requests.

        Raises:
            TitaError: the first error, after all others are answered.
        """

    def generate_as_completed(
        self, requests: Iterable[Request], *, batch_size: int
    ) -> Iterator[tuple[int, Answer | TitaError]]:
        """The number of a request and its answer or error, as they are completed."""

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Outcome]]:
        """The number of a request, and its next token or the error that ended it."""

    def close(self) -> None:
        """End the engine's processes, if it has any."""
