"""Whose turn it is to be prepared: requests go through the processors one at a time."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

_AHEAD, _AHEAD_COST = 2, 10_000
"""Requests, and their cost, that are enough to keep the models busy meanwhile."""


class Turns:
    """A lock for one event loop that lets what is short pass, and still what is long in time.

    Who is waiting goes by cost, but every fourth turn is the oldest's. Between those nobody has a
    turn who is only put behind others: while enough that cost no more are ready for the models,
    preparing it would take time from them, and from who comes next, for nothing.
    """

    def __init__(self) -> None:
        self._taken = False
        self._num_turns = 0
        self._waiting: dict[asyncio.Future[None], int] = {}
        """Costs, in the order in which they came."""
        self._ready: dict[object, int] = {}
        """Costs of those who had their turn, and whom the models have not taken in yet."""

    @asynccontextmanager
    async def turn(self, cost: int) -> AsyncIterator[Callable[[], None]]:
        """Wait for a turn, and have it until the block ends.

        Yields:
            What to call, as often as one likes, once the models have taken it in or never will.
            A block that raises needs no call.
        """
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[mine] = cost
        self._pass_on()
        try:
            await mine
        except asyncio.CancelledError:
            if self._waiting.pop(mine, None) is None:
                self._taken = False  # the turn had come already
            self._pass_on()
            raise
        self._ready[mine] = cost
        try:
            yield lambda: self._begun(mine)
        except BaseException:
            del self._ready[mine]
            raise
        finally:
            self._taken = False
            self._pass_on()

    def _begun(self, one: object) -> None:
        if self._ready.pop(one, None) is not None:
            self._pass_on()

    def _pass_on(self) -> None:
        """Give the turn to the next, if it is free and somebody ought to have it now."""
        while self._waiting and not self._taken:
            due = self._num_turns % 4 == 3
            oldest = next(iter(self._waiting))
            chosen = oldest if due else min(self._waiting, key=self._waiting.__getitem__)
            if not due and self._is_early(self._waiting[chosen]):
                return
            self._num_turns += 1
            del self._waiting[chosen]
            if not chosen.cancelled():
                self._taken = True
                chosen.set_result(None)

    def _is_early(self, cost: int) -> bool:
        ahead = [each for each in self._ready.values() if each <= cost]
        return len(ahead) >= _AHEAD and sum(ahead) >= _AHEAD_COST
