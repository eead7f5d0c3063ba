"""Who may prepare next: short ones pass long ones, which still come in; no turn is lost."""

import asyncio

from tita.serve.turns import Turns


async def _order(costs: list[int], *, cancelled: tuple[int, ...] = ()) -> list[int]:
    """Numbers of those who wait behind one that has its turn, in the order in which they get it."""
    turns, order, leave = Turns(), [], asyncio.Event()

    async def first() -> None:
        async with turns.turn(0):
            await leave.wait()

    async def later(number: int) -> None:
        async with turns.turn(costs[number]):
            order.append(number)
            await asyncio.sleep(0)

    holder = asyncio.create_task(first())
    await asyncio.sleep(0)
    others = [asyncio.create_task(later(number)) for number in range(len(costs))]
    await asyncio.sleep(0)
    leave.set()
    for number in cancelled:
        others[number].cancel()
    await asyncio.gather(holder, *others, return_exceptions=True)
    assert not turns._taken
    return order


def test_short_ones_pass_long_ones_and_the_oldest_gets_every_fourth_turn():
    assert asyncio.run(_order([900, 5, 4, 3, 2, 1])) == [5, 4, 3, 0, 2, 1]


def test_who_goes_away_takes_no_turn_along():
    for cancelled in ((0,), (2,), (0, 2), (0, 1, 2)):
        left = [number for number in (2, 1, 0) if number not in cancelled]
        assert asyncio.run(_order([3, 2, 1], cancelled=cancelled)) == left


def test_who_goes_away_with_the_turn_given_passes_it_on():
    async def talk() -> bool:
        turns = Turns()
        async with turns.turn(0):
            waiting = asyncio.create_task(_take(turns))
            await asyncio.sleep(0)
        # Its turn has been given, and it has not woken up yet.
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.wait_for(_take(turns), timeout=5)
        return waiting.cancelled()

    assert asyncio.run(talk())


async def _take(turns: Turns) -> None:
    async with turns.turn(0):
        pass
