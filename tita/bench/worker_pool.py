"""Sends many questions to an endpoint: concurrency, request rate, retries, progress line."""

import asyncio
import contextlib
import itertools
import random
import re
import signal
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from tita.bench.chat_response import AttemptFailed, Reply
from tita.bench.endpoint import EndpointClient, EndpointUnavailable
from tita.bench.load_shape import ClientOptions, repeated
from tita.bench.outcomes import ErrorMessages, Outcome, error_kind
from tita.bench.questions import BenchmarkItem
from tita.bench.registry import ModelEndpoint
from tita.bench.request_body import GenerationOptions, request_body
from tita.bench.results_file import ResultsFile, answer_record, count_by_suite
from tita.bench.server_metrics import Samples, difference, read_metrics
from tita.errors import ExitCode, Preempted, TitaError
from tita.terminal import Advance, counted, progress, say

_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 60.0
_MAX_RETRY_AFTER_S = 300.0
_MAX_ERROR_KINDS = 20
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_REFUSAL = re.compile(
    r"unsupported|not support|unknown|unrecognized|unexpected|not permitted|not allowed"
    r"|extra (?:inputs|fields)|deprecated|instead|invalid (?:parameter|argument|field)",
    re.IGNORECASE,
)
_FIELD_REMEDIES = {
    "max_tokens": "give --rename max_tokens=max_completion_tokens or --omit max_tokens",
    "guidance_weight": "leave out --weight, which only `tita serve` knows",
    "ignore_eos": "leave out --ignore-eos",
    "min_tokens": "leave out --ignore-eos",
}
"""Remedies by the field of the request that an endpoint refuses."""


@dataclass(slots=True)
class RequestStats:
    """Counts of one run."""

    num_asked: int = 0
    num_failed: int = 0
    num_kept: int = 0
    """Questions that the results file had an answer to before the run."""
    num_empty: int = 0
    """Answers without any text, which score as wrong."""
    num_retries: int = 0
    num_other_length: int = 0
    """Answers of another length than the fixed one, because the endpoint ignores `ignore_eos`."""
    wall_s: float = 0.0
    server: Mapping[str, Any] | None = None
    """The server's own figures (`tita.bench.server_metrics`), if it has any."""
    late_s: float = 0.0
    """Longest delay of a request after its time at the given rate, because too many others were in
    flight."""
    errors: dict[str, int] = field(default_factory=dict)
    """Number of failed questions by kind of error."""
    messages: ErrorMessages = field(default_factory=ErrorMessages)
    """Of the failed questions."""

    def failure_lines(self) -> list[str]:
        """How many questions failed, and the server's messages; empty if none failed."""
        if not self.num_failed:
            return []
        kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(self.errors.items()))
        first = f"{self.num_failed} failed: {kinds}; run the same command again to retry them"
        return [first, *(f"  {text}" for text in self.messages.lines())]

    def count(self, record: Mapping[str, Any]) -> None:
        """Count one line of a results file."""
        self.num_asked += 1
        self.num_empty += record["outcome"] == Outcome.EMPTY
        if record["success"]:
            return
        self.num_failed += 1
        self.messages.add(record["error_message"])
        kind = error_kind(record["error_message"])
        kind = kind if kind in self.errors or len(self.errors) < _MAX_ERROR_KINDS else "other"
        self.errors[kind] = self.errors.get(kind, 0) + 1


def ask_endpoint(
    items: list[BenchmarkItem],
    results: ResultsFile,
    *,
    endpoint: ModelEndpoint,
    images: Path,
    run: Mapping[str, Any],
    generation: GenerationOptions,
    options: ClientOptions,
) -> RequestStats:
    """Send the questions that `results` has no answer to yet; each answer is written at once.

    Raises:
        EndpointUnavailable: every connection fails, or every response is no JSON.
        ModelChanged: the endpoint serves another model than before; no answer of it is written.
        TitaError: the endpoint rejects the key or does not know the model.
        Preempted: SIGTERM was received; the answers so far are written.
    """

    async def main() -> RequestStats:
        async with EndpointClient(
            endpoint.base_url, key=endpoint.key, timeout_s=options.timeout_s
        ) as client:
            pool = WorkerPool(
                client=client, results=results, model_id=endpoint.model.id, images=images, run=run,
                generation=generation, options=options, key=endpoint.key,
            )  # fmt: skip
            return await pool.ask(items)

    return asyncio.run(main())


class ModelChanged(TitaError):
    """The endpoint serves another model than the one that gave the answers so far."""

    exit_code = ExitCode.FAILED


