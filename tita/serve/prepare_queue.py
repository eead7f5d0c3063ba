"""Whose turn it is to be prepared: a few requests at a time go through the processors."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

Desk = TypeVar("Desk")

_SHORT = 2_000
"""What costs no more, a page of text, is prepared in a millisecond or two."""
_AHEAD_COST = 10_000
"""What keeps the models busy while the next is being prepared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn(Generic[Desk]):
    """What who has a turn is given."""

    desk: Desk
    """To work at, until the turn ends."""
    begun: Callable[[], None]
    """To be called, as often as one likes, once the models have taken the request in or never will;
    a turn that raises needs no call."""


class PrepareQueue(Generic[Desk]):
    """Hands out desks, in one event loop, so that short requests do not wait for long ones.

    One desk is for short ones only. Who is waiting goes by cost, but every fourth turn is the
    oldest's. Between those nobody has a turn who would only be put behind others: while enough
    requests that cost no more are ready for the models, preparing one more would take time from
    them, and from who comes next, for nothing.
    """

    def __init__(self, desks: Sequence[Desk]) -> None:
        """Args:
        desks: two or more.
        """
        assert len(desks) > 1
        self._free = list(desks)
        self._num_ahead = len(desks)
        self._num_turns = 0
        self._waiting: dict[asyncio.Future[Desk], int] = {}
        """Costs, in the order in which they came."""
        self._ready: dict[object, int] = {}
        """Costs of those who have or had their turn, and whom the models have not taken in yet."""

    @asynccontextmanager
    async def turn(self, cost: int) -> AsyncIterator[Turn[Desk]]:
        """Wait for a turn, and have it until the block ends."""
        mine: asyncio.Future[Desk] = asyncio.get_running_loop().create_future()
        self._waiting[mine] = cost
        self._pass_on()
        try:
            desk = await mine
        except asyncio.CancelledError:
            if self._waiting.pop(mine, None) is None:
                self._ready.pop(mine, None)  # the turn had come already
                self._free.append(mine.result())
            self._pass_on()
            raise
        try:
            yield Turn(desk=desk, begun=lambda: self._begun(mine))
        except BaseException:
            self._ready.pop(mine, None)
            raise
        finally:
            self._free.append(desk)
            self._pass_on()

    def _begun(self, one: object) -> None:
        if self._ready.pop(one, None) is not None:
            self._pass_on()

    def _pass_on(self) -> None:
        """Give a turn to all who ought to have one now."""
        while self._free and (chosen := self._next()) is not None:
            cost = self._waiting.pop(chosen)
            if not chosen.cancelled():
                self._num_turns += 1
                self._ready[chosen] = cost
                chosen.set_result(self._free.pop())

    def _next(self) -> "asyncio.Future[Desk] | None":
        able = {
            one: cost
            for one, cost in self._waiting.items()
            if len(self._free) > 1 or cost <= _SHORT
        }
        if not able:
            return None
        if self._num_turns % 4 == 3:
            return next(iter(able))
        cheapest = min(able, key=able.__getitem__)
        return None if self._is_early(able[cheapest]) else cheapest

    def _is_early(self, cost: int) -> bool:
        ahead = [each for each in self._ready.values() if each <= cost]
        return len(ahead) >= self._num_ahead and sum(ahead) >= _AHEAD_COST
