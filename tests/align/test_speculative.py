"""Speculative decoding equals lockstep decoding, token for token."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from tests.align.always import Always
from tests.align.definition import asked, sampled_sequence
from tita.align import Answer, Engine, EngineOptions, Guidance, Request, Sampling
from tita.align.draws import gumbel
from tita.align.sampling import SourceLogits, choose
from tita.align.sequence import Agreement
from tita.align.speculative import DraftPolicy
from tita.vlm.loading import Models

LENGTH = 16


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return asked(1, sampling=Sampling(max_new_tokens=LENGTH, ignore_end=True))


def engine(models: Models, num_drafts: int, **options: Any) -> Engine:
    made = Engine(models, EngineOptions(**options))
    made.draft_policy = Always(max_drafts=num_drafts)
    return made


def answers(made: Engine, requests: list[Request]) -> list[Answer]:
    """Each request alone: only a single sequence is drafted for."""
    return [made.generate([request])[0] for request in requests]


WAYS = {
    "greedy": Sampling(max_new_tokens=LENGTH, ignore_end=True),
    "sampled": Sampling(max_new_tokens=LENGTH, temperature=1.5, seed=3, ignore_end=True),
    "all at once": Sampling(
        max_new_tokens=LENGTH, temperature=2.0, top_p=0.9, top_k=12, repetition_penalty=1.3,
        seed=5, ignore_end=True,
    ),
    "ending": Sampling(max_new_tokens=LENGTH, temperature=3.0, seed=11),
    "minimum": Sampling(max_new_tokens=LENGTH, temperature=3.0, seed=11, min_new_tokens=9),
    "stop string": Sampling(max_new_tokens=LENGTH, temperature=3.0, seed=2, stops=("the",)),
    "stop token": Sampling(max_new_tokens=LENGTH, temperature=3.0, seed=2, stop_token_ids=(9, 20)),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_answers_equal_lockstep(
    models: Models, requests: list[Request], way: str, weight: float
) -> None:
    asked = [
        dataclasses.replace(r, sampling=WAYS[way], guidance=Guidance(weight=weight))
        for r in requests
    ]
    wanted = Engine(models, EngineOptions(max_drafts=0)).generate(asked)
    for num_drafts in (0, 1, 4):
        made = engine(models, num_drafts)
        assert answers(made, asked) == wanted
        assert (made.draft_policy.num_drafted > 0) == (num_drafts > 0)
    if weight == 1.0:
        # The reward model alone decides: all its drafts are right, except behind the end.
        known = made.draft_policy
        assert known.num_accepted >= known.num_drafted - 4 * len(asked)
        assert known.num_accepted > 0


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_drafts_of_several_answers_equal_lockstep(
    models: Models, requests: list[Request], weight: float
) -> None:
    """Every way of sampling in one batch, so that drafts are rejected and end in other places."""
    asked = [
        dataclasses.replace(
            requests[n % len(requests)], sampling=way, guidance=Guidance(weight=weight)
        )
        for n, way in enumerate(list(WAYS.values()) * 2)
    ]
    wanted = Engine(models, EngineOptions(max_drafts=0)).generate(asked)
    for num_drafts, batch_size in ((1, len(asked)), (4, len(asked)), (3, 4)):
        made = engine(models, num_drafts, max_draft_rows=batch_size)
        found = dict(made.generate_as_completed(iter(asked), batch_size=batch_size))
        assert [found[n] for n in range(len(asked))] == wanted
        assert made.draft_policy.num_drafted > 2 * len(asked)
        rejected = made.draft_policy.num_drafted - made.draft_policy.num_accepted
        assert made.draft_policy.num_accepted > 0
        assert rejected > 0 or weight == 1.0


def test_explained_tokens_equal_lockstep(models: Models, requests: list[Request]) -> None:
    asked = [
        dataclasses.replace(r, explain=True, num_logprobs=2, guidance=Guidance(weight=0.4))
        for r in requests
    ]
    for one, other in zip(
        answers(engine(models, 4), asked),
        Engine(models, EngineOptions(max_drafts=0)).generate(asked),
        strict=True,
    ):
        assert one.token_ids == other.token_ids
        for left, right in zip(one.tokens, other.tokens, strict=True):
            assert left.base == pytest.approx(right.base, abs=1e-4)
            assert left.reward == pytest.approx(right.reward, abs=1e-4)
            assert left.combined == pytest.approx(right.combined, abs=1e-4)


def test_prefix_cache_changes_nothing(models: Models, requests: list[Request]) -> None:
    wanted = Engine(models, EngineOptions(max_drafts=0)).generate(requests)
    assert answers(engine(models, 3, prefix_cache_bytes=2**20), requests * 2) == wanted * 2


def test_sampling_follows_the_combined_distribution() -> None:
    """Chi-square test over a toy vocabulary, with the token of each seed and position."""
    base = torch.tensor([1.0, 0.3, -0.5, 0.0, -2.0])
    reward = torch.tensor([-1.0, 0.8, 0.5, 0.0, 1.0])
    wanted = (base.log_softmax(-1) * 0.6 + reward.log_softmax(-1) * 0.4).softmax(-1)
    counts: Counter[int] = Counter()
    number = 4000
    for seed, position in itertools.product(range(number // 8), range(8)):
        sequence = sampled_sequence(
            Guidance(weight=0.4), rewards=("reward",), seed=seed, num_tokens=position
        )
        outputs = {
            "base": SourceLogits(base.clone()[None], [0]),
            "reward": SourceLogits(reward.clone()[None], [0]),
        }
        (choice,) = choose([sequence], outputs)
        assert choice is not None
        counts[choice.token] += 1
    chi = sum((counts[t] - number * p) ** 2 / (number * p) for t, p in enumerate(wanted.tolist()))
    assert chi < 18.47  # the 99.9th percentile for four degrees of freedom
    # The test can fail: it rejects the base's own distribution.
    alone = base.softmax(-1).tolist()
    assert sum((counts[t] - number * p) ** 2 / (number * p) for t, p in enumerate(alone)) > 100


def test_noise_is_a_function_of_seed_and_position() -> None:
    def noise(seed: int, position: int) -> list[float]:
        return list(gumbel(64, seed=seed, position=position).tolist())

    assert noise(1, 2) == noise(1, 2)
    seen = [noise(seed, position) for seed in (0, 1, 2**62, -1) for position in range(3)]
    assert len({tuple(each) for each in seen}) == len(seen)


FLAT = {n: 1 + 0.02 * n for n in range(1, 10)}
STEEP = {n: float(n) for n in range(1, 10)}


class TestDraftPolicy:
    """The number of drafts for given times and acceptance rates."""

    def num_drafts(self, *, base_s: dict[int, float], reward_s: float, rate: float) -> int:
        policy, agreement = DraftPolicy(), Agreement()
        for _ in range(8):
            policy.note_reward(reward_s)
            for num_tokens, seconds in base_s.items():
                policy.note_base(num_tokens, seconds)
        for number in range(200):
            policy.note_agreement(agreement, (number * 7) % 20 < round(rate * 20))
        return policy.num_drafts(agreement, limit=99)

    def test_no_drafts_before_the_first_step(self) -> None:
        assert DraftPolicy().num_drafts(Agreement(), limit=9) == 0

    def test_more_drafts_for_higher_acceptance(self) -> None:
        numbers = [self.num_drafts(base_s=FLAT, reward_s=0.2, rate=r) for r in (0, 0.5, 0.8, 1)]
        assert numbers[0] == 0
        assert numbers == sorted(numbers)
        assert numbers[2] >= 2
        assert numbers[3] == 8

    def test_no_drafts_if_base_time_is_linear(self) -> None:
        for rate in (0.0, 0.5, 0.9, 1.0):
            assert self.num_drafts(base_s=STEEP, reward_s=0.2, rate=rate) == 0

    def test_unmeasured_numbers_are_tried(self) -> None:
        assert self.num_drafts(base_s={1: 1.0}, reward_s=0.1, rate=0.9) > 0

    def test_slow_number_does_not_hide_a_better_one(self) -> None:
        slow_pair = {1: 1.0, 2: 1.3}
        assert self.num_drafts(base_s=slow_pair, reward_s=0.15, rate=0.6) >= 2
        assert self.num_drafts(base_s=slow_pair | {3: 3.0, 9: 9.0}, reward_s=0.15, rate=0.6) <= 1

    def test_limits_hold(self) -> None:
        policy, agreement = DraftPolicy(), Agreement()
        policy.note_base(1, 1.0)
        policy.note_reward(0.01)
        for _ in range(50):
            policy.note_agreement(agreement, True)
        assert policy.num_drafts(agreement, limit=2) == 2
        assert policy.num_drafts(agreement, limit=0) == 0
