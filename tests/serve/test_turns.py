"""Who may prepare next: short ones pass long ones, which still come in; no turn is lost."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tita.align import Request
from tita.serve import ServeOptions
from tita.serve.failures import Refusal
from tita.serve.loading import Models
from tita.serve.serving import Serving
from tita.serve.turns import Turns

LONG = 7_000


class Prepared:
    """Numbers of those who had their turn, in that order, and how each is taken in."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.order: list[int] = []
        self.begun: dict[int, Callable[[], None]] = {}
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, *costs: int) -> None:
        """Ask for a turn for each, and wait until all is done that can be done now."""
        for cost in costs:
            self.tasks.append(asyncio.create_task(self._prepare(len(self.tasks), cost)))
        await self.settle()

    async def settle(self) -> None:
        for _ in range(10 * len(self.tasks)):
            await asyncio.sleep(0)

    async def begin(self, number: int) -> None:
        self.begun[number]()
        await self.settle()

    async def _prepare(self, number: int, cost: int) -> None:
        async with self.turns.turn(cost) as begun:
            self.order.append(number)
            self.begun[number] = begun
            await asyncio.sleep(0)


def played(play: Callable[[Prepared], Coroutine[Any, Any, None]]) -> list[int]:
    """The order in which they had their turns."""

    async def within() -> list[int]:
        prepared = Prepared(Turns())
        await play(prepared)
        for task in prepared.tasks:
            task.cancel()
        await asyncio.gather(*prepared.tasks, return_exceptions=True)
        return prepared.order

    return asyncio.run(within())


def test_short_ones_pass_long_ones_and_the_oldest_gets_every_fourth_turn() -> None:
    async def play(prepared: Prepared) -> None:
        await prepared.ask(0, 900, 5, 4, 3, 2, 1)

    assert played(play) == [0, 6, 5, 1, 4, 3, 2]


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
    async def fails(turns: Turns) -> None:
        async with turns.turn(1):
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
        for cost in (0, 3, 2, 1):
            number = len(prepared.tasks)
            prepared.tasks.append(asyncio.create_task(prepared._prepare(number, cost)))
        await asyncio.sleep(0)
        for number in cancelled:
            prepared.tasks[number].cancel()
        await prepared.settle()

    assert played(play) == [number for number in (0, 3, 2, 1) if number not in cancelled]


def test_who_goes_away_with_the_turn_given_passes_it_on() -> None:
    async def play(prepared: Prepared) -> None:
        async with prepared.turns.turn(0):
            waiting = asyncio.create_task(prepared._prepare(0, 0))
            await asyncio.sleep(0)
        # Its turn has been given, and it has not woken up yet.
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        prepared.tasks.append(waiting)
        await prepared.ask(0)

    assert played(play) == [1]


def test_the_deadline_holds_for_who_waits_for_a_turn(models: Models) -> None:
    async def late(serving: Serving) -> Refusal:
        async with serving._turns.turn(0):
            with pytest.raises(Refusal) as refused:
                await asyncio.wait_for(serving.ask(lambda: Request(question="what")), 20)
        return refused.value

    serving = Serving(ServeOptions(deadline_s=0.1))
    serving.load(models)
    try:
        refusal = asyncio.run(late(serving))
        assert refusal.status == 504
        assert serving.num_requests == 0
        assert b'outcome="deadline"} 1.0' in serving.metrics.text()
    finally:
        serving.stop()
