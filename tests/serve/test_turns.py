"""Who may prepare next: short ones pass long ones, which still come in; no turn is lost."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tita.align import Request
from tita.serve import ServeOptions
from tita.serve.async_engine import AsyncEngine, ParsedRequest
from tita.serve.errors import APIError
from tita.serve.loading import LoadedModels
from tita.serve.prepare_queue import PrepareQueue

LONG = 7_000


class Prepared:
    """Numbers of those who had their turn, in that order, and how each is taken in."""

    def __init__(self, *, num_desks: int = 2, begin_at_once: bool = False) -> None:
        self.turns = PrepareQueue([f"desk {number}" for number in range(num_desks)])
        self.order: list[int] = []
        self.begun: dict[int, Callable[[], None]] = {}
        self.tasks: list[asyncio.Task[None]] = []
        self.busy: dict[str, int] = {}
        self.most_at_once = 0
        self._begin_at_once = begin_at_once

    async def ask(self, *costs: int) -> None:
        """Ask for a turn for each, and wait until all is done that can be done now."""
        for cost in costs:
            self.tasks.append(asyncio.create_task(self.prepare(len(self.tasks), cost)))
        await self.settle()

    async def settle(self) -> None:
        for _ in range(20 * len(self.tasks)):
            await asyncio.sleep(0)

    async def begin(self, number: int) -> None:
        self.begun[number]()
        await self.settle()

    async def prepare(self, number: int, cost: int) -> None:
        async with self.turns.turn(cost) as turn:
            assert turn.desk not in self.busy, "two at one desk"
            self.busy[turn.desk] = number
            self.most_at_once = max(self.most_at_once, len(self.busy))
            self.order.append(number)
            self.begun[number] = turn.begun
            for _ in range(5):
                await asyncio.sleep(0)
            del self.busy[turn.desk]
        if self._begin_at_once:
            turn.begun()


def played(play: Callable[[Prepared], Coroutine[Any, Any, None]], **how: Any) -> list[int]:
    """The order in which they had their turns."""

    async def within() -> list[int]:
        prepared = Prepared(**how)
        await play(prepared)
        for task in prepared.tasks:
            task.cancel()
        await asyncio.gather(*prepared.tasks, return_exceptions=True)
        return prepared.order

    return asyncio.run(within())


def test_who_costs_less_passes_and_the_oldest_gets_every_fourth_turn() -> None:
    async def play(prepared: Prepared) -> None:
        await prepared.ask(*(LONG + more for more in (0, 900, 5, 4, 3, 2, 1)))

    assert played(play, begin_at_once=True) == [0, 6, 5, 1, 4, 3, 2]


def test_one_desk_is_free_for_who_is_short() -> None:
    async def play(prepared: Prepared) -> None:
        tasks = [asyncio.create_task(prepared.prepare(number, LONG)) for number in range(3)]
        await asyncio.sleep(0)
        assert list(prepared.busy.values()) == [0]
        short = asyncio.create_task(prepared.prepare(3, 10))
        for _ in range(2):
            await asyncio.sleep(0)
        assert list(prepared.busy.values()) == [0, 3]
        await short
        prepared.tasks = [short, *tasks]
        await prepared.settle()

    assert played(play, begin_at_once=True) == [0, 3, 1, 2]


@pytest.mark.parametrize(("cost", "at_once"), [(LONG, 3), (10, 4)])
def test_all_desks_are_used(cost: int, at_once: int) -> None:
    async def play(prepared: Prepared) -> None:
        await prepared.ask(*[cost] * 8)
        assert prepared.most_at_once == at_once

    assert len(played(play, num_desks=4, begin_at_once=True)) == 8


def test_nobody_is_prepared_only_to_wait_behind_others() -> None:
    async def play(prepared: Prepared) -> None:
        await prepared.ask(*[LONG] * 5)
        assert prepared.order == [0, 1]
        await prepared.ask(10)
        # It is next for the models, too; and the fourth turn is the oldest's in any case.
        assert prepared.order == [0, 1, 5, 2]
        await prepared.begin(5)
        await prepared.begin(0)
        await prepared.begin(0)
        assert prepared.order == [0, 1, 5, 2], "two are still ahead"
        await prepared.begin(1)

    assert played(play) == [0, 1, 5, 2, 3]


def test_many_short_ones_are_prepared_for_the_models_to_take_in_together() -> None:
    async def play(prepared: Prepared) -> None:
        await prepared.ask(*[100] * 50)

    assert played(play) == list(range(50))


def test_a_long_one_comes_in_though_short_ones_never_end() -> None:
    async def play(prepared: Prepared) -> None:
        await prepared.ask(*[LONG] * 4, LONG + 1)
        for _ in range(40):
            await prepared.ask(1)
            await prepared.begin(len(prepared.tasks) - 1)

    assert 4 in played(play)


def test_who_fails_to_be_prepared_is_not_ahead_of_others() -> None:
    async def fails(turns: PrepareQueue[str]) -> None:
        async with turns.turn(LONG):
            raise ValueError

    async def play(prepared: Prepared) -> None:
        failed = [asyncio.create_task(fails(prepared.turns)) for _ in range(5)]
        results = await asyncio.gather(*failed, return_exceptions=True)
        assert [type(result) for result in results] == [ValueError] * 5
        await prepared.ask(LONG, LONG)

    assert played(play) == [0, 1]


@pytest.mark.parametrize("cancelled", [(1,), (3,), (1, 3), (1, 2, 3)])
def test_who_goes_away_takes_no_turn_along(cancelled: tuple[int, ...]) -> None:
    async def play(prepared: Prepared) -> None:
        for number, more in enumerate((0, 3, 2, 1)):
            task = asyncio.create_task(prepared.prepare(number, LONG + more))
            prepared.tasks.append(task)
        await asyncio.sleep(0)
        for number in cancelled:
            prepared.tasks[number].cancel()
        await prepared.settle()

    left = [number for number in (0, 3, 2, 1) if number not in cancelled]
    assert played(play, begin_at_once=True) == left


def test_who_goes_away_with_the_turn_given_passes_it_on() -> None:
    async def play(prepared: Prepared) -> None:
        async with prepared.turns.turn(LONG):
            waiting = asyncio.create_task(prepared.prepare(0, LONG))
            await asyncio.sleep(0)
        # Its turn has been given, and it has not woken up yet.
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        prepared.tasks.append(waiting)
        await prepared.ask(LONG)

    assert played(play) == [1]


def test_the_deadline_holds_for_who_waits_for_a_turn(models: LoadedModels) -> None:
    asked = ParsedRequest(
        num_characters=LONG, images=(), request=lambda _: Request(question="what")
    )

    async def late(serving: AsyncEngine) -> APIError:
        assert serving._turns is not None
        async with serving._turns.turn(LONG):
            with pytest.raises(APIError) as refused:
                await asyncio.wait_for(serving.ask(lambda: asked), 20)
        return refused.value

    serving = AsyncEngine(ServeOptions(deadline_s=0.1))
    serving.load(models)
    try:
        refusal = asyncio.run(late(serving))
        assert refusal.status == 504
        assert serving.num_requests == 0
        assert b'outcome="deadline"} 1.0' in serving.metrics.text()
    finally:
        serving.stop()
