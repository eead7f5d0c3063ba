"""The scheduler thread survives failures of a step."""

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tita.align import Engine, Guidance, Request, Sampling
from tita.align.model_runner import ModelRunner
from tita.engine.transformers_batch import TransformersBatch
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

    def __init__(self, loaded: LoadedModels, **options: Any) -> None:
        engine = Engine(Models(base=loaded.models.base, reward=loaded.models.reward))
        self.batch = TransformersBatch(engine, max_batch=16)
        self.metrics = Metrics("tita")
        self.scheduler = Scheduler(
            self.batch, options=ServeOptions(**options), metrics=self.metrics
        )
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


def test_a_request_that_cannot_be_released_leaves_later(failing: Any):
    async def talk(harness: Harness) -> tuple[int, str, int]:
        allowed = harness.pause()
        cancelled, running = harness.submit(LONG), harness.submit(LONG)
        allowed.release(10)  # both start, and neither ends
        outputs = running.outputs()
        await anext(outputs)
        cancelled.cancel()
        allowed.release(1000)
        num_tokens = 1 + len([output async for output in outputs])
        return num_tokens, await harness.answer(SHORT), len(harness.batch)

    with failing("release") as harness:
        num_tokens, text, num_sequences = asyncio.run(talk(harness))
        assert num_tokens == LONG.sampling.max_new_tokens
        assert text
        assert num_sequences == 0
        assert b'outcome="error"} 0.0' in harness.metrics.text()


def test_the_engine_is_asked_for_its_counts_when_metrics_are_read(models: LoadedModels):
    """vLLM collects all its metrics for them, which is too slow for every step."""
    with running(models) as harness:
        counts, read = harness.batch.counts, list[int]()

        def counting() -> Any:
            read.append(len(harness.batch))
            return counts()

        harness.batch.counts = counting  # type: ignore[method-assign]
        assert asyncio.run(harness.answer(SHORT))
        assert not read
        text = harness.metrics.text().decode()
        assert len(read) == 1
    (seconds,) = re.findall(r'^tita:base_seconds_total\{model_name="tita"\} (\S+)$', text, re.M)
    assert 0 < float(seconds) == pytest.approx(counts().base_s)


@contextmanager
def running(models: LoadedModels) -> Iterator[Harness]:
    """A scheduler that has no request in the end."""
    harness = Harness(models)
    harness.scheduler.start()
    try:
        yield harness
        assert harness.scheduler.num_requests == 0
        assert len(harness.batch) == 0
    finally:
        harness.scheduler.stop()


def test_a_request_that_breaks_every_step_ends_alone(
    models: LoadedModels, monkeypatch: pytest.MonkeyPatch
):
    extend = ModelRunner._extend

    def failing_extend(runner: ModelRunner, tokens: Any) -> Any:
        logits = extend(runner, tokens)
        if any(int(str(key)) % 8 == 4 for key in runner.keys):  # one of eight
            raise RuntimeError("planted")
        return logits

    async def talk(harness: Harness) -> list[str | BaseException]:
        asked = (harness.answer(LONG) for _ in range(8))
        return await asyncio.gather(*asked, return_exceptions=True)

    with running(models) as harness:
        wanted = asyncio.run(harness.answer(LONG))
    with running(models) as harness:
        monkeypatch.setattr(ModelRunner, "_extend", failing_extend)
        found = asyncio.run(talk(harness))
        assert harness.scheduler.healthy
    assert sum(isinstance(each, APIError) for each in found) == 1
    assert [each for each in found if not isinstance(each, APIError)] == [wanted] * 7


def test_a_lost_device_ends_in_an_unhealthy_server_that_answers(
    models: LoadedModels, monkeypatch: pytest.MonkeyPatch
):
    def lose(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    with running(models) as harness:
        wanted = asyncio.run(harness.answer(SHORT))
        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "_forward", lose)
            for number in range(4):
                assert harness.scheduler.healthy == (number < 3)
                with pytest.raises(APIError, match="internal error"):
                    asyncio.run(harness.answer(SHORT))
        assert asyncio.run(harness.answer(SHORT)) == wanted
        assert harness.scheduler.healthy


def test_an_engine_that_cannot_be_cleared_keeps_no_client_waiting(
    models: LoadedModels, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError("planted")

    with running(models) as harness:
        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "_forward", fail)
            patch.setattr(harness.batch, "clear", fail)
            for _ in range(2):
                with pytest.raises(APIError, match="internal error"):
                    asyncio.run(asyncio.wait_for(harness.answer(SHORT), 20))
        assert harness.scheduler.alive
        assert asyncio.run(harness.answer(SHORT))


def test_a_step_that_hangs_ends_in_an_unhealthy_server(models: LoadedModels):
    harness = Harness(models, deadline_s=0.2)
    allowed = harness.pause()
    harness.scheduler.start()

    async def talk() -> None:
        harness.submit(SHORT)
        async with asyncio.timeout(30):
            while harness.scheduler.healthy:
                await asyncio.sleep(0.05)
            assert harness.scheduler.alive
            allowed.release(1000)
            while not harness.scheduler.healthy:
                await asyncio.sleep(0.05)

    asyncio.run(talk())
    harness.scheduler.stop()


def test_a_request_that_fits_into_no_memory_is_told_so(
    models: LoadedModels, monkeypatch: pytest.MonkeyPatch
):
    def lack(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with running(models) as harness:
        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "_forward", lack)
            with pytest.raises(APIError, match="memory ran out for this request") as caught:
                asyncio.run(harness.answer(SHORT))
        assert (caught.value.status, caught.value.code) == (503, "out_of_memory")
        assert asyncio.run(harness.answer(SHORT))
        assert harness.scheduler.healthy
