"""Speed of speculative decoding: seconds per token after the first, beside `generate`.

Random LLaVA weights, about 600 prompt tokens, 64 new ones, batch 1, one thread. The reward model
runs in full, but its logits are replaced by ones that agree with the combined choice at a given
rate. Engines have default options; transformers' `generate` runs a plain copy of the base. Run:
python benchmarks/speculative_speed.py, with --only-rows for several answers at a time.
"""

import argparse
import copy
import dataclasses
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from shared.verdicts import clock, finish, verdict
from transformers.generation.streamers import BaseStreamer

from tita.align import Engine, EngineOptions, TokenOutput
from tita.align.prompts import Preparer
from tita.selftest.random_llava import BASE, REWARD, question, random_llava
from tita.selftest.timing import interleaved
from tita.vlm.loading import VLM, Models

NUM_TOKENS = 64
BOUNDS = {0.0: None, 0.3: None, 0.5: None, 0.7: None, 0.8: 0.8, 0.9: 0.65, 1.0: 0.65}
# So small that the combined choice is the base's, which is known in advance.
WEIGHT = 1e-4
SEVERAL = (2, 4)
"""Numbers of answers that are drafted for together."""


class Scripted:
    """A model that runs in full, and returns logits for the scripted token at each position."""

    def __init__(self, model: Any, script: dict[int, int]) -> None:
        self._model = model
        self._script = script

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        output = self._model(**inputs)
        output.logits.zero_()
        for row, position in enumerate(inputs["position_ids"][:, -1].tolist()):
            output.logits[row, -1, self._script.get(position + 1, 0)] = 10
        return output


def script_for(tokens: Sequence[int], *, start: int, rate: float) -> dict[int, int]:
    """By position: the token itself at the given rate, else another one, evenly distributed."""
    order = random.Random(7)
    agreeing = [number < round(rate * 20) for number in range(20)]
    script = {}
    for number, token in enumerate(tokens):
        if number % 20 == 0:
            order.shuffle(agreeing)
        script[start + number] = token if agreeing[number % 20] else (token + 1) % 1000
    return script


def per_token_s(engine: Engine, *, wanted: Sequence[int], rows: int = 1) -> float:
    """Seconds per token after the first, of some answers to the same question at a time."""
    request = question(weight=WEIGHT, num_tokens=NUM_TOKENS)
    times: list[float] = []
    tokens: list[list[int]] = [[] for _ in range(rows)]
    for number, output in engine.stream([request] * rows):
        assert isinstance(output, TokenOutput), output
        times.append(clock())
        tokens[number].append(output.id)
    assert all(each == list(wanted) for each in tokens), "not the answer of lockstep decoding"
    return (times[-1] - times[rows - 1]) / (len(times) - rows)


class Stamps(BaseStreamer):  # type: ignore[misc]
    """Records the time of each token of `generate`."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(clock())

    def end(self) -> None:
        pass


def transformers_s(base: VLM) -> float:
    """Seconds per token after the first of the base alone under transformers' `generate`."""
    inputs = Preparer(Models(base)).prepare(question(weight=0.0)).inputs["base"]
    stamps = Stamps()
    with torch.inference_mode():
        base.model.generate(
            **inputs, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False,
            streamer=stamps,
        )  # fmt: skip
    # The first one is the prompt.
    times = stamps.times[1:]
    return (times[-1] - times[0]) / (len(times) - 1)


def several_rows(
    base: VLM, reward: VLM, script: Callable[[float], dict[int, int]], wanted: Sequence[int]
) -> None:
    """Drafts for several answers over lockstep, where their number is permitted."""
    for rows in SEVERAL:
        runs: dict[str, Callable[[], float]] = {}
        engines: dict[str, Engine] = {}
        for name, rate, max_drafts in (("lockstep", 0.0, 0), ("50%", 0.5, 8), ("90%", 0.9, 8)):
            scripted = dataclasses.replace(reward, model=Scripted(reward.model, script(rate)))
            options = EngineOptions(max_drafts=max_drafts, max_draft_rows=rows)
            engines[name] = Engine(Models(base, scripted), options)
            runs[name] = partial(per_token_s, engines[name], wanted=wanted, rows=rows)
        took = interleaved(runs, rounds=3)
        print(", ".join(f"{rows} rows, {name} {1000 * s:.1f} ms" for name, s in took.items()))
        for name in ("50%", "90%"):
            print(f"{name}: {engines[name].draft_policy.num_drafted} drafted")
            ratio = took[name] / took["lockstep"]
            verdict(f"{rows} rows, {name} over lockstep", ratio, at_most=1.05)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only-rows", action="store_true", help="Measure several rows alone.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    base, reward = random_llava("base", BASE, seed=0), random_llava("reward", REWARD, seed=1)
    sizes = [vlm.model.num_parameters() for vlm in (base, reward)]
    print(f"base {sizes[0] / 1e6:.0f} M, reward {sizes[1] / 1e6:.0f} M: {sizes[0] / sizes[1]:.1f}")
    plain, engines = copy.deepcopy(base), dict[str, Engine]()
    alone = Engine(Models(base, reward))
    (answer,) = alone.generate([question(weight=0.0, num_tokens=NUM_TOKENS)])

    if given.only_rows:
        start = answer.num_prompt_tokens
        several_rows(
            base,
            reward,
            lambda rate: script_for(answer.token_ids, start=start, rate=rate),
            answer.token_ids,
        )
        finish()

    def measured(name: str, *, rate: float, max_drafts: int) -> Callable[[], float]:
        script = script_for(answer.token_ids, start=answer.num_prompt_tokens, rate=rate)
        scripted = dataclasses.replace(reward, model=Scripted(reward.model, script))
        options = EngineOptions(max_drafts=max_drafts)
        engines[name] = Engine(Models(base, scripted), options)
        return lambda: per_token_s(engines[name], wanted=answer.token_ids)

    runs: dict[str, Callable[[], float]] = {
        "generate": lambda: transformers_s(plain),
        "lockstep": measured("lockstep", rate=0.0, max_drafts=0),
    }
    for rate in BOUNDS:
        runs[f"{rate:.0%}"] = measured(
            f"{rate:.0%}", rate=rate, max_drafts=EngineOptions().max_drafts
        )
    took = interleaved(runs, rounds=3)
    print(", ".join(f"{name} {1000 * s:.1f} ms" for name, s in took.items()))
    for rate, bound in BOUNDS.items():
        name = f"{rate:.0%}"
        policy = engines[name].draft_policy
        share = policy.num_accepted / max(policy.num_drafted, 1)
        print(f"{name}: {policy.num_drafted} drafted, {share:.0%} accepted")
        verdict(f"{name} over lockstep", took[name] / took["lockstep"], at_most=1.05)
        ratio = took[name] / took["generate"]
        if bound is None:
            print(f"{name} over generate of the base alone: {ratio:.2f}")
        else:
            verdict(f"{name} over generate of the base alone", ratio, at_most=bound)
    finish()


if __name__ == "__main__":
    main()