@dataclass(slots=True, kw_only=True)
class WorkerPool:
    """Workers that take questions from one queue, as many as `options.concurrency`."""

    client: EndpointClient
    results: ResultsFile
    model_id: str
    images: Path
    run: Mapping[str, Any]
    generation: GenerationOptions
    options: ClientOptions
    key: SecretStr | None = None
    stats: RequestStats = field(default_factory=RequestStats)
    _not_before: float = 0.0
    """No request is sent before this time, which a Retry-After header sets."""
    _model_digest: str | None = None
    """Digest of the models that gave the answers so far; None if the endpoint reports none."""
    _retried: ErrorMessages = field(default_factory=ErrorMessages)
    """Errors after which requests were sent again."""
    _refused: set[str] = field(default_factory=set)
    """Fields of the request that the endpoint has refused."""
    _is_doubt_said: bool = False
    """Whether it was said that the endpoint may ignore guidance."""
    _next_slot: float = 0.0
    """Time of the next request at the given rate."""
    _num_questions: Mapping[str, int] = field(default_factory=dict)
    """By suite."""
    _intervals_s: Iterator[float] = field(init=False)
    _fields: Mapping[str, Any] = field(init=False)
    """Fields of every request other than model and messages."""

    def __post_init__(self) -> None:
        self._intervals_s = self.options.intervals_s()
        self._fields = self.generation.request_fields()

    async def ask(self, items: list[BenchmarkItem]) -> RequestStats:
        """Send the questions that have no answer yet, or questions for the given duration."""
        self._num_questions = count_by_suite(items)
        done, duration_s = self.results.done, self.options.duration_s
        missing = [item for item in items if item.id not in done]
        self.stats.num_kept = len(items) - len(missing)
        total = len(missing) if duration_s is None else None
        try:
            with _cancelled_by_sigterm():
                await self._warm_up(items)
                before = await self._read_metrics()
                with progress("asking", total=total, unit="questions") as advance:
                    started = time.perf_counter()
                    queue = iter(missing) if duration_s is None else repeated(items, done=done)
                    await self._run_workers(queue, advance, duration_s=duration_s)
                    self.stats.wall_s = time.perf_counter() - started
                after = await self._read_metrics() if before is not None else None
                if before is not None and after is not None:
                    self.stats.server = difference(before, after)
                    if self.stats.server is None:
                        say("the server's own figures are left out: its counters were reset")
        except (asyncio.CancelledError, Preempted):
            num_done, path = len(self.results.done), self.results.path
            say(f"{num_done} questions are answered in {path}; run the command again to resume")
            for text in self.stats.failure_lines():
                say(text)
            raise
        return self.stats

    async def _read_metrics(self) -> Samples | None:
        return await asyncio.to_thread(read_metrics, self.client.base_url, key=self.key)

    async def _warm_up(self, items: list[BenchmarkItem]) -> None:
        """Send requests whose answers are not recorded; failed ones are not repeated."""
        queue = itertools.islice(itertools.cycle(items), self.options.warm_up)

        async def work() -> None:
            for item in queue:
                body = await self._build_body(item)
                try:
                    await self.client.ask(body)
                except AttemptFailed as failure:
                    self._raise_if_permanent(failure)
                    self._report_refused_field(failure, body)

        if self.options.warm_up:
            say(f"warming up with {counted(self.options.warm_up, 'request')}")
            await _gather(work() for _ in range(self.options.concurrency))

    async def _run_workers(
        self, queue: Iterator[BenchmarkItem], advance: Advance, *, duration_s: float | None
    ) -> None:
        started = time.perf_counter()
        turn = asyncio.Lock()

        def is_over() -> bool:
            return duration_s is not None and time.perf_counter() - started >= duration_s

        async def next_request() -> tuple[BenchmarkItem, dict[str, Any]] | None:
            item = None if is_over() else next(queue, None)
            if item is None:
                return None
            body = await self._build_body(item)
            await self._wait_for_slot()
            return None if is_over() else (item, body)

        async def work() -> None:
            while True:
                # At a given rate one worker at a time waits for its slot, so that not all of them
                # hold the body of a request meanwhile.
                async with turn if self.options.rate else contextlib.nullcontext():
                    request = await next_request()
                if request is None:
                    return
                await self._ask_question(*request)
                rate = self.stats.num_asked / (time.perf_counter() - started)
                left = "" if duration_s is None else f", {_left_s(started, duration_s):.0f} s left"
                advance(
                    1,
                    note=f"{rate:.1f}/s, {self.stats.num_failed} failed, "
                    f"{self.stats.num_retries} retries{left}",
                )

        await _gather(work() for _ in range(self.options.concurrency))

    async def _build_body(self, item: BenchmarkItem) -> dict[str, Any]:
        if item.images:  # reads and encodes files
            return await asyncio.to_thread(self._request_body, item)
        return self._request_body(item)

    async def _ask_question(self, item: BenchmarkItem, body: dict[str, Any]) -> None:
        attempts = 0

        async def attempt() -> Reply:
            nonlocal attempts
            attempts += 1
            if attempts > 1:
                await self._wait_for_slot()
            try:
                return await self.client.ask(body)
            except AttemptFailed as failure:
                self._raise_if_permanent(failure)
                self._report_refused_field(failure, body)
                raise

        retrying = AsyncRetrying(
            retry=retry_if_exception(_is_retryable),
            stop=stop_after_attempt(self.options.retries + 1),
            wait=_backoff_s,
            before_sleep=self._on_retry,
            reraise=True,
        )
        reply: Reply | None = None
        error = ""
        try:
            reply = await retrying(attempt)
        except AttemptFailed as failure:
            error = str(failure)
            if (failure.retry_after_s or 0.0) > _MAX_RETRY_AFTER_S:
                error += f" (Retry-After: {failure.retry_after_s:.0f} s)"
        if reply is not None:
            self._check_model(reply)
            self._doubt_guidance(reply)
        record = answer_record(
            item, reply, error=error, attempts=attempts, run=self.run,
            num_questions=self._num_questions,
        )  # fmt: skip
        self.stats.count(record)
        if self.generation.fixed_length and record["success"]:
            self.stats.num_other_length += record["output_tokens"] != self.generation.max_new_tokens
        self.results.append(record)
        self._raise_if_unreachable(error)

    def _check_model(self, reply: Reply) -> None:
        """Check that the model is the one that gave the other answers of the file.

        Raises:
            ModelChanged: it is not; `reply` is not written.
        """
        expected = self._model_digest or self.run.get("model_digest")
        known = reply.model_digest or self._model_digest
        if known and reply.model_digest != expected and (expected or self.results.done):
            raise ModelChanged(
                f"the model changed: answers now come from {_short(reply.model_digest)}, not from "
                f"{_short(expected)}; the {len(self.results.done)} answers in {self.results.path} "
                "are all from the latter",
                where=self.client.base_url,
                remedy="give another --out to measure the new model",
            )
        self._model_digest = reply.model_digest

    def _doubt_guidance(self, reply: Reply) -> None:
        """Say once that guidance may have no effect: servers ignore fields they do not know."""
        if reply.model_digest or self._is_doubt_said:
            return
        for name, value in self._fields.items():
            steers = any(value.values()) if isinstance(value, Mapping) else bool(value)
            if name.startswith("guidance_") and steers:
                self._is_doubt_said = True
                say(
                    f"{self.client.base_url}: answers without the header x-tita-model-digest, "
                    f"which `tita serve` sends; the endpoint may ignore {name}, and the answers "
                    "may be those of the model alone"
                )
                return

    def _request_body(self, item: BenchmarkItem) -> dict[str, Any]:
        self.results.images_sha256(item.id)  # read here, in a thread
        return request_body(item, model_id=self.model_id, images=self.images, fields=self._fields)

    async def _wait_for_slot(self) -> None:
        while (wait := self._not_before - time.monotonic()) > 0:
            # Jitter: if all workers resumed at once, the endpoint would reject most of them again.
            await asyncio.sleep(wait + random.uniform(0, min(1.0, wait / 4)))
        if self.options.rate:
            now = time.monotonic()
            slot = max(now, self._next_slot)
            if self._next_slot:
                self.stats.late_s = max(self.stats.late_s, now - self._next_slot)
            self._next_slot = slot + next(self._intervals_s)
            await asyncio.sleep(slot - now)

    def _on_retry(self, state: RetryCallState) -> None:
        self.stats.num_retries += 1
        failure = _failure_of(state)
        retry_after_s = failure.retry_after_s
        if shown := self._retried.add(str(failure)):
            wait = "" if retry_after_s is None else f" in {retry_after_s:.0f} s (Retry-After)"
            say(f"{shown}; retrying{wait}")
        if retry_after_s is not None:
            # Retry-After is about the whole endpoint, so all workers wait, not only this one.
            self._not_before = max(self._not_before, time.monotonic() + retry_after_s)

    def _raise_if_permanent(self, failure: AttemptFailed) -> None:
        if failure.status in (401, 403):
            raise TitaError(
                f"the endpoint rejects the API key ({failure})",
                where=self.client.base_url,
                remedy="check --api-key, --key-file or the key_env of the registry entry",
            )
        if failure.status in _REDIRECTS:
            raise TitaError(
                f"the endpoint has another address ({failure})",
                where=self.client.base_url,
                remedy="give it as --base-url, up to and including /v1",
            )
        if failure.status in (404, 405) and not self.results.done:
            raise TitaError(
                f"the endpoint does not know the URL or the model ({failure})",
                where=self.client.base_url,
                remedy="check --base-url, which must end in /v1, and --model",
            )

    def _report_refused_field(self, failure: AttemptFailed, body: Mapping[str, Any]) -> None:
        """Name a field that the endpoint refuses, and the option that changes it.

        Raises:
            TitaError: no question is answered yet, so that every question would fail.
        """
        field_name = refused_field(failure, body)
        if field_name is None:
            return
        error = TitaError(
            f"the endpoint refuses {field_name!r} ({failure})",
            where=self.client.base_url,
            remedy=self._remedy(field_name),
        )
        if not self.results.done:
            raise error
        if field_name not in self._refused:
            self._refused.add(field_name)
            say(str(error))

    def _remedy(self, field_name: str) -> str:
        overrides = self.generation.overrides
        if field_name in overrides.body or field_name in overrides.rename.values():
            return "leave out the option that sets it"
        return _FIELD_REMEDIES.get(field_name, f"give --omit {field_name}")

    def _raise_if_unreachable(self, error: str) -> None:
        stats = self.stats
        none_answered = stats.num_failed == stats.num_asked and not self.results.done
        if not none_answered or len(stats.errors) > 1:
            return
        if error.startswith("connection failed"):
            what, enough = "no connection", min(self.options.concurrency, 8)
        elif error.startswith("not JSON"):
            what, enough = "no chat completion", 8
        else:
            return
        if stats.num_failed >= enough:
            raise EndpointUnavailable(
                f"{what} for {stats.num_failed} questions in a row: {error}",
                where=self.client.base_url,
                remedy="check --base-url, which must end in /v1, then run the command again",
            )


