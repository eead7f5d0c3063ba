"""Prompts given as token ids of the base model."""

import dataclasses

import pytest

from tests.align.test_vocabulary import renumbered, shuffled
from tita.align import Engine, Guidance, Request, Sampling
from tita.align.prompts import Preparer
from tita.errors import TitaError
from tita.vlm.loading import VLM, Models
from tita.vlm.prompts import BadConversation

TEXT = Request(
    question="what number is written ?", guidance=Guidance(weight=0.6), explain=True,
    sampling=Sampling(max_new_tokens=6, ignore_end=True),
)  # fmt: skip


def as_ids(models: Models, request: Request) -> Request:
    ids = Preparer(models).prepare(request).inputs["base"]["input_ids"][0].tolist()
    return dataclasses.replace(request, question="", token_ids=tuple(ids))


def test_they_answer_as_the_text_does(engine: Engine) -> None:
    requests = [TEXT, as_ids(engine.models, TEXT)]
    text, ids = engine.generate(requests)
    assert ids == text
    (alone,) = engine.generate(requests[1:])
    assert alone.token_ids == text.token_ids


def test_a_reward_model_with_other_ids_reads_the_same_tokens(base: VLM, reward: VLM) -> None:
    other = Engine(Models(base, renumbered(reward, order=shuffled(reward))))
    (wanted,) = Engine(Models(base, reward)).generate([TEXT])
    (found,) = other.generate([as_ids(other.models, TEXT)])
    assert found.token_ids == wanted.token_ids
    for one, another in zip(found.tokens, wanted.tokens, strict=True):
        assert one.reward == pytest.approx(another.reward, abs=1e-4)


def test_ids_that_are_no_text_are_refused(engine: Engine, base: VLM) -> None:
    image = base.tokenizer.convert_tokens_to_ids("<image>")
    for token in (-1, len(base.tokenizer), 2**40, image):
        with pytest.raises(BadConversation, match=f"token {token}"):
            engine.generate([Request(token_ids=(2, token))])


def test_one_prompt_has_one_form() -> None:
    for other in ({"question": "what ?"}, {"raw": "what ?"}):
        with pytest.raises(TitaError, match="token ids beside another prompt"):
            Request(token_ids=(1,), **other)  # type: ignore[arg-type]
