"""Load on a real server: streams together against one at a time, fairness, and its overhead.

Both sides of each ratio are measured in turn in one run. The models are the demo's, told that their
context is longer, so that long requests are long. Takes about a minute. Run:
python benchmarks/serve_load.py
"""

import base64
import http.client
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from shared.verdicts import finish, verdict

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tita.align import Engine, EngineOptions, Guidance, Request, Sampling, TokenOutput
from tita.align.prompts import Preparer
from tita.demo.models import Role, lengthened
from tita.vlm import Models, load_vlm

STREAMS, BEHIND, TOKENS = 16, 8, 48
ROUNDS = 5
FASTER, WAITS, MS_A_TOKEN, MS_A_REQUEST = 4, 3, 1, 15
WAITS_FOR_PHOTOGRAPHS = 5
"""Unpacking one takes half of such a machine, and the clients need some of the rest."""
QUESTION = "describe the picture"
WORDS = {"type": "text", "text": QUESTION}


@dataclass(frozen=True)
class Heard:
    """One answer as its client heard it."""

    first_s: float
    whole_s: float
    num_tokens: int


@dataclass(frozen=True)
class Client:
    """Asks a server over plain sockets: a client that is busy itself would be measured, too."""

    port: int

    def ask(
        self,
        question: "str | list[dict[str, Any]]",
        *,
        seed: int = 0,
        num_tokens: int = TOKENS,
        began: Any = None,
    ) -> Heard:
        """Stream one answer; `began` is told when its first token is there."""
        # A seed and no early end: the same long answers on both sides.
        body = {
            "model": "tita", "messages": [{"role": "user", "content": question}],
            "temperature": 2, "ignore_eos": True, "seed": seed, "max_tokens": num_tokens,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        start, first, usage = time.perf_counter(), 0.0, {}
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
        )
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for line in response:
            if not first and b'"role"' not in line and line != b"\n":
                first = time.perf_counter()
                if began is not None:
                    began()
            if b'"completion_tokens"' in line:
                usage = json.loads(line[6:])["usage"]
        end = time.perf_counter()
        connection.close()
        return Heard(first - start, end - start, usage["completion_tokens"])


@contextmanager
def models() -> Iterator[dict[Role, Path]]:
    """The demo's two models with room for long requests."""
    with tempfile.TemporaryDirectory(prefix="tita-load-") as scratch:
        yield lengthened(Path(scratch))


