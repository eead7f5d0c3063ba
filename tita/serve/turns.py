"""Whose turn it is at something that only one request can do at a time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """A lock for one event loop that lets what is short pass, and still what is long in time.

    Who is waiting goes by cost, but every fourth turn is the oldest's.
    """

    def __init__(self) -> None:
        self._taken = False
        self._num_turns = 0
        self._waiting: dict[asyncio.Future[None], int] = {}
        """Costs, in the order in which they came."""

    @asynccontextmanager
    async def turn(self, cost: int) -> AsyncIterator[None]:
        """Wait for a turn, and have it until the block ends."""
        if self._taken:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[mine] = cost
            try:
                await mine
            except asyncio.CancelledError:
                if mine.cancelled():
                    self._waiting.pop(mine, None)
                else:
                    self._pass_on()  # the turn had come already
                raise
        self._taken = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        """Give the turn to the next; it is never free while somebody waits."""
        self._taken = bool(self._waiting)
        if not self._waiting:
            return
        self._num_turns += 1
        oldest = next(iter(self._waiting))
        due = self._num_turns % 4 == 0
        chosen = oldest if due else min(self._waiting, key=self._waiting.__getitem__)
        del self._waiting[chosen]
        if chosen.cancelled():
            self._pass_on()
        else:
            chosen.set_result(None)
