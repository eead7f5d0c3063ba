"""Measures decoding: seconds per token of guided decoding beside the base model alone.

Ratios of runs that take turns, because a machine may be busy; prefill included.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tita.align import Engine, EngineOptions, Request
from tita.align.batch import Batch
from tita.selftest.checks import Check, CheckFailed, Figures
from tita.selftest.random_llava import Size, question, random_llava
from tita.selftest.timing import interleaved
from tita.selftest.uncached import generate
from tita.vlm.loading import Models

ROUNDS = 3
WEIGHT = 0.5
SPREAD = 1.5
"""A guided answer on a GPU may take this times what base and reward alone take together. Not a
target: with more, something is wrong. On a CPU, which others may use, no time is judged."""

STEPS = 4
"""Decode steps in which the time outside the models is measured."""
MAX_COPIES = 3
"""Copies to the host per decode step: the sampler needs one, and each model's forward may read
whether its attention mask has gaps (transformers)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedSetting:
    """Where decoding is measured, and with which models."""

    device: str
    dtype: torch.dtype
    base: Size
    reward: Size
    batches: tuple[int, ...]
    num_tokens: int


def checks_of_speed(setting: SpeedSetting) -> list[Check]:
    """A measurement for each batch size, and what happens outside the models."""

    @cache
    def models() -> Models:
        return Models(
            *(
                random_llava(name, size, seed=seed, dtype=setting.dtype, device=setting.device)
                for seed, (name, size) in enumerate(
                    (("base", setting.base), ("reward", setting.reward))
                )
            )
        )

    measured = [
        Check(
            name=f"decode-batch-{batch}",
            group="fast",
            about=f"tokens per second of guided decoding at batch {batch} beside base and reward "
            "alone",
            run=partial(_measure, setting, models, batch),
            expected_s=15,
        )
        for batch in setting.batches
    ]
    outside = Check(
        name="outside-models",
        group="fast",
        about="share of a decode step that is spent outside the models, and synchronisations with "
        "the device",
        run=partial(_outside, setting, models, setting.batches[-1]),
        expected_s=15,
    )
    return [*measured, outside]


def _requests(setting: SpeedSetting, batch: int, *, weight: float) -> list[Request]:
    return [
        question(n, weight=weight, num_tokens=setting.num_tokens, size=setting.base)
        for n in range(batch)
    ]


def _measure(setting: SpeedSetting, loaded: Callable[[], Models], batch: int) -> Figures:
    models = loaded()
    assert models.reward is not None
    lockstep = EngineOptions(max_drafts=0)
    agreeing = Models(models.base, models.base)
    guided = _requests(setting, batch, weight=WEIGHT)
    plain = _requests(setting, batch, weight=0.0)
    runs: dict[str, Callable[[], Any]] = {
        "transformers_generate": partial(generate, models.base, plain),
        "base": partial(Engine(Models(models.base)).generate, plain),
        "reward": partial(Engine(Models(models.reward)).generate, plain),
        "guided": partial(Engine(models, lockstep).generate, guided),
    }
    if batch == 1:
        # The base as its own reward model: every draft is accepted, at the base's own price.
        runs["drafts_all_accepted"] = partial(Engine(agreeing).generate, guided)
    timed = {name: partial(_seconds, run, device=setting.device) for name, run in runs.items()}
    took = interleaved(timed, rounds=ROUNDS)
    tokens = batch * setting.num_tokens
    figures = {f"{name}_tokens_per_s": tokens / seconds for name, seconds in took.items()}
    figures["guided_over_base"] = took["guided"] / took["base"]
    figures["base_over_generate"] = took["base"] / took["transformers_generate"]
    figures["base_and_reward_over_base"] = 1 + took["reward"] / took["base"]
    if setting.device == "cuda":
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        bound = SPREAD * figures["base_and_reward_over_base"]
        if figures["guided_over_base"] > bound:
            raise CheckFailed(
                f"a guided answer takes {figures['guided_over_base']:.2f} times the base's time, "
                f"bound {bound:.2f}"
            )
    return figures


def _seconds(run: Callable[[], Any], *, device: str) -> float:
    began = _clock(device)
    run()
    return _clock(device) - began


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _outside(setting: SpeedSetting, loaded: Callable[[], Models], batch: int) -> Figures:
    models = loaded()
    engine = Engine(models, EngineOptions(max_drafts=0))
    requests = _requests(setting, batch, weight=WEIGHT)
    engine.generate(requests)
    running = _started(engine, requests)
    if setting.device == "cuda":
        return _outside_kernels(running)
    inside = _ForwardTime(models)
    try:
        began = time.perf_counter()
        for _ in range(STEPS):
            running.step()
        took = time.perf_counter() - began
    finally:
        inside.remove()
    return {
        "share_outside_models": 1 - inside.seconds / took,
        "ms_outside_models_per_token": 1e3 * (took - inside.seconds) / batch / STEPS,
    }


def _started(engine: Engine, requests: Sequence[Request]) -> Batch:
    """A batch that has taken in the prompts, and only decodes from now on."""
    batch, waiting = engine.new_batch(), set(range(len(requests)))
    for number, request in enumerate(requests):
        batch.admit(number, engine.preparer.prepare(request))
    while waiting:
        waiting.difference_update(key for key, _ in batch.step())
    return batch


class _ForwardTime:
    """Seconds within the models' forward passes on a CPU."""

    def __init__(self, models: Models) -> None:
        self.seconds = 0.0
        self._began = 0.0
        self._handles = []
        for vlm in models.by_role().values():
            self._handles += [
                vlm.model.register_forward_pre_hook(self._begin),
                vlm.model.register_forward_hook(self._end),
            ]

    def _begin(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._began

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _outside_kernels(running: Batch) -> Figures:
    torch.cuda.synchronize()
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            running.step()
        torch.cuda.synchronize()
    took_us = 1e6 * (time.perf_counter() - began)
    events = profiled.key_averages()
    kernels_us = sum(event.self_device_time_total for event in events)

    def count(*names: str) -> float:
        return float(sum(event.count for event in events if event.key in names)) / STEPS

    figures = {
        "share_outside_kernels": max(0.0, 1 - kernels_us / took_us),
        "synchronisations_per_step": count(
            "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"
        ),
        "copies_to_host_per_step": count(
            "Memcpy DtoH (Device -> Pageable)", "Memcpy DtoH (Device -> Pinned)"
        ),
    }
    if figures["copies_to_host_per_step"] > MAX_COPIES:
        raise CheckFailed(
            f"{figures['copies_to_host_per_step']:.1f} copies to the host per step, bound "
            f"{MAX_COPIES}"
        )
    return figures
