"""Sampling, aborts, log-probabilities and refusals of the vLLM engine."""

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator

import pytest
import scipy.stats
import torch

pytest.importorskip("vllm", reason="engine vllm is not installed: run make test-vllm")

from vllm import SamplingParams

from tests.vllm.engines import (
    GUIDANCES,
    answers,
    mixed_requests,
    pictures,
    reference_engine,
    vllm_batch,
)
from tests.vllm.pairs import random_pair
from tita.align import Engine, Guidance, Request, Sampling
from tita.align.forms import VIEW_FORMS
from tita.align.guidance import log_softmax
from tita.engine import vllm_engine
from tita.engine.engine_options import VllmOptions
from tita.engine.vllm_batch import VllmBatch
from tita.engine.vllm_engine import VllmEngine, load_outlines, start_vllm
from tita.errors import TitaError
from tita.vllm_plugin.logits_processors import GuidanceRows
from tita.vlm.inputs import prepare


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = random_pair(tmp_path_factory.mktemp("random"))
    return found | {"reference": found["base"]}


@pytest.fixture(scope="module")
def reference(paths: dict[str, str]) -> Engine:
    return reference_engine(paths)


@pytest.fixture(scope="module")
def batch(paths: dict[str, str]) -> Iterator[VllmBatch]:
    with vllm_batch(paths, max_batch=16, block_size=32) as started:
        yield started


def request(**how: object) -> Request:
    values = {"question": "what is it ?", "images": tuple(pictures(1)), **how}
    return Request(**values)  # type: ignore[arg-type]


@torch.inference_mode()
def exact(engine: Engine, asked: Request) -> torch.Tensor:
    """The combined distribution[V] of the first token, from whole forward passes."""
    vlms = engine.models.by_role()
    logs = [
        log_softmax(vlm.model(**prepare(vlm, [asked.prompt])).logits[:, -1])
        for vlm in (vlms["base"], vlms["reward"])
    ]
    mixed = logs[0] + asked.guidance.weight * (logs[1] - logs[0])
    return (mixed / asked.sampling.temperature).softmax(-1)[0].double()


def test_samples_are_of_the_combined_distribution(batch: VllmBatch, reference: Engine) -> None:
    number, first = (
        3000,
        request(
            guidance=Guidance(weight=0.6), sampling=Sampling(max_new_tokens=1, temperature=2.0)
        ),
    )
    asked = [
        dataclasses.replace(first, sampling=dataclasses.replace(first.sampling, seed=seed))
        for seed in range(number)
    ]
    engine = VllmEngine(batch, batch.models)
    tokens: Counter[int] = Counter()
    for index, outcome in engine.stream(asked):
        assert not isinstance(outcome, TitaError), index
        tokens[outcome.id] += 1
    expected = exact(reference, first) * number
    frequent = expected >= 5
    observed = torch.tensor([tokens[token] for token in range(len(expected))], dtype=torch.double)
    pooled = [
        torch.cat([each[frequent], each[~frequent].sum().reshape(1)])
        for each in (observed, expected)
    ]
    assert int(frequent.sum()) >= 5, "too few tokens to compare"
    # scipy compares the sums to 8 digits, and float32 has 7.
    observed, expected = pooled[0].numpy(), (pooled[1] * number / pooled[1].sum()).numpy()
    test = scipy.stats.chisquare(observed, expected)
    assert test.pvalue > 0.001


def test_log_probabilities_are_of_the_combined_distribution(
    batch: VllmBatch, reference: Engine
) -> None:
    asked = [request(guidance=guidance, num_logprobs=3) for guidance in GUIDANCES[:4]]
    found, expected = (
        [outcome for _, outcome in sorted(engine.stream(asked), key=lambda each: each[0])]
        for engine in (VllmEngine(batch, batch.models), reference)
    )
    for one, other in zip(found, expected, strict=True):
        assert not isinstance(one, TitaError)
        assert not isinstance(other, TitaError)
        assert (one.id, one.text, one.bytes) == (other.id, other.text, other.bytes)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [each.text for each in one.alternatives] == [
            each.text for each in other.alternatives
        ]