def _short(digest: str | None) -> str:
    return f"model {digest[:12]}" if digest else "an unnamed model"


def refused_field(failure: AttemptFailed, body: Mapping[str, Any]) -> str | None:
    """The field of a request that an endpoint does not take; None if it fails for another reason.

    An error that only mentions a field, such as a prompt that is too long for `max_tokens`, is not
    a refusal.
    """
    if failure.status not in (400, 422) or not _REFUSAL.search(str(failure)):
        return None
    fields = [name for name in body if name not in ("model", "messages")]
    if failure.param in fields:
        return failure.param
    return next((name for name in fields if re.search(rf"\b{name}\b", str(failure))), None)


def _left_s(started: float, duration_s: float) -> float:
    return max(0.0, started + duration_s - time.perf_counter())


async def _gather(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines; if one fails, cancel the others and raise its error."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _failure_of(state: RetryCallState) -> AttemptFailed:
    failure = state.outcome.exception() if state.outcome else None
    assert isinstance(failure, AttemptFailed)
    return failure


def _is_retryable(error: BaseException) -> bool:
    return (
        isinstance(error, AttemptFailed)
        and error.retry
        and (error.retry_after_s or 0.0) <= _MAX_RETRY_AFTER_S
    )


def _backoff_s(state: RetryCallState) -> float:
    if _failure_of(state).retry_after_s is not None:
        return 0.0  # `_wait_for_slot` waits instead.
    longest = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** (state.attempt_number - 1))
    return longest * random.uniform(0.5, 1.0)


@contextlib.contextmanager
def _cancelled_by_sigterm() -> Iterator[None]:
    """Cancel the current task on SIGTERM; the cancellation leaves the block as `Preempted`."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    received = False

    def cancel() -> None:
        nonlocal received
        received = True
        task.cancel()

    before = signal.getsignal(signal.SIGTERM)
    # Only the main thread can install signal handlers; in other threads SIGTERM is not handled.
    with contextlib.suppress(ValueError, RuntimeError):
        loop.add_signal_handler(signal.SIGTERM, cancel)
    try:
        yield
    except asyncio.CancelledError:
        if received:
            raise Preempted("SIGTERM received; the answers so far are written") from None
        raise
    finally:
        with contextlib.suppress(ValueError, RuntimeError):
            if loop.remove_signal_handler(signal.SIGTERM):
                signal.signal(signal.SIGTERM, before)
