"""Asking an endpoint many questions at once: concurrency, rate, retries, and a progress line."""

import asyncio
import base64
import contextlib
import mimetypes
import random
import re
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from tita.bench.endpoint import AttemptFailed, EndpointClient, EndpointUnavailable
from tita.bench.questions import BenchmarkItem
from tita.bench.results_file import ResultsFile, answer_record
from tita.errors import Preempted, TitaError
from tita.terminal import progress, say

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
_LONGEST_RETRY_AFTER_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How answers are generated; part of every score's protocol."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    weight: float | None = None
    """The guidance weight of our own server; None: not sent."""

    def fields(self) -> dict[str, Any]:
        """As fields of a request."""
        body: dict[str, Any] = {"max_tokens": self.max_new_tokens, "temperature": self.temperature}
        return body if self.weight is None else body | {"guidance_weight": self.weight}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """How hard an endpoint is asked."""

    concurrency: int = 8
    rate: float | None = None
    """Most requests a second, repeated ones included."""
    timeout_s: float = 120.0
    """Bound on one attempt, from sending to the last byte."""
    retries: int = 5
    """Attempts after the first, with exponential backoff; a Retry-After is obeyed."""


@dataclass(slots=True)
class RequestStats:
    """What came of a run."""

    num_asked: int = 0
    num_failed: int = 0
    num_kept: int = 0
    """Questions that stood answered in the results file before."""
    num_retries: int = 0
    wall_s: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)


def ask_endpoint(
    items: list[BenchmarkItem],
    results: ResultsFile,
    *,
    base_url: str,
    model_id: str,
    key: SecretStr | None,
    images: Path,
    run: Mapping[str, Any],
    generation: GenerationOptions,
    manners: ClientOptions,
) -> RequestStats:
    """Ask all questions that `results` does not hold yet and write each answer at once.

    Raises:
        EndpointUnavailable: nothing but failed connections.
        TitaError: the endpoint refuses the key or does not know the model.
        Preempted: SIGTERM came; what was answered is written.
    """

    async def main() -> RequestStats:
        async with EndpointClient(
            base_url, key=key, timeout_s=manners.timeout_s, concurrency=manners.concurrency
        ) as endpoint:
            crew = WorkerPool(
                endpoint, results, model_id=model_id, images=images, run=run,
                generation=generation, manners=manners,
            )  # fmt: skip
            return await crew.ask(items)

    return asyncio.run(main())


