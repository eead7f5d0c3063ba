"""The shape of a load: requests in flight, arrival times, duration, and warm-up requests."""

import itertools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tita.errors import TitaError

if TYPE_CHECKING:
    from tita.bench.questions import BenchmarkItem

DEFAULT_CONCURRENCY = 8
_OPEN_CONCURRENCY = 256
"""Default limit of requests in flight with a request rate, where the rate is the load."""
_ARRIVAL_SEED = 0


class Arrivals(StrEnum):
    """Distribution of the times between requests at a given rate."""

    CONSTANT = "constant"
    POISSON = "poisson"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """How requests are sent to an endpoint.

    Without a rate the load is closed: the next request is sent when one ends, so that
    `concurrency` requests are in flight. With a rate it is open, up to `concurrency`.
    """

    concurrency: int = DEFAULT_CONCURRENCY
    """Maximum number of requests in flight."""
    rate: float | None = None
    """Requests per second, retries included."""
    arrivals: Arrivals = Arrivals.CONSTANT
    duration_s: float | None = None
    """Send requests for so many seconds, repeating the questions; None: each question once."""
    warm_up: int = 0
    """Number of requests before the measurement, whose answers are not recorded."""
    timeout_s: float = 120.0
    """Timeout of one attempt, from sending the request to the last byte of the answer."""
    retries: int = 5
    """Maximum number of retries per question, with exponential backoff or after `Retry-After`."""

    goodput: Mapping[str, float] | None = None
    """Limits in seconds by name (`tita.bench.load_figures`), for the report."""

    def load(self) -> dict[str, Any]:
        """What makes the times of two runs comparable, for `tita.bench.conditions`."""
        fields: dict[str, Any] = {"concurrency": self.concurrency}
        if self.rate is not None:
            fields |= {"rate": self.rate, "arrivals": str(self.arrivals)}
        return fields

    def others(self) -> dict[str, Any]:
        """The remaining options, for `tita.bench.conditions`."""
        return {
            "duration_s": self.duration_s,
            "warm_up": self.warm_up or None,
            "timeout_s": self.timeout_s,
            "retries": self.retries,
            "goodput": dict(self.goodput) if self.goodput else None,
        }

    def intervals_s(self) -> Iterator[float]:
        """Endless times between requests; those of a Poisson process are seeded."""
        assert self.rate is not None
        draw = random.Random(_ARRIVAL_SEED)
        while True:
            poisson = self.arrivals is Arrivals.POISSON
            yield draw.expovariate(self.rate) if poisson else 1 / self.rate


def client_options(
    *,
    concurrency: int | None,
    rate: float | None,
    arrivals: Arrivals = Arrivals.CONSTANT,
    duration_s: float | None = None,
    warm_up: int = 0,
    timeout_s: float,
    retries: int,
    goodput: Mapping[str, float] | None = None,
) -> ClientOptions:
    """Options with the default concurrency of the load's kind.

    Raises:
        TitaError: a rate, duration or timeout is not positive.
    """
    for option, value in (
        ("--rate", rate), ("--duration", duration_s), ("--timeout", timeout_s),
    ):  # fmt: skip
        if value is not None and not 0 < value < float("inf"):
            raise TitaError(f"invalid value {value:g}", where=option, remedy="give more than 0")
    if rate is None and arrivals is not Arrivals.CONSTANT:
        raise TitaError("--arrivals needs --rate", remedy="give --rate too")
    default = DEFAULT_CONCURRENCY if rate is None else _OPEN_CONCURRENCY
    return ClientOptions(
        concurrency=concurrency or default, rate=rate, arrivals=arrivals, duration_s=duration_s,
        warm_up=warm_up, timeout_s=timeout_s, retries=retries, goodput=goodput,
    )  # fmt: skip


def repeated(
    items: "Sequence[BenchmarkItem]", *, done: Collection[str]
) -> "Iterator[BenchmarkItem]":
    """The questions again and again, without those in `done`.

    A repetition has the id `<id>#2`, `<id>#3`, ... It is timed and not scored, because scores count
    every question once.
    """
    for number in itertools.count(1):
        for item in items:
            again = item if number == 1 else repetition(item, number)
            if again.id not in done:
                yield again


def repetition(item: "BenchmarkItem", number: int) -> "BenchmarkItem":
    """The item as its `number`-th request, without references and metric."""
    return replace(item, id=f"{item.id}#{number}", references=(), metric="", group="")
