"""Processor time outside the models' forwards, per token of 32 answers at a time.

Of the engine alone, in decode steps (a vocabulary of 32,000; small models, since their time does
not count), and of a server with streaming clients (the same models, and the demo's, whose
vocabulary of 400 leaves little but HTTP). Ratios beside a checkout of another commit, whose runs
take turns with this one's:

    git worktree add --detach /tmp/before COMMIT
    python benchmarks/outside_models.py --beside /tmp/before

One thread. Processor time is hardly affected by what else a machine does.
"""

import argparse
import dataclasses
import itertools
import json
import mmap
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from serve_load import QUESTION, Client, models, processor_s, start_server
from shared.verdicts import finish, verdict
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from tita.align import Engine, EngineOptions, Sampling
from tita.selftest.random_llava import Size, question, random_llava
from tita.vlm.loading import Models

BATCH = 32
NUM_TOKENS = 24
STREAMED_TOKENS = 100
ROUNDS = 5
COLD, SETTLED = 2, 5
"""Measurements of a process that do not count, and that do."""
AT_MOST = 0.5
_SMALL: dict[str, int] = {"image_side": 56, "vision_width": 64, "vision_layers": 1}
BASE = Size(width=128, mlp=256, layers=2, spread=0.08, **_SMALL)
REWARD = Size(width=64, mlp=128, layers=1, spread=0.11, **_SMALL)
WAYS = {
    "greedy": Sampling(),
    "temperature": Sampling(temperature=0.8),
    "top-p": Sampling(temperature=0.8, top_p=0.9),
    "penalty, top-k": Sampling(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.1),
}
SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from outside_models import count_forwards
count_forwards(sys.argv[2])
from tita.cli.main import tita
tita(sys.argv[3:])
"""


def count_forwards(path: str) -> Callable[[], float]:
    """Count the processor time of this process's forwards in a file, as a float64.

    Returns:
        A function that returns it.
    """
    file = Path(path)
    file.write_bytes(bytes(8))
    with file.open("r+b") as opened:
        total = mmap.mmap(opened.fileno(), 8)
    # Modules contain one another; the outermost one counts. Threads may run models of their own.
    state = threading.local()
    seconds = [0.0]

    def begin(*_: Any) -> None:
        state.depth = getattr(state, "depth", 0) + 1
        if state.depth == 1:
            state.began = time.thread_time()

    def end(*_: Any) -> None:
        state.depth -= 1
        if not state.depth:
            seconds[0] += time.thread_time() - state.began
            total[:] = struct.pack("d", seconds[0])

    register_module_forward_pre_hook(begin)
    register_module_forward_hook(end, always_call=True)
    return lambda: seconds[0]


def engine_us() -> dict[str, float]:
    """Microseconds per token outside the forwards of decode steps, by way of sampling."""
    torch.set_num_threads(1)
    with tempfile.NamedTemporaryFile() as file:
        inside_s = count_forwards(file.name)
        pair = Models(random_llava("base", BASE, seed=0), random_llava("reward", REWARD, seed=1))
        engine = Engine(pair, EngineOptions(max_drafts=0, pack=False))
        return {
            name: _settled(partial(_steps_us, engine, sampling, inside_s))
            for name, sampling in WAYS.items()
        }


def _settled(measure: Callable[[], float]) -> float:
    """The median of several measurements, after those that begin with cold caches."""
    return statistics.median([measure() for _ in range(COLD + SETTLED)][COLD:])


def _steps_us(engine: Engine, sampling: Sampling, inside_s: Callable[[], float]) -> float:
    batch = engine.new_batch()
    for number in range(BATCH):
        request = question(number, weight=0.5, size=BASE)
        own = dataclasses.replace(sampling, max_new_tokens=NUM_TOKENS, ignore_end=True, seed=number)
        batch.admit(number, engine.preparer.prepare(dataclasses.replace(request, sampling=own)))
    first = 0
    while first < BATCH:
        first += len(batch.step())
    batch.step()
    count, began, before = 0, time.thread_time(), inside_s()
    for _ in range(NUM_TOKENS - 5):
        count += len(batch.step())
    outside_s = time.thread_time() - began - (inside_s() - before)
    return 1e6 * outside_s / count


@contextmanager
def counted_server(
    path: str, found: Mapping[Any, Path]
) -> Iterator[tuple[Client, Callable[[], float]]]:
    """A client of a server of the checkout at `path`, and the seconds of its forwards so far."""
    with tempfile.NamedTemporaryFile() as file:
        # Without -P, the working directory would come before the checkout.
        command = (sys.executable, "-P", "-c", SERVER, str(Path(__file__).parent), file.name)
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        arguments = [f"--max-batch={BATCH}"]
        with start_server(found, arguments, command=command, environment=environment) as client:
            yield client, lambda: struct.unpack("d", Path(file.name).read_bytes())[0]


@contextmanager
def saved_models() -> Iterator[dict[Any, Path]]:
    """Folders of the pair that `engine_us` measures."""
    with tempfile.TemporaryDirectory(prefix="tita-outside-") as scratch:
        found: dict[Any, Path] = {}
        for seed, (role, size) in enumerate({"base": BASE, "reward": REWARD}.items()):
            found[role] = Path(scratch) / role
            vlm = random_llava(role, size, seed=seed)
            for part in (vlm.model, vlm.processor):
                part.save_pretrained(found[role])
        yield found


def served_us(client: Client, forwards_s: Callable[[], float]) -> float:
    """Microseconds of a server per streamed token, outside the forwards."""

    def ask(seed: int) -> int:
        return client.ask(QUESTION, seed=seed, num_tokens=STREAMED_TOKENS).num_tokens

    before = processor_s(client) - forwards_s()
    with ThreadPoolExecutor(BATCH) as pool:
        count = sum(pool.map(ask, range(BATCH)))
    return 1e6 * (processor_s(client) - forwards_s() - before) / count


def _engine_of(path: str) -> dict[str, float]:
    """`engine_us` of a checkout, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--engine"],
        env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def report(us: Mapping[str, float], before: Mapping[str, float] | None = None) -> None:
    """Print figures, and their ratios to those of another commit."""
    for name, one in us.items():
        what = f"batch {BATCH}, {name}: us a token outside the forwards"
        print(f"{what}: {one:.0f}" + ("" if before is None else f", before {before[name]:.0f}"))
        if before is not None:
            verdict(f"batch {BATCH}, {name}: over before", one / before[name], at_most=AT_MOST)


def main(*, beside: str | None) -> None:
    here = str(Path(__file__).parent.parent)
    paths = [here] if beside is None else [here, beside]
    found: dict[str, dict[str, list[float]]] = {path: {} for path in paths}
    for _ in range(1 if beside is None else ROUNDS):
        for path in paths:
            for name, one in _engine_of(path).items():
                found[path].setdefault(name, []).append(one)
    with models() as demos, saved_models() as roles:
        pairs = {"served": roles, "served, the demo's models": demos}
        for _ in range(1 if beside is None else ROUNDS):
            for (name, pair), path in itertools.product(pairs.items(), paths):
                with counted_server(path, pair) as server:
                    us = _settled(partial(served_us, *server))
                    found[path].setdefault(name, []).append(us)
    medians = [
        {name: statistics.median(each) for name, each in found[path].items()} for path in paths
    ]
    report(*medians)
    finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--beside", help="Checkout of another commit.")
    parser.add_argument("--engine", action="store_true", help="Print the engine's figures alone.")
    given = parser.parse_args()
    if given.engine:
        print(json.dumps(engine_us()))
    else:
        main(beside=given.beside)