class WorkerPool:
    """As many workers as the concurrency says, drawing from one list of questions."""

    def __init__(
        self,
        endpoint: EndpointClient,
        results: ResultsFile,
        *,
        model_id: str,
        images: Path,
        run: Mapping[str, Any],
        generation: GenerationOptions,
        manners: ClientOptions,
    ) -> None:
        self._endpoint = endpoint
        self._results = results
        self._model_id = model_id
        self._images = images
        self._run = run
        self._generation = generation
        self._manners = manners
        self._not_before = 0.0
        self._next_slot = 0.0
        self._tally = RequestStats()

    async def ask(self, items: list[BenchmarkItem]) -> RequestStats:
        open_items = [item for item in items if item.id not in self._results.done]
        self._tally.num_kept = len(items) - len(open_items)
        started = time.perf_counter()
        with progress("asking", total=len(open_items), unit="questions") as advance:

            def done() -> None:
                seconds = time.perf_counter() - started
                advance(
                    1,
                    note=f"{self._tally.num_asked / seconds:.1f}/s, "
                    f"{self._tally.num_failed} failed, {self._tally.num_retries} retries",
                )

            queue = iter(open_items)
            try:
                with _cancelled_by_sigterm():
                    await self._all_workers(queue, done)
            except (asyncio.CancelledError, Preempted):
                num_done, path = len(self._results.done), self._results.path
                say(f"{num_done} questions stand answered in {path}; the same command carries on")
                raise
        self._tally.wall_s = time.perf_counter() - started
        return self._tally

    async def _all_workers(self, queue: Iterator[BenchmarkItem], done: Any) -> None:
        async def work() -> None:
            for item in queue:
                await self._one(item)
                done()

        workers = [asyncio.create_task(work()) for _ in range(self._manners.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _one(self, item: BenchmarkItem) -> None:
        reply, error, attempts = None, "", 0
        body = await asyncio.to_thread(self._body, item)
        while reply is None and attempts <= self._manners.retries:
            if attempts:
                self._tally.num_retries += 1
            attempts += 1
            await self._wait_for_slot()
            try:
                reply = await self._endpoint.ask(body)
            except AttemptFailed as failure:
                error = str(failure)
                self._give_up_if_hopeless(failure)
                wait = failure.retry_after_s or 0.0
                if wait > _LONGEST_RETRY_AFTER_S:
                    error += f" (and asks to come back in {wait:.0f} s)"
                    break
                if not failure.retry:
                    break
                if attempts <= self._manners.retries:
                    await self._pause(failure, attempts=attempts)
        self._tally.num_asked += 1
        if reply is None:
            self._tally.num_failed += 1
            kind = re.split(r"[(:]", error, maxsplit=1)[0].strip()
            kind = kind if kind in self._tally.errors or len(self._tally.errors) < 20 else "other"
            self._tally.errors[kind] = self._tally.errors.get(kind, 0) + 1
        self._results.append(
            answer_record(
                item, reply, error="" if reply else error, attempts=attempts, run=self._run
            )
        )
        self._stop_if_nobody_is_there(error)

    def _body(self, item: BenchmarkItem) -> dict[str, Any]:
        content: Any = item.text
        if item.images:
            content = [
                {"type": "image_url", "image_url": {"url": data_url(self._images / image)}}
                for image in item.images
            ] + [{"type": "text", "text": item.text}]
        return {
            "model": self._model_id,
            "messages": [{"role": "user", "content": content}],
            **self._generation.fields(),
        }

    async def _wait_for_slot(self) -> None:
        while (wait := self._not_before - time.monotonic()) > 0:
            # Not all at the same moment, or the endpoint refuses most of them once more.
            await asyncio.sleep(wait + random.uniform(0, min(1.0, wait / 4)))
        if self._manners.rate:
            now = time.monotonic()
            slot = max(now, self._next_slot)
            self._next_slot = slot + 1 / self._manners.rate
            await asyncio.sleep(slot - now)

    async def _pause(self, failure: AttemptFailed, *, attempts: int) -> None:
        if failure.retry_after_s is not None:
            # The endpoint speaks for itself as a whole, so all workers wait, not just this one.
            until = time.monotonic() + failure.retry_after_s
            self._not_before = max(self._not_before, until)
            return
        longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempts - 1))
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))

    def _give_up_if_hopeless(self, failure: AttemptFailed) -> None:
        if failure.status in (401, 403):
            raise TitaError(
                f"the endpoint refuses the key ({failure})",
                where=self._endpoint.base_url,
                remedy="check --api-key, --key-file or the registry's variable",
            )
        if failure.status in (404, 405) and not self._results.done:
            raise TitaError(
                f"the endpoint does not know the address or the model ({failure})",
                where=self._endpoint.base_url,
                remedy="check --base-url, which ends in /v1, and --model",
            )

    def _stop_if_nobody_is_there(self, error: str) -> None:
        tally = self._tally
        silent = tally.num_failed == tally.num_asked and not self._results.done
        only_connections = error.startswith("connection failed") and len(tally.errors) == 1
        if silent and only_connections and tally.num_failed >= min(self._manners.concurrency, 8):
            raise EndpointUnavailable(
                f"{tally.num_failed} questions in a row got no connection: {error}",
                where=self._endpoint.base_url,
                remedy="check --base-url; then run the same command again",
            )


@lru_cache(maxsize=16)
def data_url(path: Path) -> str:
    """The image as a data: URL, its bytes as they are in the file (RFC 2397)."""
    kind = mimetypes.guess_type(path.name)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


@contextlib.contextmanager
def _cancelled_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM cancels the current task; at its end that becomes `Preempted`."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    told = False

    def obey() -> None:
        nonlocal told
        told = True
        task.cancel()

    # Only the main thread may install signal handlers; elsewhere its owner sees to SIGTERM.
    with contextlib.suppress(ValueError, RuntimeError):
        loop.add_signal_handler(signal.SIGTERM, obey)
    try:
        yield
    except asyncio.CancelledError:
        if told:
            raise Preempted("SIGTERM came; every answer so far is written") from None
        raise
    finally:
        with contextlib.suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGTERM)
