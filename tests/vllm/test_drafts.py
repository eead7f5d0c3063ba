"""Drafting on vLLM: answers equal those of the transformers engine, token for token."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="engine vllm is not installed: run make test-vllm")

from tests import families
from tests.vllm.engines import GUIDANCES as DEMO_GUIDANCES
from tests.vllm.engines import (
    Case,
    answers,
    assert_same,
    demo_case,
    mixed_requests,
    pictures,
    reference_engine,
    vllm_batch,
)
from tests.vllm.pairs import llava, random_pair, wider_pair
from tests.vllm.test_adapters import adapters
from tests.vllm.test_families import build, family_pair, family_requests
from tita.align import Guidance, Request, Sampling
from tita.demo.models import demo_model_path
from tita.engine.engine_options import VllmOptions
from tita.engine.vllm_batch import VllmBatch
from tita.engine.vllm_engine import load_outlines, set_up
from tita.errors import TitaError

NUM_DRAFTS = 3
GUIDANCES = (
    Guidance(weight=0.0),
    *(Guidance(weights={"good": weight}) for weight in (0.3, 1.0, 1.5)),
    Guidance(weights={"good": 0.5}, plausibility=0.1),
    Guidance(weights={"good": 0.5}, form="genarm"),
    Guidance(weights={"good": 0.7}, form="dpo"),
    Guidance(weights={"good": 0.4, "brief": 0.4}),
)


@pytest.fixture(scope="module")
def random_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Random models, of which the first reward model drafts; requests and expected answers."""
    folder = tmp_path_factory.mktemp("random")
    pair = random_pair(folder)
    # Its own answers are varied, too.
    good = llava(
        folder / "good", seed=6, width=128, heads=4, kv_heads=2, head_size=32, layers=4, tied=False
    )
    paths = {"base": pair["base"], "good": good, "brief": pair["reward"]}
    paths["reference"] = pair["reward"]
    requests = mixed_requests(3, GUIDANCES)
    expected = reference_engine(paths).generate(requests)
    assert len({answer.text for answer in expected}) > 15, "the answers are too much alike"
    return paths, requests, expected


@pytest.fixture(scope="module")
def shared(random_case: Case) -> Iterator[VllmBatch]:
    with vllm_batch(random_case[0], block_size=32, max_drafts=NUM_DRAFTS) as batch:
        assert batch.capabilities.drafts
        yield batch


def accepted(batch: VllmBatch) -> tuple[int, int]:
    """Numbers of drafted and accepted tokens so far."""
    counts = batch.counts()
    return counts.num_draft_tokens, counts.num_accepted_tokens


def test_weights_and_forms_in_one_batch(random_case: Case, shared: VllmBatch) -> None:
    """Two of the three reward models do not draft."""
    before = accepted(shared)
    assert_same(random_case[2], answers(shared, random_case[1]))
    drafted, right = (now - then for now, then in zip(accepted(shared), before, strict=True))
    assert drafted > right > 0


def test_drafts_are_those_of_the_reward_model(random_case: Case, shared: VllmBatch) -> None:
    """At weight 1 it decides alone, so all are right: it sees the images, and its own tokens."""
    paths = random_case[0]
    sampling = Sampling(max_new_tokens=1 + 8 * (1 + NUM_DRAFTS), ignore_end=True)
    requests = [
        Request(question="what is it ?", images=shown, sampling=sampling,
                guidance=Guidance(weights={"good": 1.0}))
        for image in pictures(6)
        for shown in ((image,), (image, image))
    ]  # fmt: skip
    expected = reference_engine(paths).generate(requests)
    assert len({answer.token_ids for answer in expected}) > 6, "the answers are too much alike"
    before = accepted(shared)
    assert_same(expected, answers(shared, requests))
    drafted, right = (now - then for now, then in zip(accepted(shared), before, strict=True))
    assert (drafted, right) == (len(requests) * 8 * NUM_DRAFTS,) * 2


def test_sampled_answers_depend_on_their_seed_alone(random_case: Case, shared: VllmBatch) -> None:
    paths, requests, _ = random_case
    samplings = (
        Sampling(max_new_tokens=30, temperature=0.7, seed=1),
        Sampling(max_new_tokens=30, temperature=1.5, top_p=0.8, seed=2),
        Sampling(max_new_tokens=30, temperature=1.0, top_k=5, seed=2**70, ignore_end=True),
        Sampling(max_new_tokens=30, temperature=0.3, repetition_penalty=1.2, seed=3),
        Sampling(max_new_tokens=30, repetition_penalty=1.3, min_new_tokens=9),
    )
    asked = [
        dataclasses.replace(request, sampling=sampling)
        for request in requests[2::6]
        for sampling in samplings
    ]
    expected = reference_engine(paths).generate(asked)
    assert len({answer.text for answer in expected}) > 20
    before = accepted(shared)
    assert_same(expected, answers(shared, asked))
    assert accepted(shared)[1] > before[1]


