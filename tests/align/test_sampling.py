"""Sampling equals the definition, and depends on the seed alone."""

import dataclasses

import pytest

from tests.align.definition import LENGTH, at, by_definition
from tita.align import Engine, Guidance, Request, Sampling
from tita.vlm.inputs import prepare
from tita.vlm.loading import VLM, Models
from tita.vlm.prompts import Prompt


def test_sampling_equals_the_definition(
    engine: Engine, base: VLM, reward: VLM, requests: list[Request]
) -> None:
    ways = [{}, {"top_p": 0.8}, {"top_p": 0.3}, {"top_k": 3}, {"top_p": 0.6, "top_k": 5}]
    warm = [
        dataclasses.replace(
            request,
            guidance=Guidance(weight=0.4),
            sampling=Sampling(max_new_tokens=LENGTH, temperature=2.5, seed=n, **ways[n % 5]),
        )
        for n, request in enumerate(requests)
    ]
    for request, answer in zip(warm, engine.generate(warm), strict=True):
        assert list(answer.token_ids) == by_definition(Models(base, reward), request)


def test_sampling_depends_on_the_seed_not_the_batch(
    engine: Engine, requests: list[Request]
) -> None:
    warm = [
        dataclasses.replace(
            request, sampling=Sampling(max_new_tokens=LENGTH, temperature=3.0, seed=seed)
        )
        for seed, request in enumerate(requests)
    ]
    together = engine.generate(warm)
    assert [engine.generate([request])[0].token_ids for request in warm] == [
        answer.token_ids for answer in together
    ]
    assert [a.token_ids for a in together] != [a.token_ids for a in engine.generate(requests)]


def test_sampling_noise_is_not_counted_as_change(engine: Engine, requests: list[Request]) -> None:
    sampling = Sampling(max_new_tokens=LENGTH, temperature=3.0, seed=1, top_p=0.95)
    warm = [dataclasses.replace(request, sampling=sampling) for request in requests]
    assert all(answer.num_changed == 0 for answer in engine.generate(at(warm, 0.0)))
    # With a tiny weight almost no token changes, whatever the noise.
    faint = engine.generate(at(warm, 1e-6))
    assert sum(answer.num_changed for answer in faint) == 0
    assert sum(answer.num_changed for answer in engine.generate(at(warm, 1.0))) > 0


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_repetition_penalty_equals_generate(
    engine: Engine, base: VLM, reward: VLM, requests: list[Request], weight: float
) -> None:
    sampling = Sampling(max_new_tokens=LENGTH, repetition_penalty=1.8, ignore_end=True)
    asked = [dataclasses.replace(request, sampling=sampling) for request in requests[:6]]
    vlm = reward if weight else base
    for request, answer in zip(asked, engine.generate(at(asked, weight)), strict=True):
        inputs = prepare(vlm, [Prompt(text=request.question, images=request.images)])
        output = vlm.model.generate(
            **inputs,
            max_new_tokens=LENGTH,
            do_sample=False,
            repetition_penalty=1.8,
            eos_token_id=-1,
        )
        assert list(answer.token_ids) == output[0, inputs["input_ids"].shape[1] :].tolist()


def test_top_k_and_top_p_limit_the_choice(engine: Engine, requests: list[Request]) -> None:
    """At a high temperature, top-k of 1 and a tiny top-p still give the greedy answer."""
    greedy = [answer.token_ids for answer in engine.generate(requests)]
    for kept in ({"top_k": 1}, {"top_p": 1e-6}):
        sampling = Sampling(max_new_tokens=LENGTH, temperature=50.0, **kept)
        hot = [dataclasses.replace(request, sampling=sampling) for request in requests]
        assert [answer.token_ids for answer in engine.generate(hot)] == greedy
