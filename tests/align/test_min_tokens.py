"""A minimum answer length: nothing ends an answer before it."""

import dataclasses

import pytest

from tests.align.definition import asked
from tita.align import Engine, Guidance, Request, Sampling
from tita.align.sequence import Detokenizer
from tita.errors import TitaError
from tita.vlm.inputs import prepare
from tita.vlm.loading import VLM

LENGTH, MINIMUM = 12, 8


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return asked(2, sampling=Sampling(max_new_tokens=LENGTH, min_new_tokens=MINIMUM))


def test_greedy_answers_equal_generate(engine: Engine, base: VLM, requests: list[Request]) -> None:
    unguided = [dataclasses.replace(r, guidance=Guidance(weight=0)) for r in requests]
    for request, answer in zip(unguided, engine.generate(unguided), strict=True):
        inputs = prepare(base, [request.prompt])
        output = base.model.generate(
            **inputs, do_sample=False, max_new_tokens=LENGTH, min_new_tokens=MINIMUM
        )
        wanted = output[0, inputs["input_ids"].shape[1] :].tolist()
        ended = wanted[-1] == base.tokenizer.eos_token_id
        assert list(answer.token_ids) == (wanted[:-1] if ended else wanted)


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(weight=0.4),
        Guidance(weight=1.0),
        Guidance(weight=2.5),
        Guidance(weight=0.4, form="genarm"),
        # Only the base model's best token is plausible, and that may be one that would end.
        Guidance(weight=0.4, plausibility=1.0),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_no_answer_is_shorter(
    engine: Engine, base: VLM, requests: list[Request], guidance: Guidance, temperature: float
) -> None:
    plain = Sampling(max_new_tokens=LENGTH, temperature=temperature, seed=3)
    short = [dataclasses.replace(r, guidance=guidance, sampling=plain) for r in requests]
    ends = {base.tokenizer.eos_token_id}
    assert min(len(answer.token_ids) for answer in engine.generate(short)) < MINIMUM
    minimum = dataclasses.replace(plain, min_new_tokens=MINIMUM)
    for answer in engine.generate([dataclasses.replace(r, sampling=minimum) for r in short]):
        assert len(answer.token_ids) >= MINIMUM
        assert ends.isdisjoint(answer.token_ids)


def test_an_ignored_end_of_text_waits_too(
    engine: Engine, base: VLM, requests: list[Request]
) -> None:
    """As in vLLM; clients that measure fixed lengths send both options."""
    ignoring = Sampling(max_new_tokens=LENGTH, ignore_end=True)
    minimum = dataclasses.replace(ignoring, min_new_tokens=MINIMUM)
    end = base.tokenizer.eos_token_id
    alone = engine.generate([dataclasses.replace(r, sampling=ignoring) for r in requests])
    both = engine.generate([dataclasses.replace(r, sampling=minimum) for r in requests])
    assert {len(answer.token_ids) for answer in [*alone, *both]} == {LENGTH}
    assert all(end in answer.token_ids[:MINIMUM] for answer in alone)
    assert not any(end in answer.token_ids[:MINIMUM] for answer in both)


def test_stop_tokens_wait(engine: Engine, requests: list[Request]) -> None:
    for request, plain in zip(requests, engine.generate(requests), strict=True):
        sampling = dataclasses.replace(request.sampling, stop_token_ids=plain.token_ids[:1])
        (answer,) = engine.generate([dataclasses.replace(request, sampling=sampling)])
        assert plain.token_ids[0] not in answer.token_ids[:MINIMUM]
        assert len(answer.token_ids) >= MINIMUM


def test_stop_strings_count_after_the_minimum_only(base: VLM) -> None:
    words = ["is", "there", "a", "7", "?", "is", "there", "a", "7", "?"]
    ids = [base.tokenizer.encode(word, add_special_tokens=False)[0] for word in words]

    def text(minimum: int) -> str:
        detokenizer = Detokenizer(base.tokenizer, ("a 7",), min_tokens=minimum)
        pieces = []
        for token in ids:
            pieces.append(detokenizer.add(token))
            if detokenizer.stopped:
                break
        return "".join(pieces)

    assert text(0) == text(3) == "is there"
    assert text(4) == text(8) == "is there a 7 ? is there"
    assert text(9) == "is there a 7 ? is there a 7 ?"


def test_a_minimum_above_the_maximum_is_refused() -> None:
    with pytest.raises(TitaError, match="min_new_tokens is 65"):
        Sampling(max_new_tokens=64, min_new_tokens=65)
    with pytest.raises(TitaError, match="min_new_tokens is -1"):
        Sampling(min_new_tokens=-1)