def test_explained_answers(random_case: Case, shared: VllmBatch) -> None:
    """Log-probabilities and changed tokens, also of tokens that were drafted."""
    paths, requests, _ = random_case
    asked = [dataclasses.replace(request, explain=True) for request in requests[:24:2]]
    expected = reference_engine(paths).generate(asked)
    for one, other in zip(expected, answers(shared, asked), strict=True):
        assert one.token_ids == other.token_ids
        for token, same in zip(one.tokens, other.tokens, strict=True):
            assert (token.id, token.text, token.changed) == (same.id, same.text, same.changed)
            for name in ("base", "combined"):
                assert getattr(token, name) == pytest.approx(getattr(same, name), abs=2e-3)


def test_answers_as_long_as_the_context(random_case: Case, shared: VllmBatch) -> None:
    """At its end, vLLM does not draft."""
    paths, requests, _ = random_case
    sampling = Sampling(max_new_tokens=1000, ignore_end=True)
    asked = [dataclasses.replace(each, sampling=sampling) for each in requests[2:40:6]]
    expected = reference_engine(paths).generate(asked)
    assert {answer.finish_reason for answer in expected} == {"length"}
    assert_same(expected, answers(shared, asked))


def test_requests_that_come_and_go(random_case: Case, shared: VllmBatch) -> None:
    """Aborted between other requests, which move in vLLM's batch."""
    _, requests, expected = random_case
    prepared = shared.preparer.prepare_all(requests)
    tokens = {number: list[int]() for number in range(len(requests))}
    aborted = set(range(0, len(requests), 5))
    waiting = list(tokens)
    while waiting or len(shared):
        while waiting and len(shared) < 10:
            number = waiting.pop(0)
            each = prepared[number]
            assert not isinstance(each, TitaError)
            shared.admit(number, each)
        for key, outcome in shared.step():
            assert isinstance(key, int)
            assert not isinstance(outcome, TitaError), outcome
            tokens[key] += [outcome.id] if outcome.counted else []
            if key in aborted and len(tokens[key]) > 4:
                shared.release(key)
    for number, answer in enumerate(expected):
        same = answer.token_ids[: len(tokens[number])] if number in aborted else answer.token_ids
        assert tuple(tokens[number]) == same, requests[number]


def test_demo_pair_compiled() -> None:
    """Trained models, with one reward model and one weight each."""
    paths, requests, expected = demo_case(2, [*DEMO_GUIDANCES, Guidance(weight=0.7, form="dpo")])
    with vllm_batch(paths, compile=True, max_drafts=NUM_DRAFTS) as batch:
        assert_same(expected, answers(batch, requests))
        assert accepted(batch)[1] > 0


def test_chunked_prefill_and_preemption(random_case: Case) -> None:
    """Images are taken in in parts; running answers are evicted and computed again."""
    paths, requests, expected = random_case
    with vllm_batch(
        paths,
        prefill_tokens=40,
        kv_cache_bytes=5 * 2**20,
        block_size=32,
        prefix_cache=False,
        max_drafts=NUM_DRAFTS,
    ) as batch:
        assert_same(expected, answers(batch, requests))
        assert batch.counts().num_preemptions > 0
        assert accepted(batch)[1] > 0


def test_two_processes(random_case: Case) -> None:
    """Layers of all models are split over two processes."""
    paths, requests, expected = random_case
    requests, expected = requests[::3], expected[::3]
    with vllm_batch(
        paths,
        max_batch=len(requests),
        tensor_parallel=2,
        processes=True,
        max_drafts=NUM_DRAFTS,
    ) as batch:
        assert_same(expected, answers(batch, requests))
        assert accepted(batch)[1] > 0


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl"])
def test_family(name: str, tmp_path: Path) -> None:
    paths = family_pair(tmp_path, name)
    requests = family_requests()
    expected = reference_engine(paths).generate(requests)
    alone = [number for number, each in enumerate(requests) if each.guidance.weight == 1]
    with vllm_batch(paths, max_model_len=512, max_drafts=NUM_DRAFTS) as batch:
        assert_same(expected, answers(batch, requests))
        before = accepted(batch)
        answers(batch, [requests[number] for number in alone])
        drafted, right = (now - then for now, then in zip(accepted(batch), before, strict=True))
        assert drafted == right > 0


def test_what_cannot_draft_is_refused(
    tmp_path: Path, random_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before vLLM is started."""

    def refused(paths: dict[str, str], match: str, **more: int) -> None:
        options = VllmOptions(processes=False, max_drafts=2, **more)  # type: ignore[arg-type]
        with pytest.raises(TitaError, match=match) as caught:
            set_up(load_outlines(paths), options)
        assert "leave out --max-drafts" in str(caught.value)

    pair = {role: str(demo_model_path(role)) for role in ("base", "reward")}
    refused({"base": pair["base"]}, "does not draft without a reward model")
    refused({"base": pair["base"], "reward": pair["base"]}, "the reward model is the base model")
    named = adapters(pair["reward"], tmp_path / "adapters", {"brief": {}})
    refused({"base": pair["base"], **named}, "with LoRA adapters")
    refused(pair, "with --pipeline-parallel-size", pipeline_parallel=2)
    refused(wider_pair(tmp_path / "wider"), "for models of different vocabularies")
    qwen = {
        role: build(tmp_path / role, families.qwen2_5_vl, seed=1, layers=1)
        for role in ("base", "reward")
    }
    refused(qwen, "positions of several dimensions")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr("tita.engine.vllm_engine.HAS_TRITON", True)
    refused(pair, "whose draft models see no image")