def test_aborts_free_their_blocks(batch: VllmBatch, reference: Engine) -> None:
    asked = mixed_requests(2, long=60)
    prepared = batch.preparer.prepare_all(asked)
    for number, each in enumerate(prepared):
        assert not isinstance(each, TitaError)
        batch.admit(number, each)
    for _ in range(3):
        batch.step()
    assert batch.counts().kv_usage > 0
    for number in range(len(prepared)):
        batch.release(number)
    assert len(batch) == 0
    # vLLM updates its figures with a step.
    (after,) = answers(batch, [request()])
    assert batch.counts().kv_usage == 0
    assert after == reference.generate([request()])[0]


def test_fuzz(batch: VllmBatch, reference: Engine) -> None:
    """Many requests that join, end and are aborted at random: no wrong answer, none is stuck."""
    source = random.Random(0)
    images, number = pictures(6), 500
    forms = (*GUIDANCES, Guidance(weight=0.8, form="dpo"), Guidance(weight=0.4, form="genarm"))
    asked = [
        request(
            images=tuple(source.sample(images, source.choice((0, 1, 1, 1, 2)))),
            question=source.choice(("what is it ?", "is there a 3 in the image ?", "which")),
            guidance=source.choice(forms),
            sampling=Sampling(
                max_new_tokens=(length := source.randint(1, 30)),
                min_new_tokens=min(length, source.choice((0, 0, 3))),
                ignore_end=source.random() < 0.5,
                stops=source.choice(((), ("e",), ("is", "no"))),
                stop_token_ids=source.choice(((), (), (7, 8, 9))),
                temperature=source.choice((0.0, 0.0, 1.0)),
                seed=source.randint(0, 9),
            ),
        )
        for _ in range(number)
    ]
    expected = reference.generate(asked)
    aborted = set(source.sample(range(number), 100))
    waiting, tokens = list(range(number)), {n: list[int]() for n in range(number)}
    finished: set[int] = set()
    for _ in range(10_000):
        while waiting and len(batch) < 24:
            index = waiting.pop()
            prepared = batch.preparer.prepare(asked[index])
            batch.admit(index, prepared)
        for key, outcome in batch.step():
            assert isinstance(key, int)
            assert not isinstance(outcome, TitaError), outcome
            tokens[key] += [outcome.id] if outcome.counted else []
            if outcome.finish_reason:
                finished.add(key)
            elif key in aborted and source.random() < 0.3:
                batch.release(key)
                finished.add(key)
        if not waiting and not len(batch):
            break
    assert finished == set(range(number))
    for index in set(range(number)) - aborted:
        assert tuple(tokens[index]) == expected[index].token_ids, asked[index]
    answers(batch, [request()])
    assert batch.counts().kv_usage == 0


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("1", "is set, and vLLM has no Triton for this device"), ("true", "is 'true'")],
)
def test_model_runners_that_vllm_does_not_have(
    paths: dict[str, str], monkeypatch: pytest.MonkeyPatch, wanted: str, message: str
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", wanted)
    monkeypatch.setattr(vllm_engine, "HAS_TRITON", False)
    with pytest.raises(TitaError, match=f"VLLM_USE_V2_MODEL_RUNNER {message}"):
        start_vllm(load_outlines(paths), VllmOptions(processes=False))


def test_log_probabilities_of_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt_logprobs are not available"):
        GuidanceRows.validate_params(SamplingParams(prompt_logprobs=1))


@pytest.mark.parametrize("form", sorted(VIEW_FORMS))
def test_forms_with_a_second_view_are_refused(batch: VllmBatch, form: str) -> None:
    with pytest.raises(TitaError, match=f"form {form} runs the base model on"):
        answers(batch, [request(guidance=Guidance.of(form=form, weight=0.5))])


def test_best_of_is_refused(batch: VllmBatch) -> None:
    asked = request(sampling=Sampling(max_new_tokens=3, temperature=1.0))
    with pytest.raises(TitaError, match="best of n needs implicit rewards"):
        VllmEngine(batch, batch.models).best_of([asked], 2)
