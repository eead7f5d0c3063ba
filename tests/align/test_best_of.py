"""Best of n: the scores are the implicit rewards, and the shared prompt runs once."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.align.definition import Definition, asked, perturbed
from tita.align import Engine, EngineOptions, Guidance, Request, Sampling
from tita.align.best_of import choices_of
from tita.align.model_runner import ModelRunner
from tita.errors import TitaError
from tita.vlm.loading import VLM, Models

SAMPLING = Sampling(max_new_tokens=6, temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    guidances = (Guidance(weight=0.0), Guidance(weight=0.4), Guidance(form="vcd", weight=1.0))
    return [
        dataclasses.replace(each, guidance=guidance)
        for each, guidance in zip(asked(2, sampling=SAMPLING)[:3], guidances, strict=True)
    ]


def seeded(request: Request, offset: int) -> Request:
    return dataclasses.replace(
        request, sampling=dataclasses.replace(SAMPLING, seed=SAMPLING.seed + offset)
    )


@torch.inference_mode()
def wanted_score(models: Models, request: Request, ids: tuple[int, ...], end: int) -> float:
    """The summed implicit reward, every token computed without cache."""
    definition, against = Definition(models, request), "reference" if models.reference else "base"
    tokens = [*ids, end] if len(ids) < SAMPLING.max_new_tokens else list(ids)
    return sum(
        float(
            (definition.log_p(tokens[:n], "reward") - definition.log_p(tokens[:n], against))[0, t]
        )
        for n, t in enumerate(tokens)
    )


@pytest.mark.parametrize("with_reference", [False, True])
def test_the_answer_has_the_largest_implicit_reward(
    base: VLM, reward: VLM, requests: list[Request], with_reference: bool
) -> None:
    models = Models(base, reward, perturbed(reward, seed=1) if with_reference else None)
    alone = Engine(models)
    samples = [
        alone.generate([seeded(request, offset) for request in requests]) for offset in range(4)
    ]
    best = Engine(models).best_of(requests, 4)
    for index, (request, answer) in enumerate(zip(requests, best, strict=True)):
        of_each = [drawn[index] for drawn in samples]
        end = base.tokenizer.eos_token_id
        scores = [wanted_score(models, request, each.token_ids, end) for each in of_each]
        assert answer.scores == pytest.approx(scores, abs=1e-3)
        assert answer.token_ids == of_each[scores.index(max(scores))].token_ids
    assert len({each.token_ids for drawn in samples for each in drawn}) > 6


def test_best_of_1_is_sampling(models: Models, requests: list[Request]) -> None:
    one = Engine(models).best_of(requests, 1)
    plain = Engine(models).generate(requests)
    assert [each.token_ids for each in one] == [each.token_ids for each in plain]


@pytest.mark.parametrize("prefill_tokens", [512, 4])
def test_a_shared_prompt_runs_once(
    models: Models, requests: list[Request], monkeypatch: pytest.MonkeyPatch, prefill_tokens: int
) -> None:
    engine = Engine(models, EngineOptions(prefill_tokens=prefill_tokens))
    alone = engine.best_of(requests[1:2], 1)[0].num_prompt_tokens
    taken: list[int] = []
    prefill = ModelRunner.prefill

    def counting(runner: ModelRunner, prefills: Any) -> Any:
        start, end = prefills[0].chunks[0]
        taken.append((end - start) * len(prefills) * (runner.vlm.name == models.base.name))
        return prefill(runner, prefills)

    monkeypatch.setattr(ModelRunner, "prefill", counting)
    engine.best_of(requests[1:2], 5)
    assert sum(taken) == alone


def test_copies_leave_and_stay_as_requests_of_their_own(
    models: Models, requests: list[Request]
) -> None:
    """Between other requests, with one taken out while its prompt runs, and one later."""
    engine = Engine(models, EngineOptions(prefill_tokens=4))
    wanted = {
        offset: engine.generate([seeded(requests[1], offset)])[0].token_ids for offset in range(5)
    }
    batch, tokens = engine.new_batch(), dict[object, list[int]]()
    batch.admit("other", engine.preparer.prepare(requests[0]))
    shared = choices_of(engine.preparer.prepare(requests[1]), 5)
    for offset, each in enumerate(shared):
        batch.admit(offset, each)
    number = 0
    while len(batch):
        number += 1
        if number == 3:
            batch.release(0)  # the one whose prompt runs for all
        if number == 20:
            batch.release(4)
        for key, output in batch.step():
            assert not isinstance(output, TitaError), output
            if output.counted:
                tokens.setdefault(key, []).append(output.id)
    for offset in (1, 2, 3):
        assert tuple(tokens.get(offset, [])) == wanted[offset]
    assert tuple(tokens["other"]) == engine.generate(requests[:1])[0].token_ids


def test_what_cannot_be_compared_is_refused(models: Models, requests: list[Request]) -> None:
    greedy = dataclasses.replace(requests[0], sampling=Sampling())
    with pytest.raises(TitaError, match="best of 3 without temperature: all answers are the same"):
        Engine(models).best_of([greedy], 3)
    with pytest.raises(TitaError, match="best of 3 without a reward model"):
        Engine(Models(models.base)).best_of(requests[:1], 3)
