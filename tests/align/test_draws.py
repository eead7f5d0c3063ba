"""A step's tokens are drawn on the device: as by the definition, with one copy to the host."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.align.definition import choice, sampled_sequence
from tests.align.fake_device import fake_device, on_device
from tita.align import Guidance, Sampling, draws, sampling
from tita.align.draws import Position, Workspace, draw, gumbel
from tita.align.guidance import mix_rows
from tita.align.sampling import SourceLogits, choose, choose_drafts
from tita.align.sequence import Sequence as AnswerSequence
from tita.align.vocabulary import Vocabulary

NUM_TOKENS = 300
REWARDS = ("faithful", "brief")
WAYS: tuple[dict[str, Any], ...] = (
    {}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 3.0, "top_p": 0.2}, {"temperature": 1.0, "top_k": 5},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.5},
    {"repetition_penalty": 1.7}, {"temperature": 1.0, "repetition_penalty": 0.6, "top_k": 999},
)  # fmt: skip
GUIDANCES = (
    Guidance(weight=0.0),
    Guidance(weights={"faithful": 0.3, "brief": 0.4}),
    Guidance(weights={"faithful": 0.7}, plausibility=0.05),
    Guidance(form="dpo", weights={"faithful": 0.7}),
    Guidance(form="vcd", weight=1.0, plausibility=0.1),
    Guidance(form="m3id", weight=0.2),
)


def sequence(
    guidance: Guidance, way: dict[str, Any], *, seed: int, num_tokens: int = 3, **more: Any
) -> AnswerSequence:
    made = sampled_sequence(guidance, rewards=REWARDS, seed=seed, num_tokens=num_tokens)
    sampling = Sampling(max_new_tokens=99, seed=seed, **way)
    request = dataclasses.replace(made.prepared.request, sampling=sampling, **more)
    # Twice the same token, and one that the answer has, too.
    ids = torch.tensor([[7, 7, seed + 20, 0]])
    inputs = {"base": {"input_ids": ids}}
    prepared = dataclasses.replace(made.prepared, request=request, inputs=inputs)
    return dataclasses.replace(made, prepared=prepared)


def penalised(scores: Tensor, made: AnswerSequence) -> Tensor:
    """By the definition (arXiv 1909.05858), token by token."""
    scores, penalty = scores.clone(), made.sampling.repetition_penalty
    for token in {*made.prepared.inputs["base"]["input_ids"][0].tolist(), *made.token_ids}:
        old = float(scores[token])
        scores[token] = old * penalty if old < 0 else old / penalty
    return scores


@pytest.mark.parametrize("device", ["cpu", "fake"])
@pytest.mark.parametrize("ways", [WAYS, WAYS[:2]], ids=["every way", "temperature"])
def test_rows_are_drawn_as_by_the_definition(
    monkeypatch: pytest.MonkeyPatch, ways: tuple[dict[str, Any], ...], device: str
) -> None:
    """Rows of several ways in one batch; on the CPU and as on a device."""
    torch.manual_seed(0)
    rows = [sequence(GUIDANCES[0], way, seed=n) for n, way in enumerate(ways * 6)]
    scores = 2 * torch.randn(len(rows), NUM_TOKENS)
    scores[2, 5:9] = scores[2].max()  # ties at the border of a nucleus
    positions = [Position(each) for each in rows]
    wanted = [
        choice(penalised(row, each), each.sampling, position=3)
        for row, each in zip(scores, rows, strict=True)
    ]
    assert wanted != scores.argmax(-1).tolist()
    if device == "cpu":
        before = scores.clone()
        (found, again) = draw(positions, [scores, scores], Workspace())
        assert torch.equal(scores, before)
    else:
        for each in rows:
            ids = on_device(each.prepared.inputs["base"]["input_ids"])
            each.prepared.inputs["base"]["input_ids"] = ids
        with fake_device(monkeypatch) as reads:
            there = on_device(scores)
            (found, again) = draw(positions, [there, there], Workspace())
            assert not reads
    assert [*map(int, found)] == [*map(int, again)] == wanted


@pytest.mark.parametrize("device", ["cpu", "fake"])
@pytest.mark.parametrize(
    ("way", "token"),
    [
        ({"temperature": 1e-60}, 9), ({"temperature": 1e-60, "top_p": 0.5}, 9),
        ({"temperature": 5e-324, "top_k": 3}, 9), ({"temperature": 1.0, "top_p": 1e-60}, 9),
        ({"temperature": 1e60, "top_k": 1}, 9), ({"repetition_penalty": 1e-60}, 7),
        ({"repetition_penalty": 1e60}, 9),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_float32_has_not(
    monkeypatch: pytest.MonkeyPatch, way: dict[str, Any], token: int, device: str
) -> None:
    """They act as the limit does: the most likely token, or the most likely that was seen."""
    made = sequence(GUIDANCES[0], way, seed=1)
    scores = torch.full((1, NUM_TOKENS), -torch.inf)
    scores[0, 7:10] = torch.tensor([1.0, -1.0, 3.0])
    if device == "cpu":
        ((found,),) = draw([Position(made)], [scores], Workspace())
    else:
        ids = on_device(made.prepared.inputs["base"]["input_ids"])
        made.prepared.inputs["base"]["input_ids"] = ids
        with fake_device(monkeypatch):
            ((found,),) = draw([Position(made)], [on_device(scores)], Workspace())
    assert int(found) == token


def outputs_for(rows: Sequence[AnswerSequence], *, there: bool) -> dict[str, SourceLogits]:
    """Logits of every source; one of them belongs to a model with another vocabulary."""
    dice = torch.Generator().manual_seed(3)
    found = {}
    for name in ("base", *REWARDS, "reference", "base/distorted", "base/no-image"):
        having = [n for n, row in enumerate(rows) if name == "base" or _needs(row, name)]
        logits = 3 * torch.randn(len(having), NUM_TOKENS, generator=dice)
        vocabulary = None
        if name == "brief":
            vocabulary = Vocabulary(
                columns=torch.arange(NUM_TOKENS).roll(1), reads=[], base_ends=[2, 3],
                reward_ends=[4],
            )  # fmt: skip
            logits = vocabulary.project(logits)
        if there:
            logits = on_device(logits)
            if vocabulary is not None:
                for each in ("_columns", "_known", "_base_ends", "_reward_ends"):
                    setattr(vocabulary, each, on_device(getattr(vocabulary, each)))
        if having:
            found[name] = SourceLogits(logits, having, vocabulary)
    return found


def _needs(row: AnswerSequence, name: str) -> bool:
    return any(name == each.source.name for each in row.terms) or any(
        each.against is not None and name == each.against.name for each in row.terms
    )


def mixed_batch(*, there: bool = False, **more: Any) -> list[AnswerSequence]:
    """Every guidance in every way of sampling."""
    rows = [
        sequence(guidance, way, seed=n, **more)
        for n, (guidance, way) in enumerate(itertools.product(GUIDANCES, WAYS))
    ]
    for each in rows if there else ():
        ids = on_device(each.prepared.inputs["base"]["input_ids"])
        each.prepared.inputs["base"]["input_ids"] = ids
    return rows


@pytest.mark.parametrize(
    "more", [{}, {"explain": True, "num_logprobs": 3}, {"score": True}], ids=str
)
def test_a_step_is_read_once(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    """One copy to the host for all rows of a step, which is small; the tokens of the CPU."""
    if "score" in more:
        monkeypatch.setattr("tests.align.test_draws.GUIDANCES", GUIDANCES[1:4])
    rows = mixed_batch(**more)
    wanted = choose(rows, outputs_for(rows, there=False))
    assert None not in wanted
    rows = mixed_batch(there=True, **more)
    with fake_device(monkeypatch) as reads:
        found = choose(rows, outputs_for(rows, there=True))
    assert found == wanted
    (size,) = reads
    assert size <= 20 * len(rows) if more else size <= 2 * len(rows)


def test_a_model_that_rules_tokens_out_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only its rows are chosen again."""
    rows = mixed_batch(there=True)
    with fake_device(monkeypatch) as reads:
        outputs = outputs_for(rows, there=True)
        wanted = choose(rows, outputs)
        assert len(reads) == 1
        outputs = outputs_for(rows, there=True)
        outputs["base/distorted"].logits[2, 5:90] = -torch.inf
        found = choose(rows, outputs)
    assert len(reads) == 3
    changed = {n for n, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]}
    assert None not in found
    assert changed <= {outputs["base/distorted"].rows[2]}


