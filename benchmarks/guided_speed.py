"""Speed of guided decoding, beside base and reward alone, and beside decoding without caches.

Also of two reward models, and of VCD, whose distorted image is a second pass of the base.

Random LLaVA weights, about 600 prompt tokens, 64 new ones, prefill included, one thread. Run:
python benchmarks/guided_speed.py
"""

import dataclasses
import os
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from shared.verdicts import clock, finish, verdict

from tita.align import Engine, EngineOptions, Guidance
from tita.align.forms import UNGUIDED
from tita.align.prompts import Preparer
from tita.selftest.random_llava import BASE, REWARD, question, random_llava
from tita.selftest.timing import interleaved
from tita.vlm.loading import Models

NUM_TOKENS = 64


def answering(engine: Engine, guidance: Guidance, *, batch: int) -> Callable[[], float]:
    """A function that answers a batch and returns the seconds it took."""
    plain = [question(n, weight=0.0, num_tokens=NUM_TOKENS) for n in range(batch)]
    requests = [dataclasses.replace(each, guidance=guidance) for each in plain]

    def run() -> float:
        began = clock()
        answers = engine.generate(requests)
        took_s = clock() - began
        assert all(len(answer.token_ids) == NUM_TOKENS for answer in answers)
        return took_s

    return run


@torch.inference_mode()
def without_caches_s(models: Models) -> float:
    """Seconds of an answer if both models run over the whole sequence at every token.

    Measured at three lengths and summed by Simpson's rule, since all 64 would take minutes.
    """
    prepared = Preparer(models).prepare(question(weight=0.5))
    points = []
    for num_more in (0, NUM_TOKENS // 2, NUM_TOKENS):
        began = clock()
        for role, vlm in models.by_role().items():
            inputs = prepared.inputs[role]
            ids = inputs["input_ids"]
            more = ids.new_full((1, num_more), 99)
            vlm.model(
                input_ids=torch.cat([ids, more], -1), pixel_values=inputs["pixel_values"],
                use_cache=False,
            )  # fmt: skip
        points.append(clock() - began)
    return NUM_TOKENS * (points[0] + 4 * points[1] + points[2]) / 6


def main() -> None:
    torch.set_num_threads(1)
    base, reward = random_llava("base", BASE, seed=0), random_llava("reward", REWARD, seed=1)
    sizes = [vlm.model.num_parameters() for vlm in (base, reward)]
    print(f"base {sizes[0] / 1e6:.0f} M, reward {sizes[1] / 1e6:.0f} M: {sizes[0] / sizes[1]:.1f}")
    lockstep_s = 0.0
    lockstep = EngineOptions(max_drafts=0)
    other = random_llava("other", REWARD, seed=2)
    alone, guided = Engine(Models(base)), Engine(Models(base, reward), lockstep)
    several = Engine(Models(base, more={"one": reward, "two": other}), lockstep)
    both = Guidance(weights={"one": 0.25, "two": 0.25})
    for batch, rounds in ((1, 3), (8, 2)):
        runs = {
            "base": answering(alone, UNGUIDED, batch=batch),
            "reward": answering(Engine(Models(reward)), UNGUIDED, batch=batch),
            "lockstep": answering(guided, Guidance(weight=0.5), batch=batch),
            "two rewards": answering(several, both, batch=batch),
            "vcd": answering(alone, Guidance(form="vcd", weight=1.0), batch=batch),
        }
        took = interleaved(runs, rounds=rounds)
        print(f"batch {batch}: " + ", ".join(f"{name} {s:.2f} s" for name, s in took.items()))
        if batch == 1:
            lockstep_s = took["lockstep"]
        bound = 1.05 * (1 + took["reward"] / took["base"])
        ratio = took["lockstep"] / took["base"]
        verdict(f"batch {batch}: lockstep over base alone", ratio, at_most=bound)
        bound = 1.05 * (1 + 2 * took["reward"] / took["base"])
        ratio = took["two rewards"] / took["base"]
        verdict(f"batch {batch}: two rewards over base alone", ratio, at_most=bound)
        verdict(f"batch {batch}: vcd over base alone", took["vcd"] / took["base"], at_most=2.1)
    slow_s = without_caches_s(Models(base, reward))
    print(f"without caches {slow_s:.0f} s (from forwards at three lengths)")
    verdict("speed over decoding without caches", slow_s / lockstep_s, at_least=20)
    finish()


if __name__ == "__main__":
    main()
