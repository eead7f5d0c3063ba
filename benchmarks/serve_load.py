"""Load on a real server: streams together against one at a time, fairness, and its overhead.

Both sides of each ratio are measured in one run, with the shipped demo models. Prints one line a
figure. Run: python benchmarks/serve_load.py
"""

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tita.demo.models import demo_model_path

ROUNDS = 16
LONG = "describe the picture"


def body(question: str, *, seed: int, max_tokens: int = 48) -> dict[str, Any]:
    # A seed and no early end: the same long answers on both sides.
    return {
        "model": "tita",
        "messages": [{"role": "user", "content": question}],
        "temperature": 2,
        "ignore_eos": True,
        "seed": seed,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def stream(client: httpx.AsyncClient, request: dict[str, Any]) -> tuple[float, float, int]:
    """Seconds to the first token and to the end, and the number of tokens."""
    began = time.perf_counter()
    first, num_tokens = 0.0, 0
    async with client.stream("POST", "/v1/chat/completions", json=request) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not first and '"content": ""' not in line and line.startswith("data: "):
                first = time.perf_counter() - began
            if '"completion_tokens"' in line:
                num_tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    return first, time.perf_counter() - began, num_tokens


async def together(client: httpx.AsyncClient, *, at_once: int) -> float:
    """Tokens a second of ROUNDS answers, so many at a time."""
    gate = asyncio.Semaphore(at_once)

    async def one(seed: int) -> int:
        async with gate:
            return (await stream(client, body(LONG, seed=seed)))[2]

    began = time.perf_counter()
    counts = await asyncio.gather(*(one(seed) for seed in range(ROUNDS)))
    return sum(counts) / (time.perf_counter() - began)


async def first_token_s(client: httpx.AsyncClient, *, behind: int) -> float:
    """Median seconds to the first token of a short request behind so many long ones."""
    found = []
    for round_ in range(5):
        others = [
            asyncio.create_task(stream(client, body(LONG, seed=100 * round_ + number)))
            for number in range(behind)
        ]
        await asyncio.sleep(0.05 if behind else 0)
        found.append((await stream(client, body("what", seed=1, max_tokens=2)))[0])
        await asyncio.gather(*others)
    return statistics.median(found)


async def per_request_and_token_s(client: httpx.AsyncClient) -> tuple[float, int]:
    """Seconds and tokens of ROUNDS answers one at a time."""
    began, num_tokens = time.perf_counter(), 0
    for seed in range(ROUNDS):
        num_tokens += (await stream(client, body(LONG, seed=seed)))[2]
    return time.perf_counter() - began, num_tokens


def bare_s() -> tuple[float, int]:
    """The same answers from the stepper in this process: no HTTP, no threads."""
    from tita.align import Request, Said, Sampling
    from tita.align.preparing import Preparer
    from tita.align.stepper import Stepper
    from tita.vlm import load_vlm

    base = load_vlm(str(demo_model_path("base")))
    reward = load_vlm(str(demo_model_path("reward")))
    stepper = Stepper(base, reward)
    preparer = Preparer(base, reward)

    def answer(seed: int) -> int:
        sampling = Sampling(max_new_tokens=48, temperature=2, seed=seed, ignore_end=True)
        stepper.admit(seed, preparer.prepare(Request(question=LONG, sampling=sampling)))
        num_tokens = 0
        while len(stepper):
            said = [each for _, each in stepper.step()]
            num_tokens += sum(each.counted for each in said if isinstance(each, Said))
        return num_tokens

    answer(0)
    began = time.perf_counter()
    num_tokens = sum(answer(seed) for seed in range(ROUNDS))
    return time.perf_counter() - began, num_tokens


async def measure(url: str) -> None:
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await together(client, at_once=4)
        one, many = await together(client, at_once=1), await together(client, at_once=16)
        print(f"tokens/s: one at a time {one:.0f}, 16 together {many:.0f}: {many / one:.2f} times")
        idle, busy = [await first_token_s(client, behind=n) for n in (0, 8)]
        print(
            f"first token: idle {idle * 1e3:.1f} ms, behind 8 {busy * 1e3:.1f} ms: "
            f"{busy / idle:.2f} times"
        )
        served_s, num_tokens = await per_request_and_token_s(client)
        took_s, num_bare = bare_s()
        assert num_bare == num_tokens, (num_bare, num_tokens)
        over_s = served_s - took_s
        print(
            f"overhead at concurrency 1: {over_s / ROUNDS * 1e3:.2f} ms a request in all, "
            f"{over_s / num_tokens * 1e3:.3f} ms a token ({num_tokens / ROUNDS:.0f} tokens each)"
        )


def main(arguments: Sequence[str] = ()) -> None:
    models = [f"--base={demo_model_path('base')}", f"--reward={demo_model_path('reward')}"]
    command = [sys.executable, "-m", "tita", "serve", "--port=0", *models, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = ""
    try:
        for line in process.stderr:
            if found := re.search(r"listening on (\S+)", line):
                url = found[1]
            if line.rstrip().endswith("ready"):
                break
        while httpx.get(f"{url}/readyz").status_code != 200:
            time.sleep(0.1)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        asyncio.run(measure(url))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
