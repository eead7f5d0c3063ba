"""The engine equals the reference results token for token, alone and in batches."""

import dataclasses

import pytest

from tests.align.definition import LENGTH, at, by_definition
from tita.align import Engine, Guidance, Request, Sampling, TokenOutput
from tita.demo.models import demo_model_path
from tita.vlm.inputs import prepare
from tita.vlm.loading import VLM, Models, load_vlm
from tita.vlm.prompts import Prompt


def transformers_answers(vlm: VLM, requests: list[Request]) -> list[str]:
    """Greedy answers of transformers' `generate`, one request at a time."""
    answers = []
    for request in requests:
        inputs = prepare(vlm, [Prompt(text=request.question, images=request.images)])
        output = vlm.model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(vlm.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def test_weight_0_equals_generate_of_the_base(
    engine: Engine, base: VLM, requests: list[Request]
) -> None:
    answers = [answer.text for answer in engine.generate(at(requests, 0.0))]
    assert answers == transformers_answers(base, requests)


def test_weight_1_equals_generate_of_the_reward(
    engine: Engine, reward: VLM, requests: list[Request]
) -> None:
    answers = [answer.text for answer in engine.generate(at(requests, 1.0))]
    assert answers == transformers_answers(reward, requests)


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.7])
def test_batches_equal_the_definition(
    engine: Engine, base: VLM, reward: VLM, requests: list[Request], weight: float
) -> None:
    guided = at(requests, weight)
    answers = engine.generate(guided)
    for request, answer in zip(guided, answers, strict=True):
        assert list(answer.token_ids) == by_definition(Models(base, reward), request)


def test_weights_are_per_request(engine: Engine, requests: list[Request]) -> None:
    weights = [0.0, 0.3, 1.0]
    mixed = [request for w in weights for request in at(requests, w)]
    together = engine.generate(mixed)
    alone = [answer for w in weights for answer in engine.generate(at(requests, w))]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert len({a.token_ids for a in together}) > 3


def test_weights_may_be_integers(engine: Engine, requests: list[Request]) -> None:
    wanted = engine.generate(at(requests, 1.0))
    whole = [
        dataclasses.replace(request, guidance=Guidance(weight=1, plausibility=0))
        for request in at(requests, 1)
    ]
    assert engine.generate(whole) == wanted


def test_explained_tokens_add_up(engine: Engine, requests: list[Request]) -> None:
    explained = [
        dataclasses.replace(r, explain=True, guidance=Guidance(weight=0.4)) for r in requests
    ]
    plain = engine.generate(at(requests, 0.4))
    for answer, bare in zip(engine.generate(explained), plain, strict=True):
        assert answer.token_ids == bare.token_ids
        ends = int(answer.finish_reason == "stop")
        assert len(answer.tokens) == len(answer.token_ids) + ends
        assert answer.num_changed == sum(token.changed for token in answer.tokens)
        for token in answer.tokens:
            assert max(token.base, token.reward, token.combined) <= 0
    assert all(answer.num_changed == 0 for answer in engine.generate(at(requests, 0.0)))


def test_reward_images_change_only_the_reward_model(
    engine: Engine, requests: list[Request]
) -> None:
    other = requests[-1].images
    blind = [
        dataclasses.replace(r, reward_images=other, guidance=Guidance(weight=0.0)) for r in requests
    ]
    assert engine.generate(blind) == engine.generate(at(requests, 0.0))
    half = [
        dataclasses.replace(r, reward_images=other, guidance=Guidance(weight=0.5)) for r in requests
    ]
    assert engine.generate(half) != engine.generate(at(requests, 0.5))


def test_answers_end_before_stop_tokens(engine: Engine, requests: list[Request]) -> None:
    for request, plain in zip(requests, engine.generate(requests), strict=True):
        sampling = Sampling(max_new_tokens=LENGTH, stop_token_ids=plain.token_ids[-1:])
        (answer,) = engine.generate([dataclasses.replace(request, sampling=sampling)])
        assert answer.finish_reason == "stop"
        assert answer.token_ids == plain.token_ids[: plain.token_ids.index(plain.token_ids[-1])]


def test_stream_equals_generate(engine: Engine, requests: list[Request]) -> None:
    texts = [""] * len(requests)
    last = [False] * len(requests)
    for place, output in engine.stream(requests):
        assert isinstance(output, TokenOutput)
        assert not last[place]
        texts[place] += output.text
        last[place] = output.finish_reason is not None
    assert all(last)
    assert [text.strip() for text in texts] == [a.text for a in engine.generate(requests)]


@pytest.mark.gpu
def test_gpu_equals_cpu(engine: Engine, requests: list[Request]) -> None:
    """Greedy and sampled, in a batch and with drafts: noise does not depend on the device."""
    on_gpu = [load_vlm(str(demo_model_path(role))) for role in ("base", "reward")]
    for vlm in on_gpu:
        vlm.model.to("cuda")
    there = Engine(Models(*on_gpu))
    for temperature in (0.0, 2.0):
        sampling = Sampling(max_new_tokens=LENGTH, temperature=temperature, seed=4)
        asked = [dataclasses.replace(request, sampling=sampling) for request in requests]
        wanted = [answer.token_ids for answer in engine.generate(asked)]
        assert [answer.token_ids for answer in there.generate(asked)] == wanted
        assert [there.generate([each])[0].token_ids for each in asked] == wanted


def test_length_limit_is_reported(engine: Engine, requests: list[Request]) -> None:
    short = [dataclasses.replace(r, sampling=Sampling(max_new_tokens=1)) for r in requests]
    for answer in engine.generate(short):
        assert len(answer.token_ids) == 1
        assert answer.finish_reason == "length"


def test_no_requests_no_answers(engine: Engine) -> None:
    assert engine.generate([]) == []
