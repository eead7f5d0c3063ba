"""Limits how many requests are prepared (images decoded, prompt tokenized) at a time."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

Worker = TypeVar("Worker")

_SHORT_COST = 2_000
"""Up to this cost (a page of text), a request takes one or two milliseconds to prepare."""
_READY_COST = 10_000
"""Total cost of ready requests that keep the models busy while the next one is prepared."""


class PrepareQueue(Generic[Worker]):
    """Assigns slots, one per worker, so that short requests do not wait for long ones.

    One slot is reserved for short requests. The waiting request with the lowest cost is next, but
    every fourth slot goes to the oldest. Apart from these, a request gets no slot while enough
    prepared requests of at most its cost wait for the models: it would only wait behind them, and
    its preparation would take CPU time from the models. All methods run on one event loop.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        assert len(workers) > 1
        self._free = list(workers)
        self._max_ready = len(workers)
        self._num_assigned = 0
        self._waiting: dict[asyncio.Future[Worker], int] = {}
        """Costs of waiting requests, in the order of arrival."""
        self._ready: dict[object, int] = {}
        """Costs of requests that are or were prepared and that the models have not started on."""

    @asynccontextmanager
    async def slot(self, cost: int) -> AsyncIterator[tuple[Worker, Callable[[], None]]]:
        """Wait for a slot, and hold it until the block ends.

        Yields its worker and a function to call once the models have started on the request, or
        never will. It may be called repeatedly, and is not needed when the preparation raises.
        """
        request: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._waiting[request] = cost
        self._assign()
        try:
            worker = await request
        except asyncio.CancelledError:
            if self._waiting.pop(request, None) is None:
                # The slot was assigned already.
                self._ready.pop(request, None)
                self._free.append(request.result())
            self._assign()
            raise
        try:
            yield worker, lambda: self._mark_started(request)
        except BaseException:
            self._ready.pop(request, None)
            raise
        finally:
            self._free.append(worker)
            self._assign()

    def _mark_started(self, request: object) -> None:
        if self._ready.pop(request, None) is not None:
            self._assign()

    def _assign(self) -> None:
        """Assign free workers to waiting requests."""
        while self._free and (request := self._next()) is not None:
            cost = self._waiting.pop(request)
            if not request.cancelled():
                self._num_assigned += 1
                self._ready[request] = cost
                request.set_result(self._free.pop())

    def _next(self) -> asyncio.Future[Worker] | None:
        eligible = {
            request: cost
            for request, cost in self._waiting.items()
            if len(self._free) > 1 or cost <= _SHORT_COST
        }
        if not eligible:
            return None
        if self._num_assigned % 4 == 3:
            return next(iter(eligible))
        cheapest = min(eligible, key=eligible.__getitem__)
        ahead = [cost for cost in self._ready.values() if cost <= eligible[cheapest]]
        if len(ahead) >= self._max_ready and sum(ahead) >= _READY_COST:
            return None
        return cheapest
