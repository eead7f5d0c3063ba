"""The tickets by which requests wait for the thread that owns the models."""

import asyncio
import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

from tita.align import TokenOutput
from tita.align.batch import Batch
from tita.align.prompts import PreparedRequest
from tita.align.requests import Outcome
from tita.serve import errors
from tita.serve.errors import APIError
from tita.serve.metrics import EngineMetrics, Metrics, RequestMetrics
from tita.serve.options import ServeOptions

logger = logging.getLogger(__name__)

_numbers = itertools.count(1)

Inbox: TypeAlias = asyncio.Queue[tuple[int, TokenOutput | APIError]]
"""Of one request: what its answers get, by their index."""


class PendingRequest:
    """One answer that was asked for. Its owner cancels it when nobody waits any more."""

    def __init__(
        self,
        prepared: PreparedRequest,
        *,
        index: int,
        deadline: float,
        inbox: Inbox,
        watch: RequestMetrics,
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

    def put(self, what: TokenOutput | APIError) -> None:
        self.begun()
        self._inbox.put_nowait((self.index, what))


Post: TypeAlias = list[tuple[PendingRequest, TokenOutput | APIError]]


class OutputQueue:
    """The answers of one request (several if `n` is), as they grow."""

    def __init__(
        self,
        tickets: list[PendingRequest],
        inbox: Inbox,
        *,
        cancel: Callable[[PendingRequest], None],
    ) -> None:
        self.tickets = tickets
        self._inbox = inbox
        self._cancel = cancel

    async def said(self) -> AsyncIterator[tuple[int, TokenOutput]]:
        """Index of the answer, and its next step, until all have ended.

        Raises:
            APIError: there will be no complete answer; the others are given up, too.
        """
        left = len(self.tickets)
        try:
            while left:
                index, what = await self._inbox.get()
                if isinstance(what, APIError):
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


logger = logging.getLogger(__name__)


class Reservation:
    """Places in the queue for a request whose images are still being fetched and unpacked."""

    def __init__(self, scheduler: "Scheduler", num_answers: int) -> None:
        self.arrived = time.monotonic()
        self.num_answers = num_answers
        self._scheduler = scheduler

    def submit(
        self, prepared: list[PreparedRequest], *, begun: Callable[[], None] = lambda: None
    ) -> OutputQueue:
        """Queue the answers that the places were claimed for. Call it on the event loop.

        Args:
            prepared: one for each place.
            begun: called on the event loop, at least once, when a first answer comes or none will.

        Raises:
            APIError: the server leaves.
        """
        assert len(prepared) == self.num_answers
        return self._scheduler.submit(self, prepared, begun=begun)

    def release(self) -> None:
        """Give the places back; harmless after `submit`."""
        self._scheduler.release(self)


class Scheduler:
    """Lets waiting requests in, steps the models, and hands out what they say."""

    def __init__(self, batch: Batch, *, options: ServeOptions, metrics: Metrics) -> None:
        self._batch = batch
        self._options = options
        self._metrics = metrics
        self._changed = threading.Condition()
        self._waiting: OrderedDict[int, PendingRequest] = OrderedDict()
        self._running: dict[int, PendingRequest] = {}
        self._gone: set[int] = set()
        self._claims: set[Reservation] = set()
        self._stopping = False
        self._readings = EngineMetrics(batch, metrics=metrics, max_batch=options.max_batch)
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; whoever still waits is told that the server leaves."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_requests(self) -> int:
        """Running, waiting, and being prepared."""
        with self._changed:
            return self._num_waiting + len(self._running)

    def claim(self, num_answers: int) -> Reservation:
        """Keep places for the answers of one request, all or none, before any work goes into it.

        Raises:
            APIError: the queue is full, or the server leaves.
        """
        with self._changed:
            if self._stopping:
                raise errors.leaving()
            places = self._options.max_batch + self._options.max_waiting - len(self._running)
            if self._num_waiting + num_answers > places:
                self._metrics.outcome("refused")
                raise errors.overloaded()
            claim = Reservation(self, num_answers)
            self._claims.add(claim)
            self._show_load()
        return claim

    def release(self, claim: Reservation) -> None:
        """Give a claim's places back; harmless if that has been done."""
        with self._changed:
            self._claims.discard(claim)
            self._show_load()

    def submit(
        self, claim: Reservation, prepared: list[PreparedRequest], *, begun: Callable[[], None]
    ) -> OutputQueue:
        """Queue the answers of one request in the places that it has claimed.

        Raises:
            APIError: the server leaves.
        """
        deadline = claim.arrived + self._options.deadline_s
        inbox: Inbox = asyncio.Queue()
        tickets = [
            PendingRequest(
                each,
                index=index,
                deadline=deadline,
                inbox=inbox,
                watch=self._watch(claim, each),
                begun=begun,
            )
            for index, each in enumerate(prepared)
        ]
        with self._changed:
            if self._stopping:
                raise errors.leaving()
            self._claims.discard(claim)
            for ticket in tickets:
                self._waiting[ticket.number] = ticket
            self._show_load()
            self._changed.notify()
        return OutputQueue(tickets, inbox, cancel=self.cancel)

    def cancel(self, ticket: PendingRequest) -> None:
        """Nobody waits for this answer any more: its place is free after the step under way."""
        with self._changed:
            if ticket.over:
                return
            if self._waiting.pop(ticket.number, None):
                self._finish(ticket, "abort")
            elif ticket.number in self._running:
                self._gone.add(ticket.number)
            self._show_load()
            self._changed.notify()

    def _run(self) -> None:
        going = True
        while going:
            try:
                going = self._let_in() and self._advance()
            except Exception:
                # Whatever failed, nobody is left waiting for a thread that has ended.
                logger.exception("a step failed; its answers are given up")
                self._give_up()

    def _advance(self) -> bool:
        outcomes = self._batch.step()
        self._hand_out([(int(str(key)), outcome) for key, outcome in outcomes])
        self._readings.take()
        return True

    def _let_in(self) -> bool:
        """Wait for work, free places, fill them. False when it is time to end."""
        with self._changed:
            while not (self._waiting or self._running or self._stopping):
                self._changed.wait()
            if self._stopping:
                for ticket in [*self._running.values(), *self._waiting.values()]:
                    self._refuse(ticket, errors.leaving(), "abort")
                return False
            self._free()
            while self._waiting and len(self._running) < self._options.max_batch:
                number, ticket = self._waiting.popitem(last=False)
                self._running[number] = ticket
                self._admit(ticket)
            self._show_load()
            return True

    def _admit(self, ticket: PendingRequest) -> None:
        try:
            self._batch.admit(ticket.number, ticket.prepared)
        except Exception:
            logger.exception("a request could not be admitted")
            self._refuse(ticket, errors.broken(), "error")
        else:
            ticket.watch.admitted()

    def _free(self) -> None:
        now = time.monotonic()
        for number in self._gone:
            if ticket := self._running.get(number):
                self._batch.release(number)
                self._finish(ticket, "abort")
        self._gone.clear()
        for ticket in [*self._running.values(), *self._waiting.values()]:
            if now > ticket.deadline:
                self._batch.release(ticket.number)
                self._refuse(ticket, errors.too_late(self._options.deadline_s), "deadline")

    def _hand_out(self, outcomes: list[tuple[int, Outcome]]) -> None:
        now = time.monotonic()
        posts: dict[asyncio.AbstractEventLoop, Post] = {}
        with self._changed:
            for number, outcome in outcomes:
                ticket = self._running[number]
                if isinstance(outcome, TokenOutput):
                    ticket.watch.said(counted=outcome.counted, changed=outcome.changed, now=now)
                    posts.setdefault(ticket.loop, []).append((ticket, outcome))
                    if outcome.finish_reason:
                        self._finish(ticket, outcome.finish_reason)
                else:
                    logger.error("an answer broke off: %s", outcome)
                    self._refuse(ticket, errors.broken(), "error")
            self._show_load()
        for loop, post in posts.items():
            deliver(loop, post)

    def _refuse(self, ticket: PendingRequest, refusal: APIError, outcome: str) -> None:
        self._finish(ticket, outcome)
        deliver(ticket.loop, [(ticket, refusal)])

    def _finish(self, ticket: PendingRequest, outcome: str) -> None:
        ticket.over = True
        self._running.pop(ticket.number, None)
        self._waiting.pop(ticket.number, None)
        ticket.watch.ended(outcome)

    def _watch(self, claim: Reservation, prepared: PreparedRequest) -> RequestMetrics:
        num_tokens = prepared.num_prompt_tokens
        return RequestMetrics(self._metrics, arrived=claim.arrived, num_prompt_tokens=num_tokens)

    def _give_up(self) -> None:
        with self._changed:
            self._batch.clear()
            for ticket in list(self._running.values()):
                self._refuse(ticket, errors.broken(), "error")
            self._show_load()

    @property
    def _num_waiting(self) -> int:
        return len(self._waiting) + sum(claim.num_answers for claim in self._claims)

    def _show_load(self) -> None:
        self._metrics.load(running=len(self._running), waiting=self._num_waiting)