@contextmanager
def served(found: dict[Role, Path], arguments: Sequence[str]) -> Iterator[Client]:
    """A server process that is ready."""
    named = [f"--{role}={path}" for role, path in found.items()]
    command = [sys.executable, "-m", "tita", "serve", "--port=0", *named, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        port = 0
        for line in process.stderr:
            if address := re.search(r"listening on \S+:(\d+)", line):
                port = int(address[1])
            if line.rstrip().endswith("ready"):
                break
        assert port, "the server did not start"
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Client(port)
    finally:
        process.terminate()
        process.wait()


def together(client: Client, *, at_once: int) -> float:
    """Tokens a second of STREAMS answers, so many at a time."""
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        heard = list(pool.map(lambda seed: client.ask(QUESTION, seed=seed), range(STREAMS)))
    return sum(each.num_tokens for each in heard) / (time.perf_counter() - began)


def first_s(client: Client, *, behind: Callable[[threading.Semaphore], Heard] | None) -> float:
    """Seconds to the first token of a short request, idle or behind so many long ones."""
    if behind is None:
        return client.ask("what", num_tokens=2).first_s
    under_way = threading.Semaphore(0)
    with ThreadPoolExecutor(BEHIND) as pool:
        others = [pool.submit(behind, under_way) for _ in range(BEHIND)]
        for _ in others:
            under_way.acquire()
        found = client.ask("what", num_tokens=2).first_s
        assert not any(each.done() for each in others), "the long ones were too short"
        return found


def long_answer(client: Client) -> Callable[[threading.Semaphore], Heard]:
    """Its first token is there before the short request comes."""
    return lambda under_way: client.ask(QUESTION, num_tokens=400, began=under_way.release)


def long_prompt(client: Client) -> Callable[[threading.Semaphore], Heard]:
    """It has been asked, but its prompt of 1,500 tokens hardly looked at."""
    return lambda under_way: _asked_before(client, " ".join(["what"] * 1500), under_way)


def photograph(client: Client) -> Callable[[threading.Semaphore], Heard]:
    """It has been asked, but its photograph, like no other one, hardly looked at."""
    contents = deque(
        [{"type": "image_url", "image_url": {"url": _megapixel(seed)}}, WORDS]
        for seed in range(BEHIND * ROUNDS)
    )
    return lambda under_way: _asked_before(client, contents.popleft(), under_way)


def _asked_before(
    client: Client, content: str | list[dict[str, Any]], under_way: threading.Semaphore
) -> Heard:
    threading.Timer(0.02, under_way.release).start()
    return client.ask(content, num_tokens=16)


def _megapixel(seed: int) -> str:
    """A JPEG of some 340 kB."""
    spots = np.random.default_rng(seed).integers(256, size=(96, 128, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(spots).resize((1024, 768)).save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


class Bare:
    """The same answers from the engine in this process: no HTTP, no other thread."""

    def __init__(self, found: dict[Role, Path]) -> None:
        models = Models(*(load_vlm(str(found[role])) for role in ("base", "reward")))
        self._stepper = Engine(models, EngineOptions(pack=False)).new_batch()
        self._preparer = Preparer(models)

    def ask(self, *, seed: int, num_tokens: int) -> Heard:
        sampling = Sampling(max_new_tokens=num_tokens, temperature=2, seed=seed, ignore_end=True)
        request = Request(question=QUESTION, guidance=Guidance(weight=0.3), sampling=sampling)
        start, first, count = time.perf_counter(), 0.0, 0
        self._stepper.admit(seed, self._preparer.prepare(request))
        while len(self._stepper):
            said = [each for _, each in self._stepper.step()]
            first = first or (time.perf_counter() if said else 0.0)
            count += sum(each.counted for each in said if isinstance(each, TokenOutput))
        return Heard(first - start, time.perf_counter() - start, count)


def over_s(client: Client, bare: Bare, *, num_tokens: int) -> float:
    """Median seconds that a server's answer takes longer than the engine's."""
    differences = []
    for seed in range(3 * ROUNDS):
        theirs = bare.ask(seed=seed, num_tokens=num_tokens)
        ours = client.ask(QUESTION, seed=seed, num_tokens=num_tokens)
        assert ours.num_tokens == theirs.num_tokens == num_tokens
        differences.append(ours.whole_s - theirs.whole_s)
    return statistics.median(differences)


def measure(client: Client, bare: Bare) -> None:
    together(client, at_once=4)
    ratios = []
    for _ in range(ROUNDS):
        one, many = (together(client, at_once=number) for number in (1, STREAMS))
        ratios.append(many / one)
    print(f"tokens/s: {one:,.0f} one at a time, {many:,.0f} of {STREAMS} streams")
    verdict(f"tokens/s of {STREAMS} streams over one", statistics.median(ratios), at_least=FASTER)
    cases = (
        ("long answers", long_answer(client), WAITS),
        ("long prompts", long_prompt(client), WAITS),
        ("photographs", photograph(client), WAITS_FOR_PHOTOGRAPHS),
    )
    for what, behind, bound in cases:
        idle, busy = [], []
        for _ in range(ROUNDS):
            idle.append(first_s(client, behind=None))
            busy.append(first_s(client, behind=behind))
        alone_s, waited_s = statistics.median(idle), statistics.median(busy)
        print(f"first token: {1e3 * alone_s:.1f} ms idle, {1e3 * waited_s:.1f} ms behind {what}")
        ratio = waited_s / alone_s
        verdict(f"first token behind {BEHIND} {what} over idle", ratio, at_most=bound)
    short_s, long_s = (over_s(client, bare, num_tokens=number) for number in (1, TOKENS))
    verdict("overhead, ms a request", 1e3 * short_s, at_most=MS_A_REQUEST)
    verdict("overhead, ms a token", 1e3 * (long_s - short_s) / (TOKENS - 1), at_most=MS_A_TOKEN)


def main(arguments: Sequence[str]) -> None:
    with models() as found, served(found, arguments) as client:
        measure(client, Bare(found))
    finish()


if __name__ == "__main__":
    main(sys.argv[1:])
