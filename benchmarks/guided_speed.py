"""Speed of guided decoding, beside base and reward alone, and beside decoding without caches.

Also of two reward models; of VCD, whose distorted image is a second pass of the base; and of 16
rows with eight LoRA adapters of one model beside 16 rows with one of them, with prompts of about a
hundred tokens, because adapters are mixed in decode steps only.

Random LLaVA weights, about 600 prompt tokens, 64 new ones, prefill included, one thread. Run:
python benchmarks/guided_speed.py [LINES], with LINES `forms`, `adapters` or `caches`
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from outside_models import engine_us, report
from peft import LoraConfig, get_peft_model
from shared.verdicts import clock, finish, verdict

from tita.align import Engine, EngineOptions, Guidance
from tita.align.forms import UNGUIDED
from tita.align.prompts import Preparer
from tita.selftest.random_llava import BASE, REWARD, Size, question, random_llava
from tita.selftest.timing import in_rounds, median_ratio
from tita.vlm.adapters import AdapterPool, read_adapter
from tita.vlm.loading import VLM, Models

NUM_TOKENS = 64
NUM_ADAPTERS, RANK = 8, 8
IMAGE_SIDE = 112
"""Of the images beside adapters."""


def answering(
    engine: Engine, guidances: list[Guidance], *, size: Size = BASE
) -> Callable[[], float]:
    """A function that answers a batch, a request for each guidance; returns the seconds it took."""
    requests = [
        dataclasses.replace(
            question(n, weight=0.0, num_tokens=NUM_TOKENS, size=size), guidance=guidance
        )
        for n, guidance in enumerate(guidances)
    ]

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


def with_adapters(below: VLM, folder: Path) -> dict[str, VLM]:
    """Random adapters of a model, as train-dpo leaves them with its default layers."""
    pool = AdapterPool(model=below.model)
    adapted = get_peft_model(
        below.model,
        LoraConfig(
            r=RANK, target_modules="all-linear", exclude_modules=r".*vision_tower.*",
            init_lora_weights=False,
        ),
    )  # fmt: skip
    for number in range(NUM_ADAPTERS):
        torch.manual_seed(number)
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.02)
        adapted.save_pretrained(str(folder / str(number)))
        config = folder / str(number) / "adapter_config.json"
        fields = json.loads(config.read_text()) | {"base_model_name_or_path": below.name}
        config.write_text(json.dumps(fields))
    adapted.unload()
    for number in range(NUM_ADAPTERS):
        pool.add(f"r{number}", read_adapter(folder / str(number)))
    return {name: dataclasses.replace(below, adapter=name, adapters=pool) for name in pool.files}


def measure_adapters() -> None:
    """Rows with different adapters take one forward; eight adapters have little memory."""
    size = dataclasses.replace(BASE, image_side=IMAGE_SIDE)
    base = random_llava("base", size, seed=0)
    below = random_llava("below", dataclasses.replace(REWARD, image_side=IMAGE_SIDE), seed=3)
    # Before the engine packs it.
    model = sum(weight.nbytes for weight in below.model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        rewards = with_adapters(below, Path(folder))
        engine = Engine(Models(base, more=rewards), EngineOptions(max_drafts=0))
        few = answering(engine, [Guidance(weights={"r0": 0.5})] * 16, size=size)
        many = answering(
            engine, [Guidance(weights={f"r{n % NUM_ADAPTERS}": 0.5}) for n in range(16)], size=size
        )
        took = in_rounds({"one": few, "eight": many}, rounds=3)
        middle = {name: statistics.median(times) for name, times in took.items()}
        print("16 rows: " + ", ".join(f"{name} {s:.2f} s" for name, s in middle.items()))
        ratio = median_ratio(took["eight"], took["one"])
        verdict("16 rows with 8 adapters over 1", ratio, at_most=1.3)
        pool = rewards["r0"].adapters
        assert pool is not None
        assert len(pool.loaded) == NUM_ADAPTERS
        what = f"memory of 8 adapters of rank {RANK} over one merged model"
        verdict(what, (model + pool.num_bytes) / model, at_most=1.15)


def main() -> None:
    torch.set_num_threads(1)
    lines = sys.argv[1:] or ["forms", "adapters", "caches"]
    base, reward = random_llava("base", BASE, seed=0), random_llava("reward", REWARD, seed=1)
    sizes = [vlm.model.num_parameters() for vlm in (base, reward)]
    print(f"base {sizes[0] / 1e6:.0f} M, reward {sizes[1] / 1e6:.0f} M: {sizes[0] / sizes[1]:.1f}")
    if "adapters" in lines:
        measure_adapters()
    if "forms" in lines or "caches" in lines:
        measure_forms(base, reward, caches="caches" in lines)
    # Last, because it counts what happens in every forward from here on.
    report(engine_us())
    finish()


def measure_forms(base: VLM, reward: VLM, *, caches: bool) -> None:
    lockstep_s = 0.0
    lockstep = EngineOptions(max_drafts=0)
    other = random_llava("other", REWARD, seed=2)
    alone, guided = Engine(Models(base)), Engine(Models(base, reward), lockstep)
    several = Engine(Models(base, more={"one": reward, "two": other}), lockstep)
    both = Guidance(weights={"one": 0.25, "two": 0.25})
    for batch, rounds in ((1, 5), (8, 2)):
        runs = {
            "base": answering(alone, [UNGUIDED] * batch),
            "reward": answering(Engine(Models(reward)), [UNGUIDED] * batch),
            "lockstep": answering(guided, [Guidance(weight=0.5)] * batch),
            "two rewards": answering(several, [both] * batch),
            "vcd": answering(alone, [Guidance(form="vcd", weight=1.0)] * batch),
        }
        took = in_rounds(runs, rounds=rounds)
        middle = {name: statistics.median(times) for name, times in took.items()}
        print(f"batch {batch}: " + ", ".join(f"{name} {s:.2f} s" for name, s in middle.items()))
        if batch == 1:
            lockstep_s = middle["lockstep"]
        over = {name: median_ratio(times, took["base"]) for name, times in took.items()}
        r = over["reward"]
        for name, at_most in (
            ("lockstep", 1.05 * (1 + r)),
            ("two rewards", 1.05 * (1 + 2 * r)),
            ("vcd", 1.05 * 2),
        ):
            verdict(f"batch {batch}: {name} over base alone", over[name], at_most=at_most)
    if caches:
        slow_s = without_caches_s(Models(base, reward))
        print(f"without caches {slow_s:.0f} s (from forwards at three lengths)")
        verdict("speed over decoding without caches", slow_s / lockstep_s, at_least=20)


if __name__ == "__main__":
    main()
