"""The tickets by which requests wait for the thread that owns the models."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

from tita.align import Said
from tita.align.preparing import Prepared
from tita.serve.failures import Refusal
from tita.serve.metrics import Watch

logger = logging.getLogger(__name__)

_numbers = itertools.count(1)

Inbox: TypeAlias = asyncio.Queue[tuple[int, Said | Refusal]]
"""Of one request: what its answers get, by their index."""


class Ticket:
    """One answer that was asked for. Its owner cancels it when nobody waits any more."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        index: int,
        deadline: float,
        inbox: Inbox,
        watch: Watch,
        begun: Callable[[], None],
    ) -> None:
        self.number = next(_numbers)
        self.index = index
        self.prepared = prepared
        self.deadline = deadline
        self.watch = watch
        self.over = False
        self.loop = asyncio.get_running_loop()
        self._inbox = inbox
        self.begun = begun

    def put(self, what: Said | Refusal) -> None:
        self.begun()
        self._inbox.put_nowait((self.index, what))


Post: TypeAlias = list[tuple[Ticket, Said | Refusal]]


class Pending:
    """The answers of one request (several if `n` is), as they grow."""

    def __init__(
        self, tickets: list[Ticket], inbox: Inbox, *, cancel: Callable[[Ticket], None]
    ) -> None:
        self.tickets = tickets
        self._inbox = inbox
        self._cancel = cancel

    async def said(self) -> AsyncIterator[tuple[int, Said]]:
        """Index of the answer, and its next step, until all have ended.

        Raises:
            Refusal: there will be no complete answer; the others are given up, too.
        """
        left = len(self.tickets)
        try:
            while left:
                index, what = await self._inbox.get()
                if isinstance(what, Refusal):
                    raise what
                left -= what.finish_reason is not None
                yield index, what
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Give up what has not ended; harmless when all has."""
        for ticket in self.tickets:
            self._cancel(ticket)
            ticket.begun()


def deliver(loop: asyncio.AbstractEventLoop, post: Post) -> None:
    """Put the post of one event loop into its inboxes, from any thread."""

    def put() -> None:
        for ticket, what in post:
            ticket.put(what)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        logger.debug("an event loop closed before its answers came")
