"""The scheduler thread survives failures of a step."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tita.align import Engine, Guidance, Request, Sampling
from tita.serve import ServeOptions
from tita.serve.errors import APIError
from tita.serve.metrics import Metrics
from tita.serve.model_loading import LoadedModels
from tita.serve.scheduler import OutputQueue, Scheduler
from tita.vlm.loading import Models

GUIDANCE = Guidance(weight=0.3)
SHORT = Request(question="is there a 7 ?", guidance=GUIDANCE)
LONG = Request(
    question="describe",
    guidance=GUIDANCE,
    sampling=Sampling(max_new_tokens=60, ignore_end=True),
)


class Harness:
    """A running scheduler whose batch can be made to fail or to pause."""

    def __init__(self, loaded: LoadedModels) -> None:
        engine = Engine(Models(base=loaded.models.base, reward=loaded.models.reward))
        self.batch = engine.new_batch()
        self.metrics = Metrics("tita")
        self.scheduler = Scheduler(self.batch, options=ServeOptions(), metrics=self.metrics)
        self._preparer = engine.preparer

    def fail_once(self, name: str) -> None:
        """Make the first call of the batch's method `name` raise."""
        method, fail = getattr(self.batch, name), [True]

        def fail_first(*arguments: Any) -> Any:
            if fail.pop() if fail else False:
                raise RuntimeError("CUDA error")
            return method(*arguments)

        setattr(self.batch, name, fail_first)

    def pause(self) -> threading.Semaphore:
        """Make each step wait for the returned semaphore."""
        step, allowed = self.batch.step, threading.Semaphore(0)

        def wait_and_step() -> Any:
            allowed.acquire()
            return step()

        self.batch.step = wait_and_step  # type: ignore[method-assign]
        return allowed

    def submit(self, request: Request) -> OutputQueue:
        reservation = self.scheduler.reserve(1)
        return self.scheduler.submit(reservation, [self._preparer.prepare(request)])

    async def answer(self, request: Request) -> str:
        return "".join([output.text async for _, output in self.submit(request).outputs()])


@pytest.fixture
def failing(models: LoadedModels) -> Iterator[Callable[[str], Any]]:
    @contextmanager
    def start(method: str) -> Iterator[Harness]:
        harness = Harness(models)
        harness.fail_once(method)
        harness.scheduler.start()
        try:
            yield harness
            assert harness.scheduler.alive
            assert harness.scheduler.num_requests == 0
        finally:
            harness.scheduler.stop()
        assert not harness.scheduler.alive

    return start


@pytest.mark.parametrize("method", ["step", "admit"])
def test_a_failure_fails_the_running_requests_only(failing: Any, method: str):
    async def talk(harness: Harness) -> str:
        with pytest.raises(APIError, match="internal error"):
            await harness.answer(SHORT)
        return await harness.answer(SHORT)

    with failing(method) as harness:
        assert asyncio.run(talk(harness))
        assert b'outcome="error"} 1.0' in harness.metrics.text()


def test_a_failure_while_a_request_is_cancelled_leaves_the_batch_empty(failing: Any):
    async def talk(harness: Harness) -> tuple[str, int]:
        allowed = harness.pause()
        cancelled, running = harness.submit(LONG), harness.submit(LONG)
        allowed.release(10)  # both start, and neither ends
        outputs = running.outputs()
        await anext(outputs)
        cancelled.cancel()
        allowed.release(1000)
        # Requests that were running fail; later requests are answered.
        with pytest.raises(APIError, match="internal error"):
            async for _ in outputs:
                pass
        return await harness.answer(SHORT), len(harness.batch)

    with failing("release") as harness:
        text, num_sequences = asyncio.run(talk(harness))
        assert text
        assert num_sequences == 0