def test_not_numbers_are_found_row_by_row() -> None:
    rows = [sequence(Guidance(weights={"faithful": 0.5}), way, seed=0) for way in WAYS]
    outputs = outputs_for(rows, there=False)
    outputs["faithful"].logits[1, 3] = torch.nan
    outputs["base"].logits[4] = -torch.inf
    found = choose(rows, outputs)
    assert [n for n, each in enumerate(found) if each is None] == [1, 4]


def test_not_numbers_are_found_among_rows_that_are_drawn_together() -> None:
    rows = [sequence(GUIDANCES[0], way, seed=n) for n, way in enumerate(WAYS[:2] * 3)]
    positions = [Position(each) for each in rows]
    scores = torch.randn(len(rows), NUM_TOKENS)
    wanted = [
        choice(row, each.sampling, position=3) for row, each in zip(scores, rows, strict=True)
    ]
    for row, value in enumerate((torch.nan, -torch.inf, torch.inf, torch.nan)):
        scores[row, 3 if row != 1 else slice(None)] = value
    (found,) = draw(positions, [scores], Workspace())
    assert found == [-1, -1, -1, -1, *wanted[4:]]


def test_rows_that_no_cache_holds_are_combined_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As all together: where a model rules tokens out, too, and where logits are NaN."""
    counts = []

    def counted(*args: Any, **options: Any) -> Any:
        counts.append(len(args[0]))
        return mix_rows(*args, **options)

    monkeypatch.setattr(sampling, "mix_rows", counted)

    def found(num_cached: int) -> list[Any]:
        monkeypatch.setattr(draws, "_CACHED", num_cached)
        rows = [
            sequence(guidance, way, seed=n)
            for n, (guidance, way) in enumerate(itertools.product(GUIDANCES, WAYS))
        ]
        outputs = outputs_for(rows, there=False)
        for each in outputs.values():
            each.logits[1, 5:90] = -torch.inf
        outputs["faithful"].logits[4, 3] = torch.nan
        return choose(rows, outputs)

    wanted = found(2**20)
    assert wanted.count(None) == 1
    assert not counts
    assert found(1) == wanted
    assert sum(counts) >= len(WAYS)


def test_drafts_before_a_token_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """For noise, penalty, and the weight at a position: as if they were tokens of the answer."""
    guidance = Guidance(form="m3id", weight=0.3)
    for way in WAYS:
        one, other = (sequence(guidance, way, seed=5, num_tokens=n) for n in (3, 1))
        logits = outputs_for([one], there=False)
        again = outputs_for([other], there=False)
        (wanted,), (found,) = choose([one], logits), choose([other], again, drafts=[[0, 0]])
        assert found == wanted
    sampled = sequence(GUIDANCES[0], {"temperature": 1.0}, seed=5)
    scores = torch.randn(1, NUM_TOKENS)
    (token,) = choose_drafts([sampled], scores, drafts=[[8, 9]])
    assert token == int((scores[0] + gumbel(NUM_TOKENS, seed=5, position=5)).argmax())


def test_a_workspace_is_kept() -> None:
    workspace = Workspace()
    first = workspace.scores(4, torch.empty(1, 9))
    assert workspace.scores(3, torch.empty(1, 9)).data_ptr() == first.data_ptr()
    assert workspace.scores(5, torch.empty(1, 9)).shape == (5, 9)
    assert workspace.scores(5, torch.empty(1, 8)).shape == (5, 8)
