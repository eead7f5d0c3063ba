"""Order of preparation: short requests pass long ones, every request is served, no slot is lost."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tita.align import Request, Sampling
from tita.serve import ServeOptions
from tita.serve.async_engine import AsyncEngine, ParsedRequest
from tita.serve.errors import APIError
from tita.serve.model_loading import LoadedModels
from tita.serve.prepare_queue import PrepareQueue

LONG = 7_000


class Preparation:
    """Numbers of the requests in the order in which they got their slots."""

    def __init__(self, *, num_workers: int = 2, start_at_once: bool = False) -> None:
        self.queue = PrepareQueue([f"worker {number}" for number in range(num_workers)])
        self.order: list[int] = []
        self.mark_started: dict[int, Callable[[], None]] = {}
        self.tasks: list[asyncio.Task[None]] = []
        self.busy: dict[str, int] = {}
        self.max_busy = 0
        self._start_at_once = start_at_once

    async def add(self, *costs: int) -> None:
        """Add requests of these costs, and run until nothing more can be prepared."""
        for cost in costs:
            self.tasks.append(asyncio.create_task(self.prepare(len(self.tasks), cost)))
        await self.settle()

    async def settle(self) -> None:
        for _ in range(20 * len(self.tasks)):
            await asyncio.sleep(0)

    async def start(self, number: int) -> None:
        self.mark_started[number]()
        await self.settle()

    async def prepare(self, number: int, cost: int) -> None:
        async with self.queue.slot(cost) as (worker, mark_started):
            assert worker not in self.busy, "a worker has two requests"
            self.busy[worker] = number
            self.max_busy = max(self.max_busy, len(self.busy))
            self.order.append(number)
            self.mark_started[number] = mark_started
            for _ in range(5):
                await asyncio.sleep(0)
            del self.busy[worker]
        if self._start_at_once:
            mark_started()


def run(scenario: Callable[[Preparation], Coroutine[Any, Any, None]], **options: Any) -> list[int]:
    """The order in which the requests of a scenario got their slots."""

    async def run_scenario() -> list[int]:
        preparation = Preparation(**options)
        await scenario(preparation)
        for task in preparation.tasks:
            task.cancel()
        await asyncio.gather(*preparation.tasks, return_exceptions=True)
        return preparation.order

    return asyncio.run(run_scenario())


def test_the_cheapest_is_next_and_every_fourth_slot_goes_to_the_oldest() -> None:
    async def scenario(preparation: Preparation) -> None:
        await preparation.add(*(LONG + more for more in (0, 900, 5, 4, 3, 2, 1)))

    assert run(scenario, start_at_once=True) == [0, 6, 5, 1, 4, 3, 2]


def test_one_slot_is_reserved_for_short_requests() -> None:
    async def scenario(preparation: Preparation) -> None:
        tasks = [asyncio.create_task(preparation.prepare(number, LONG)) for number in range(3)]
        await asyncio.sleep(0)
        assert list(preparation.busy.values()) == [0]
        short = asyncio.create_task(preparation.prepare(3, 10))
        for _ in range(2):
            await asyncio.sleep(0)
        assert list(preparation.busy.values()) == [0, 3]
        await short
        preparation.tasks = [short, *tasks]
        await preparation.settle()

    assert run(scenario, start_at_once=True) == [0, 3, 1, 2]


@pytest.mark.parametrize(("cost", "max_busy"), [(LONG, 3), (10, 4)])
def test_all_workers_are_used(cost: int, max_busy: int) -> None:
    async def scenario(preparation: Preparation) -> None:
        await preparation.add(*[cost] * 8)
        assert preparation.max_busy == max_busy

    assert len(run(scenario, num_workers=4, start_at_once=True)) == 8


def test_a_request_is_not_prepared_only_to_wait_behind_others() -> None:
    async def scenario(preparation: Preparation) -> None:
        await preparation.add(*[LONG] * 5)
        assert preparation.order == [0, 1]
        await preparation.add(10)
        # The short request is next for the models too; the fourth slot goes to the oldest anyway.
        assert preparation.order == [0, 1, 5, 2]
        await preparation.start(5)
        await preparation.start(0)
        await preparation.start(0)
        assert preparation.order == [0, 1, 5, 2], "two requests are still ready"
        await preparation.start(1)

    assert run(scenario) == [0, 1, 5, 2, 3]


def test_many_short_requests_are_prepared_for_one_batch() -> None:
    async def scenario(preparation: Preparation) -> None:
        await preparation.add(*[100] * 50)

    assert run(scenario) == list(range(50))


def test_a_long_request_is_not_starved_by_short_ones() -> None:
    async def scenario(preparation: Preparation) -> None:
        await preparation.add(*[LONG] * 4, LONG + 1)
        for _ in range(40):
            await preparation.add(1)
            await preparation.start(len(preparation.tasks) - 1)

    assert 4 in run(scenario)


def test_a_failed_preparation_does_not_count_as_ready() -> None:
    async def fail(queue: PrepareQueue[str]) -> None:
        async with queue.slot(LONG):
            raise ValueError

    async def scenario(preparation: Preparation) -> None:
        failed = [asyncio.create_task(fail(preparation.queue)) for _ in range(5)]
        results = await asyncio.gather(*failed, return_exceptions=True)
        assert [type(result) for result in results] == [ValueError] * 5
        await preparation.add(LONG, LONG)

    assert run(scenario) == [0, 1]


@pytest.mark.parametrize("cancelled", [(1,), (3,), (1, 3), (1, 2, 3)])
def test_a_cancelled_request_uses_no_slot(cancelled: tuple[int, ...]) -> None:
    async def scenario(preparation: Preparation) -> None:
        for number, more in enumerate((0, 3, 2, 1)):
            task = asyncio.create_task(preparation.prepare(number, LONG + more))
            preparation.tasks.append(task)
        await asyncio.sleep(0)
        for number in cancelled:
            preparation.tasks[number].cancel()
        await preparation.settle()

    remaining = [number for number in (0, 3, 2, 1) if number not in cancelled]
    assert run(scenario, start_at_once=True) == remaining


def test_a_slot_assigned_to_a_cancelled_request_is_passed_on() -> None:
    async def scenario(preparation: Preparation) -> None:
        async with preparation.queue.slot(LONG):
            waiting = asyncio.create_task(preparation.prepare(0, LONG))
            await asyncio.sleep(0)
        # It has been assigned its slot, but its task has not run since.
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        preparation.tasks.append(waiting)
        await preparation.add(LONG)

    assert run(scenario) == [1]


def test_the_deadline_applies_while_waiting_for_a_slot(models: LoadedModels) -> None:
    parsed = ParsedRequest(num_characters=LONG, images=(), build=lambda _: Request(question="what"))

    async def submit_late(engine: AsyncEngine) -> APIError:
        assert engine._prepare_queue is not None
        async with engine._prepare_queue.slot(LONG):
            with pytest.raises(APIError) as caught:
                await asyncio.wait_for(engine.submit(lambda: parsed), 20)
        return caught.value

    engine = AsyncEngine(ServeOptions(deadline_s=0.1))
    engine.load(models)
    try:
        error = asyncio.run(submit_late(engine))
        assert error.status == 504
        assert engine.num_requests == 0
        assert b'outcome="deadline"} 1.0' in engine.metrics.text()
    finally:
        engine.stop()


@pytest.mark.parametrize(("num_characters", "on_loop"), [(40, True), (2_000, False)])
def test_only_a_line_of_text_is_prepared_on_the_event_loop(
    models: LoadedModels, num_characters: int, on_loop: bool
) -> None:
    threads = []

    def build(_: object) -> Request:
        threads.append(threading.get_ident())
        return Request(question="what", sampling=Sampling(max_new_tokens=2))

    async def answer(engine: AsyncEngine) -> None:
        parsed = ParsedRequest(num_characters=num_characters, images=(), build=build)
        async for _ in (await engine.submit(parsed)).outputs():
            pass

    engine = AsyncEngine(ServeOptions())
    engine.load(models)
    try:
        asyncio.run(answer(engine))
    finally:
        engine.stop()
    assert [each == threading.get_ident() for each in threads] == [on_loop]
