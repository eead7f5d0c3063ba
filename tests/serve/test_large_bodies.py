"""Large bodies: parsed as `json` parses them, and received in turns."""

import asyncio
import json

import pytest
from in_process import hosted

from tita.serve import ServeOptions
from tita.serve.middleware import BodyTurns
from tita.serve.model_loading import LoadedModels

MIB = 2**20
NUM_BODIES, NUM_PARTS = 8, 6


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ('{"prompt": "what", "prompt": "is there"}'.encode("utf-16"), "is there"),
        (b'\xef\xbb\xbf{"prompt": "what"}', "what"),
        (rb'{"prompt": "what \ud83d\ude00"}', "what \U0001f600"),
    ],
    ids=["utf-16, a name twice", "byte order mark", "surrogate pair"],
)
def test_bodies_are_parsed_as_json_does(models: LoadedModels, body: bytes, prompt: str):
    headers = {"content-type": "application/json"}
    with hosted(models, ServeOptions()) as client:
        found = client.post("/tokenize", content=body, headers=headers)
        assert found.status_code == 200, found.text
        assert found.json() == client.post("/tokenize", json={"prompt": prompt}).json()


def test_deep_bodies_are_refused_in_one_line(models: LoadedModels):
    headers = {"content-type": "application/json"}
    with hosted(models, ServeOptions()) as client:
        found = client.post("/tokenize", content=b"[" * MIB, headers=headers)
        assert found.status_code == 400
        assert "not valid JSON" in found.json()["error"]["message"], json.dumps(found.json())


def test_parts_of_large_bodies_take_turns():
    """In each tick of the loop one goes on, so all take as long as one after another."""

    async def receive_all(num_bodies: int) -> int:
        turns, ticks, running = BodyTurns(), 0, True

        async def receive() -> None:
            for _ in range(NUM_PARTS):
                await turns.next(MIB)
                parts.append(ticks)

        async def count() -> None:
            nonlocal ticks
            while running:
                ticks += 1
                await asyncio.sleep(0)

        parts: list[int] = []
        counter = asyncio.create_task(count())
        await asyncio.gather(*(receive() for _ in range(num_bodies)))
        running = False
        await counter
        assert max(parts.count(tick) for tick in parts) == 1
        return ticks

    assert asyncio.run(receive_all(NUM_BODIES)) > 0.9 * NUM_BODIES * NUM_PARTS


def test_small_bodies_wait_for_no_turn():
    async def small() -> None:
        turns = BodyTurns()
        for _ in range(100):
            # The steps of a coroutine that waits for nothing take no tick.
            with pytest.raises(StopIteration):
                turns.next(1000).send(None)

    asyncio.run(small())
