"""An exception in a step ends the request that causes it; the others have the same answers."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.align.always import Always
from tests.align.definition import asked
from tita.align import Engine, EngineOptions, Guidance, Request, Sampling, speculative
from tita.align import batch as batch_module
from tita.align.batch import Batch
from tita.align.model_runner import ModelRunner
from tita.align.requests import Outcome
from tita.align.sequence import Detokenizer, Sequence
from tita.errors import OutOfDeviceMemory, StepFailed, TitaError
from tita.vlm.loading import Models

BAD = 3
NUM_REQUESTS = 8
WAYS = {
    "greedy": Sampling(max_new_tokens=12, ignore_end=True),
    "sampled": Sampling(
        max_new_tokens=12, temperature=2.0, top_p=0.9, repetition_penalty=1.2, seed=7,
        ignore_end=True,
    ),
}  # fmt: skip


def requests_of(way: str) -> list[Request]:
    """Eight requests of different lengths and guidance."""
    guidances = [Guidance(weight=0.4), Guidance(weight=0.0), Guidance(weight=0.3, form="genarm")]
    return [
        dataclasses.replace(
            each,
            guidance=guidances[number % 3] if number != BAD else guidances[0],
            sampling=dataclasses.replace(WAYS[way], max_new_tokens=10 + number % 4, seed=number),
        )
        for number, each in enumerate(asked(2, sampling=WAYS[way])[:NUM_REQUESTS])
    ]


class Fault:
    """Raises in the stages that a test plants it in, while the bad request takes part."""

    def __init__(self, *, times: int, kind: Callable[[], Exception] | None = None) -> None:
        self.times = times
        self.num_raised = 0
        self._kind = kind or (lambda: RuntimeError("planted"))

    def strike(self, hit: bool) -> None:
        if hit and self.num_raised < self.times:
            self.num_raised += 1
            raise self._kind()


def plant(monkeypatch: pytest.MonkeyPatch, batch: Batch, stage: str, fault: Fault) -> None:
    """Make a stage of the engine fail for the request `BAD`."""
    runners = [batch.runners[role] for role in stage.split()[1:]]
    if stage.startswith("prefill"):
        forward = ModelRunner.prefill

        def prefill(runner: ModelRunner, prefills: Any) -> Any:
            pending = batch._pending.get(BAD)
            own = [] if pending is None else [*pending.prefills.values()]
            hit = runner in runners and any(each is other for each in own for other in prefills)
            logits = forward(runner, prefills)  # so that the caches have been written
            # Of a prompt in chunks, one in the middle fails.
            fault.strike(hit and ("chunk" not in stage or prefills[0].chunks != []))
            return logits

        monkeypatch.setattr(ModelRunner, "prefill", prefill)
    elif stage.startswith("decode"):
        extend = ModelRunner._extend

        def decode(runner: ModelRunner, tokens: Any) -> Any:
            if fault.times == 0 or runner not in runners:
                return extend(runner, tokens)
            # Half of the layers have the new token when it strikes.
            layer = runner.vlm.model.model.language_model.layers[1]
            hook = layer.register_forward_pre_hook(lambda *_: fault.strike(BAD in runner.keys))
            try:
                return extend(runner, tokens)
            finally:
                hook.remove()

        monkeypatch.setattr(ModelRunner, "_extend", decode)
    elif stage == "sample":

        def failing(way: Any) -> Any:
            def fail(sequences: list[Sequence], *rest: Any, **how: Any) -> Any:
                outcomes = way(sequences, *rest, **how)
                started = [each for each in sequences if len(each.token_ids) > 4]
                fault.strike(any(each.number == BAD for each in started))
                return outcomes

            return fail

        monkeypatch.setattr(batch_module, "sample", failing(batch_module.sample))
        monkeypatch.setattr(speculative, "verify", failing(speculative.verify))
    elif stage == "add":
        add = ModelRunner.add

        def entering(runner: ModelRunner, prefilled: Any, **how: Any) -> None:
            add(runner, prefilled, **how)
            fault.strike(runner is batch.runners["reward"] and BAD in dict(prefilled))

        monkeypatch.setattr(ModelRunner, "add", entering)
    else:
        assert stage == "detokenise"
        append = Detokenizer.add

        def adding(detokenizer: Detokenizer, token: int) -> str:
            text = append(detokenizer, token)
            rows = [*batch._running.values()]
            own = [row for row in rows if row.detokenizer is detokenizer]
            fault.strike(bool(own) and own[0].number == BAD and len(own[0].token_ids) > 3)
            return text

        monkeypatch.setattr(Detokenizer, "add", adding)


def answers(batch: Batch, engine: Engine, requests: list[Request]) -> list[tuple[list[int], str]]:
    """Token ids and texts; requests come in two groups, so that some are newcomers."""
    found: list[tuple[list[int], str]] = [([], "") for _ in requests]
    prepared = [engine.preparer.prepare(request) for request in requests]
    for key in range(5):
        batch.admit(key, prepared[key])
    number = 0
    while len(batch) or number < 5:
        if number == 5:
            for key in range(5, len(requests)):
                batch.admit(key, prepared[key])
        for key, outcome in batch.step():
            _collect(found, int(str(key)), outcome)
        number += 1
    return found


def _collect(found: list[Any], key: int, outcome: Outcome) -> None:
    if isinstance(outcome, TitaError):
        found[key] = outcome
        return
    ids, text = found[key]
    found[key] = (ids + ([outcome.id] if outcome.counted else []), text + outcome.text)


@contextmanager
def fresh(models: Models, **options: Any) -> Iterator[tuple[Engine, Batch]]:
    """A batch that must be empty in the end."""
    engine = Engine(models, EngineOptions(**options))
    batch = engine.new_batch()
    yield engine, batch
    assert len(batch) == 0
    for runner in batch.runners.values():
        assert runner.keys == []
        assert runner.num_cells == 0


STAGES = (
    "prefill base", "prefill reward", "prefill base reward", "prefill-chunk base",
    "decode base", "decode reward", "decode base reward", "sample", "add", "detokenise",
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES)
def test_one_fault_ends_one_request(
    models: Models, monkeypatch: pytest.MonkeyPatch, way: str, stage: str
) -> None:
    options = {"prefill_tokens": 3 if "chunk" in stage else 64, "prefix_cache_bytes": 2**20}
    requests = requests_of(way)
    with fresh(models, **options) as (engine, batch):
        wanted = answers(batch, engine, requests)
    for times in (1, 10**6):
        with fresh(models, **options) as (engine, batch), monkeypatch.context() as patch:
            fault = Fault(times=times)
            plant(patch, batch, stage, fault)
            found = answers(batch, engine, requests)
        assert fault.num_raised >= min(times, 2)
        others = [key for key in range(len(requests)) if key != BAD]
        assert [found[key] for key in others] == [wanted[key] for key in others]
        if times == 1:
            assert found[BAD] == wanted[BAD], "a fault that passes costs nobody an answer"
        else:
            assert isinstance(found[BAD], StepFailed)
            assert "RuntimeError: planted" in str(found[BAD])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("role", "which"), [("base", "drafts"), ("reward", "drafts"), ("base", "all")]
)
def test_a_fault_while_drafting(
    models: Models, monkeypatch: pytest.MonkeyPatch, way: str, role: str, which: str
) -> None:
    """The answer goes on without drafts if only these fail, else it ends with the error."""
    request = dataclasses.replace(requests_of(way)[BAD], guidance=Guidance(weight=0.4))
    (wanted,) = Engine(models).generate([request])
    engine = Engine(models)
    engine.draft_policy = Always(max_drafts=3)
    fault, extend, num_steps = Fault(times=10**6), ModelRunner._extend, 0

    def failing(runner: ModelRunner, tokens: Any) -> Any:
        nonlocal num_steps
        own = runner.vlm.model is models.by_role()[role].model
        num_steps += own
        logits = extend(runner, tokens)
        # Draft after draft, or their verification; later, with `all`, every step.
        drafting = len(tokens[0]) > 1 if role == "base" else num_steps in (3, 6, 11)
        fault.strike(own and num_steps > 1 and (drafting or which == "all"))
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "_extend", failing)
        (answer,) = engine.generate([request], return_errors=True)
    assert fault.num_raised > 1
    if which == "all":
        assert isinstance(answer, StepFailed)
    else:
        assert answer == wanted
    assert engine.generate([request]) == [wanted], "later requests are answered as ever"


def test_a_fault_of_preparation(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = requests_of("greedy")
    engine = Engine(models)
    wanted: list[Any] = [*engine.generate(requests)]
    bad = requests[BAD].question
    prepare = engine.preparer._prepare

    def failing(given: list[Request]) -> Any:
        if any(each is not None and each.question == bad for each in given):
            raise RuntimeError("planted")
        return prepare(given)

    monkeypatch.setattr(engine.preparer, "_prepare", failing)
    found = engine.generate(requests, return_errors=True)
    for number, request in enumerate(requests):
        if request.question == bad:
            assert isinstance(found[number], StepFailed)
        else:
            assert found[number] == wanted[number]
    assert isinstance(found[BAD], StepFailed)


class Memory:
    """A device on which the caches of all models together have room for some tokens."""

    def __init__(self, batch: Batch, num_cells: int) -> None:
        self.batch = batch
        self.num_cells = num_cells
        self.num_raised = 0

    def check(self) -> None:
        running = sum(runner.num_cells for runner in self.batch.runners.values())
        taken_in = {
            id(prefill.cache): prefill.cache.num_cells
            for pending in self.batch._pending.values()
            for prefill in pending.prefills.values()
            if prefill.cache is not None
        }
        if running + sum(taken_in.values()) > self.num_cells:
            self.num_raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefill_tokens", [64, 5])
@pytest.mark.parametrize("rows", [1.2, 1.8, 2.6])
def test_answers_wait_for_memory(
    models: Models, monkeypatch: pytest.MonkeyPatch, way: str, prefill_tokens: int, rows: float
) -> None:
    requests = requests_of(way)
    options = {"prefill_tokens": prefill_tokens}
    with fresh(models, **options) as (engine, batch):
        wanted = answers(batch, engine, requests)
    longest = max(
        engine.preparer.prepare(each).num_prompt_tokens + each.sampling.max_new_tokens
        for each in requests
    )
    forward = ModelRunner._forward
    with fresh(models, **options) as (engine, batch), monkeypatch.context() as patch:
        memory = Memory(batch, int(2 * longest * rows))

        def limited(runner: ModelRunner, **inputs: Any) -> Any:
            logits = forward(runner, **inputs)
            memory.check()
            return logits

        patch.setattr(ModelRunner, "_forward", limited)
        found = answers(batch, engine, requests)
    assert memory.num_raised > 0
    assert found == wanted


def test_a_request_that_fits_into_no_memory_ends_alone(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of("greedy")
    requests[BAD] = dataclasses.replace(
        requests[BAD], sampling=Sampling(max_new_tokens=30, ignore_end=True)
    )
    with fresh(models) as (engine, batch):
        wanted = answers(batch, engine, requests)
    forward = ModelRunner._forward
    with fresh(models) as (engine, batch), monkeypatch.context() as patch:
        longest = max(
            engine.preparer.prepare(each).num_prompt_tokens + each.sampling.max_new_tokens
            for key, each in enumerate(requests)
            if key != BAD
        )
        memory = Memory(batch, 2 * longest + 2)

        def limited(runner: ModelRunner, **inputs: Any) -> Any:
            logits = forward(runner, **inputs)
            memory.check()
            return logits

        patch.setattr(ModelRunner, "_forward", limited)
        found: list[Any] = [*answers(batch, engine, requests)]
    assert isinstance(found[BAD], OutOfDeviceMemory)
    del found[BAD], wanted[BAD]
    assert found == wanted


def test_a_lost_device_is_reported_and_the_batch_can_be_cleared(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of("greedy")
    with fresh(models) as (engine, batch), monkeypatch.context() as patch:
        for key, request in enumerate(requests):
            batch.admit(key, engine.preparer.prepare(request))
        for _ in range(3):
            batch.step()

        def lost(*_: Any, **__: Any) -> Any:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        patch.setattr(ModelRunner, "_forward", lost)
        with pytest.raises(torch.AcceleratorError):
            batch.step()
        batch.clear()
        assert batch.step() == []
