"""The thread that steps the models outlives whatever fails in a turn."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tita.align import Engine, Guidance, Request, Sampling
from tita.serve import ServeOptions
from tita.serve.errors import APIError
from tita.serve.loading import LoadedModels
from tita.serve.metrics import Metrics
from tita.serve.scheduler import OutputQueue, Scheduler
from tita.vlm import Models

SHORT = Request(question="is there a 7 ?", guidance=Guidance(weight=0.3))
LONG = Request(
    question="describe",
    guidance=Guidance(weight=0.3),
    sampling=Sampling(max_new_tokens=60, ignore_end=True),
)


class Thread:
    """A scheduler that runs, and what its stepper is made to do."""

    def __init__(self, models: LoadedModels) -> None:
        engine = Engine(Models(models.base.vlm, models.reward.vlm if models.reward else None))
        self.stepper = engine.new_batch()
        self.metrics = Metrics("tita")
        self.scheduler = Scheduler(self.stepper, options=ServeOptions(), metrics=self.metrics)
        self._preparer = engine.preparer

    def fail_once(self, name: str) -> None:
        whole, fail = getattr(self.stepper, name), [True]

        def sometimes(*arguments: Any) -> Any:
            if fail.pop() if fail else False:
                raise RuntimeError("CUDA error")
            return whole(*arguments)

        setattr(self.stepper, name, sometimes)

    def hold(self) -> threading.Semaphore:
        """Let as many steps be taken as the semaphore is released for."""
        whole, allowed = self.stepper.step, threading.Semaphore(0)

        def step() -> Any:
            allowed.acquire()
            return whole()

        self.stepper.step = step  # type: ignore[method-assign]
        return allowed

    def ask(self, request: Request) -> OutputQueue:
        return self.scheduler.claim(1).submit([self._preparer.prepare(request)])

    async def answer(self, request: Request) -> str:
        return "".join([said.text async for _, said in self.ask(request).said()])


@pytest.fixture
def running(models: LoadedModels) -> Iterator[Callable[[str], Any]]:
    @contextmanager
    def with_failing(name: str) -> Iterator[Thread]:
        thread = Thread(models)
        thread.fail_once(name)
        thread.scheduler.start()
        try:
            yield thread
            assert thread.scheduler.alive
            assert thread.scheduler.num_requests == 0
        finally:
            thread.scheduler.stop()
        assert not thread.scheduler.alive

    return with_failing


@pytest.mark.parametrize("name", ["step", "admit"])
def test_a_failing_turn_ends_its_answers_and_not_the_server(running: Any, name: str):
    async def talk(thread: Thread) -> str:
        with pytest.raises(APIError, match="internal error"):
            await thread.answer(SHORT)
        return await thread.answer(SHORT)

    with running(name) as thread:
        assert asyncio.run(talk(thread))
        assert b'outcome="error"} 1.0' in thread.metrics.text()


def test_a_failing_release_leaves_no_place_taken(running: Any):
    async def talk(thread: Thread) -> tuple[str, int]:
        held = thread.hold()
        left, stayed = thread.ask(LONG), thread.ask(LONG)
        held.release(10)  # both begin, and neither ends
        going_on = stayed.said()
        await anext(going_on)
        left.cancel()  # its client hangs up
        held.release(1000)
        # Whoever was there while it failed is told; whoever comes afterwards is answered.
        with pytest.raises(APIError, match="internal error"):
            async for _ in going_on:
                pass
        return await thread.answer(SHORT), len(thread.stepper)

    with running("release") as thread:
        text, num_places = asyncio.run(talk(thread))
        assert text
        assert num_places == 0
