"""The scheduler thread, which owns the models: it admits requests, steps and delivers outputs."""

import asyncio
import itertools
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass, field

from tita.align import TokenOutput
from tita.align.prompts import PreparedRequest
from tita.align.requests import Outcome
from tita.engine.interface import StepEngine
from tita.errors import OutOfDeviceMemory, TitaError
from tita.serve import errors
from tita.serve.errors import APIError
from tita.serve.metrics import EngineMetrics, Metrics, RequestMetrics
from tita.serve.serve_options import ServeOptions

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3
"""Failures of the whole engine in a row, such as of a lost device, that call for a restart."""


@dataclass(eq=False, slots=True, kw_only=True)
class PendingRequest:
    """One response that the scheduler is to generate: waiting or running."""

    prepared: PreparedRequest
    index: int
    """Among the responses of its HTTP request."""
    deadline: float
    queue: "OutputQueue"
    metrics: RequestMetrics
    number: int = field(default_factory=itertools.count(1).__next__)
    finished: bool = False


RequestOutput = tuple[PendingRequest, TokenOutput | APIError]


class OutputQueue:
    """Outputs of one HTTP request, which has several responses if its `n` is above 1."""

    def __init__(
        self, *, cancel: Callable[[PendingRequest], None], mark_started: Callable[[], None]
    ) -> None:
        """Args:
        mark_started: called on the event loop, at least once, when a first output comes or none
            will.
        """
        self.requests: list[PendingRequest] = []
        self.loop = asyncio.get_running_loop()
        self._cancel = cancel
        self._mark_started = mark_started
        self._outputs: deque[tuple[int, TokenOutput | APIError]] = deque()
        self._waits: asyncio.Future[None] | None = None
        """Of the reader, while there is no output."""

    def put(self, index: int, output: TokenOutput | APIError) -> None:
        """Add an output of the response `index`. Call it on the event loop."""
        self._mark_started()
        self._outputs.append((index, output))
        if self._waits is not None and not self._waits.done():
            self._waits.set_result(None)

    async def outputs(self) -> AsyncIterator[tuple[int, TokenOutput]]:
        """Index of a response and its next token, until all responses are complete.

        Raises:
            APIError: a response failed; the others are cancelled.
        """
        num_running = len(self.requests)
        try:
            while num_running:
                while not self._outputs:
                    self._waits = self.loop.create_future()
                    await self._waits
                index, output = self._outputs.popleft()
                if isinstance(output, APIError):
                    raise output
                num_running -= output.finish_reason is not None
                yield index, output
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Cancel the responses that are not complete."""
        for request in self.requests:
            self._cancel(request)
        self._mark_started()


@dataclass(eq=False, slots=True)
class Reservation:
    """Places in the queue for a request that is still being fetched and prepared."""

    num_places: int
    arrived: float = field(default_factory=time.monotonic)


class Scheduler:
    """Admits waiting requests to the batch, steps it, and delivers its outputs."""

    def __init__(self, batch: StepEngine, *, options: ServeOptions, metrics: Metrics) -> None:
        self._batch = batch
        self._options = options
        self._metrics = metrics
        self._changed = threading.Condition()
        self._waiting: OrderedDict[int, PendingRequest] = OrderedDict()
        self._running: dict[Hashable, PendingRequest] = {}
        """By number, the key in the batch."""
        self._cancelled: set[int] = set()
        self._stale: set[int] = set()
        """Finished requests that the batch failed to release."""
        self._num_failures = 0
        """Failures of the engine since its last token."""
        self._step_began: float | None = None
        self._reservations: set[Reservation] = set()
        self._stopping = False
        EngineMetrics(batch, metrics=metrics)
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; unfinished requests fail with `shutting_down`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        """False if the thread, or a process of the engine, has ended."""
        return self._thread.is_alive() and self._batch.alive

    @property
    def healthy(self) -> bool:
        """False if the thread has died, or the engine hangs or fails again and again.

        A restart may help. A step hangs if it takes longer than any request may.
        """
        began = self._step_began
        hangs = began is not None and time.monotonic() - began > self._options.deadline_s
        return self.alive and not hangs and self._num_failures < _MAX_FAILURES

    @property
    def num_requests(self) -> int:
        """Running requests, waiting requests and reservations."""
        with self._changed:
            return self._num_waiting + len(self._running)

    def reserve(self, num_places: int) -> Reservation:
        """Reserve places in the queue, one for each response of a request, before its preparation.

        Raises:
            APIError: the queue is full, or the server is shutting down.
        """
        with self._changed:
            if self._stopping:
                raise errors.shutting_down()
            capacity = self._options.max_batch + self._options.max_waiting - len(self._running)
            if self._num_waiting + num_places > capacity:
                self._metrics.count_request("refused")
                raise errors.queue_full()
            reservation = Reservation(num_places)
            self._reservations.add(reservation)
            self._update_load()
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Release the places of a reservation; no effect if it was submitted or released."""
        with self._changed:
            self._reservations.discard(reservation)
            self._update_load()

    def submit(
        self,
        reservation: Reservation,
        prepared: list[PreparedRequest],
        *,
        mark_started: Callable[[], None] = lambda: None,
    ) -> OutputQueue:
        """Put the responses of one request into the queue, one for each reserved place.

        Call it on the event loop; `mark_started` is as in `OutputQueue`.

        Raises:
            APIError: the server is shutting down.
        """
        assert len(prepared) == reservation.num_places
        arrived = reservation.arrived
        queue = OutputQueue(cancel=self.cancel, mark_started=mark_started)
        queue.requests = [
            PendingRequest(
                prepared=each,
                index=index,
                deadline=arrived + self._options.deadline_s,
                queue=queue,
                metrics=RequestMetrics(
                    self._metrics, arrived=arrived, num_prompt_tokens=each.num_prompt_tokens
                ),
            )
            for index, each in enumerate(prepared)
        ]
        with self._changed:
            if self._stopping:
                raise errors.shutting_down()
            self._reservations.discard(reservation)
            for request in queue.requests:
                self._waiting[request.number] = request
            self._update_load()
            self._changed.notify()
        return queue

    def cancel(self, request: PendingRequest) -> None:
        """Cancel a request; a running one leaves the batch after the current step."""
        with self._changed:
            if request.finished:
                return
            if self._waiting.pop(request.number, None):
                self._finish(request, "abort")
            elif request.number in self._running:
                self._cancelled.add(request.number)
            self._update_load()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            try:
                if not self._admit_waiting():
                    return
                self._step_began = time.monotonic()
                try:
                    outputs = self._batch.step()
                finally:
                    self._step_began = None
                self._deliver(outputs)
            except Exception:
                # The batch gives a request that breaks a step its error by itself. What arrives
                # here is a lost device or a mistake of ours, and the thread must survive it:
                # otherwise all later requests would wait forever.
                logger.exception("the engine failed; its requests are aborted")
                self._give_up()

    def _give_up(self) -> None:
        """Fail the running requests, or the oldest waiting one: no failure may repeat forever."""
        with self._changed:
            self._num_failures += 1
            self._cancelled.clear()
            failed = [*self._running.values()] or [*self._waiting.values()][:1]
            for request in failed:
                self._fail(request, errors.internal_error(), "error")
            self._update_load()
            try:
                self._batch.clear()
            except Exception:
                # An engine whose processes have ended may refuse that, too.
                logger.exception("the batch could not be cleared")
                self._stale |= {request.number for request in failed}

    def _admit_waiting(self) -> bool:
        """Wait for requests and fill the batch. False when the thread must end."""
        with self._changed:
            while not (self._waiting or self._running or self._stopping):
                self._changed.wait()
            if self._stopping:
                for request in [*self._running.values(), *self._waiting.values()]:
                    self._fail(request, errors.shutting_down(), "abort")
                return False
            self._remove_cancelled_and_late()
            while self._waiting and len(self._running) < self._options.max_batch:
                number, request = self._waiting.popitem(last=False)
                self._running[number] = request
                try:
                    self._batch.admit(number, request.prepared)
                except TitaError as error:
                    self._fail(request, _refusal_of(error), "refused")
                except Exception:
                    logger.exception("a request could not be admitted to the batch")
                    self._fail(request, errors.internal_error(), "error")
                else:
                    request.metrics.admitted()
            self._update_load()
            return True

    def _release(self, number: int) -> None:
        """Take a request out of the batch; if that fails, try again before the next step."""
        try:
            self._batch.release(number)
        except Exception:
            logger.exception("a request could not be taken out of the batch")
            self._stale.add(number)
        else:
            self._stale.discard(number)

    def _remove_cancelled_and_late(self) -> None:
        now = time.monotonic()
        for number in [*self._stale]:
            self._release(number)
        for number in self._cancelled:
            if request := self._running.get(number):
                self._release(number)
                self._finish(request, "abort")
        self._cancelled.clear()
        for request in [*self._running.values(), *self._waiting.values()]:
            if now > request.deadline:
                if request.number in self._running:
                    self._release(request.number)
                error = errors.deadline_exceeded(self._options.deadline_s)
                self._fail(request, error, "deadline")

    def _deliver(self, outcomes: Sequence[tuple[Hashable, Outcome]]) -> None:
        """Put the outputs of a step into their queues, with one call per event loop."""
        now = time.monotonic()
        outputs: dict[asyncio.AbstractEventLoop, list[RequestOutput]] = {}
        tokens: list[TokenOutput] = []
        with self._changed:
            for key, outcome in outcomes:
                request = self._running.get(key)
                if request is None:
                    continue  # cancelled, and could not be released
                if isinstance(outcome, TokenOutput):
                    self._num_failures = 0
                    request.metrics.token(counted=outcome.counted, now=now)
                    tokens.append(outcome)
                    outputs.setdefault(request.queue.loop, []).append((request, outcome))
                    if outcome.finish_reason:
                        self._finish(request, outcome.finish_reason)
                else:
                    logger.error("a request failed: %s", outcome)
                    self._fail(request, _error_of(outcome), "error")
            self._metrics.count_tokens(tokens)
            self._update_load()
        for loop, batch in outputs.items():
            _put_outputs(loop, batch)

    def _fail(self, request: PendingRequest, error: APIError, outcome: str) -> None:
        self._finish(request, outcome)
        _put_outputs(request.queue.loop, [(request, error)])

    def _finish(self, request: PendingRequest, outcome: str) -> None:
        request.finished = True
        self._running.pop(request.number, None)
        self._waiting.pop(request.number, None)
        request.metrics.finished(outcome)

    @property
    def _num_waiting(self) -> int:
        return len(self._waiting) + sum(each.num_places for each in self._reservations)

    def _update_load(self) -> None:
        self._metrics.set_load(running=len(self._running), waiting=self._num_waiting)


def _error_of(error: TitaError) -> APIError:
    """The response to a request that failed; the cause is in the log."""
    if isinstance(error, OutOfDeviceMemory):
        return APIError(str(error), status=503, type="server_error", code="out_of_memory")
    return errors.internal_error()


def _refusal_of(error: TitaError) -> APIError:
    """The response to a request that this engine cannot answer."""
    what = str(error) if error.remedy is None else f"{error.what}; {error.remedy}"
    return APIError(what, code="unsupported_by_engine")


def _put_outputs(loop: asyncio.AbstractEventLoop, outputs: list[RequestOutput]) -> None:
    """Put outputs into queues of an event loop, from any thread."""

    def put() -> None:
        for request, output in outputs:
            request.queue.put(request.index, output)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        logger.debug("an event loop was closed before its outputs were delivered")
