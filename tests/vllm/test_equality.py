"""vLLM's answers equal those of the transformers engine, token for token: requests of all kinds.

One engine for all tests of this file: another one in this process would end its process groups.
"""

import dataclasses
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="engine vllm is not installed: run make test-vllm")

from tests.vllm.engines import (
    answers,
    assert_same,
    mixed_requests,
    pictures,
    reference_engine,
    vllm_batch,
)
from tests.vllm.pairs import random_pair
from tita.align import Answer, Guidance, Request, Sampling
from tita.engine.vllm_batch import VllmBatch
from tita.errors import TitaError

Case = tuple[dict[str, str], list[Request], list[Answer]]


@pytest.fixture(scope="module")
def random_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Random models, requests, and the transformers engine's answers."""
    paths = random_pair(tmp_path_factory.mktemp("random"))
    requests = mixed_requests(6)
    expected = reference_engine(paths).generate(requests)
    assert len({answer.text for answer in expected}) > 15, "the answers are too much alike"
    assert sum(answer.num_changed > 0 for answer in expected) > 30
    return paths, requests, expected


@pytest.fixture(scope="module")
def shared(random_case: Case) -> Iterator[VllmBatch]:
    with vllm_batch(random_case[0], block_size=32) as batch:
        yield batch


def test_random_pair(random_case: Case, shared: VllmBatch) -> None:
    assert_same(random_case[2], answers(shared, random_case[1]))


def test_prefix_cache_keeps_images_apart(random_case: Case, shared: VllmBatch) -> None:
    """Prompts that differ in their image alone, and later weights, are asked again."""
    before = shared.counts().prefix_hits["base"]
    assert_same(random_case[2], answers(shared, random_case[1]))
    assert shared.counts().prefix_hits["base"] > before, "nothing came from the prefix cache"


def test_reward_sees_other_images(random_case: Case, shared: VllmBatch) -> None:
    """The control in which the reward model gets another image than the base."""
    paths = random_case[0]
    first, second = pictures(2)
    requests = [
        Request(
            question="what number is written ?",
            images=(first,),
            reward_images=other,
            guidance=Guidance(weight=0.7),
            sampling=Sampling(max_new_tokens=20, ignore_end=True),
        )
        for other in (None, (second,), None, (first,))
    ]
    expected = reference_engine(paths).generate(requests)
    assert expected[0] != expected[1]
    assert_same(expected, answers(shared, requests))


def test_stops_lengths_and_penalties(random_case: Case, shared: VllmBatch) -> None:
    """What ends an answer, and what changes its tokens besides guidance."""
    paths, requests, _ = random_case
    samplings = (
        Sampling(max_new_tokens=30, stops=("e",), ignore_end=True),
        Sampling(max_new_tokens=30, min_new_tokens=10),
        Sampling(max_new_tokens=30, min_new_tokens=5, stop_token_ids=(7, 8, 9)),
        Sampling(max_new_tokens=30, stop_token_ids=tuple(range(20, 30)), ignore_end=True),
        Sampling(max_new_tokens=30, repetition_penalty=1.3, ignore_end=True),
        Sampling(max_new_tokens=1),
    )
    asked = [
        dataclasses.replace(request, sampling=sampling)
        for request in requests[:24:2]
        for sampling in samplings
    ]
    expected = reference_engine(paths).generate(asked)
    found = answers(shared, asked)
    assert_same(expected, found)


def test_long_answers(random_case: Case, shared: VllmBatch) -> None:
    """As long as the models' context permits."""
    paths, requests, _ = random_case
    sampling = Sampling(max_new_tokens=200, ignore_end=True)
    asked = [dataclasses.replace(each, sampling=sampling) for each in requests[1:24:2]]
    expected = reference_engine(paths).generate(asked)
    assert min(len(answer.token_ids) for answer in expected) > 150
    assert len({answer.token_ids[-20:] for answer in expected}) > 6, "the answers repeat"
    assert_same(expected, answers(shared, asked))


def test_sampled_answers_depend_on_their_seed_alone(random_case: Case, shared: VllmBatch) -> None:
    """The same noise in both engines, whatever else is in the batch."""
    paths, requests, _ = random_case
    samplings = (
        Sampling(max_new_tokens=30, temperature=0.7, seed=1),
        Sampling(max_new_tokens=30, temperature=1.5, top_p=0.8, seed=2),
        Sampling(max_new_tokens=30, temperature=1.0, top_k=5, seed=2**70, ignore_end=True),
        Sampling(max_new_tokens=30, temperature=1.0, repetition_penalty=1.2, seed=3),
    )
    asked = [
        dataclasses.replace(request, sampling=sampling)
        for request in requests[::8]
        for sampling in samplings
    ]
    expected = reference_engine(paths).generate(asked)
    assert len({answer.text for answer in expected}) > 20
    assert_same(expected, answers(shared, asked))


def test_explained_answers(random_case: Case, shared: VllmBatch) -> None:
    """Log-probabilities under base, reward and combined distribution."""
    paths, requests, _ = random_case
    asked = [dataclasses.replace(request, explain=True) for request in requests[:12]]
    expected = reference_engine(paths).generate(asked)
    for one, other in zip(expected, answers(shared, asked), strict=True):
        assert one.token_ids == other.token_ids
        for token, same in zip(one.tokens, other.tokens, strict=True):
            assert (token.id, token.text, token.changed) == (same.id, same.text, same.changed)
            for name in ("base", "reward", "combined"):
                assert getattr(token, name) == pytest.approx(getattr(same, name), abs=2e-3)


def test_form_without_its_model_is_refused(random_case: Case, shared: VllmBatch) -> None:
    asked = dataclasses.replace(random_case[1][0], guidance=Guidance(weight=0.5, form="dpo"))
    with pytest.raises(TitaError, match="form dpo without a reference model"):
        answers(shared, [asked])


def test_several_images_and_none(random_case: Case, shared: VllmBatch) -> None:
    paths = random_case[0]
    images = pictures(3)
    sampling = Sampling(max_new_tokens=12, ignore_end=True)
    requests = [
        Request(question="what is it ?", images=tuple(images[:number]), sampling=sampling)
        for number in range(4)
    ]
    expected = reference_engine(paths).generate(requests)
    assert_same(expected, answers(shared, requests))
