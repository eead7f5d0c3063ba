"""Models of one family with different token ids answer as if they had the same."""

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.align.always import Always
from tests.align.definition import asked
from tita.align import Engine, Guidance, Request, Sampling
from tita.align.vocabulary import Vocabulary, end_tokens, match_vocabularies
from tita.errors import TitaError
from tita.vlm.loading import VLM, Models

LENGTH = 6


def renumbered(
    vlm: VLM,
    *,
    order: Sequence[int] | None = None,
    names: Mapping[str, str] | None = None,
    extra: Sequence[str] = (),
    num_spare: int = 0,
) -> VLM:
    """The same model with its tokens reordered, renamed or added to, its output layer padded.

    Args:
        order: old ids in their new order.
        names: new names of some tokens.
        extra: tokens added at the end, which the model was not trained on.
        num_spare: padding rows of the output layer.
    """
    old = vlm.tokenizer.get_vocab()
    order = list(range(len(old))) if order is None else list(order)
    place = {number: n for n, number in enumerate(order)}
    names = names or {}
    written = json.loads(vlm.tokenizer.backend_tokenizer.to_str())
    written["model"]["vocab"] = {
        **{names.get(word, word): place[n] for word, n in old.items()},
        **{word: len(old) + n for n, word in enumerate(extra)},
    }
    for token in written["added_tokens"]:
        token["id"], token["content"] = (
            place[token["id"]],
            names.get(token["content"], token["content"]),
        )
    written["added_tokens"].sort(key=lambda token: token["id"])
    roles = vlm.tokenizer.special_tokens_map
    roles = {role: names.get(word, word) for role, word in roles.items() if isinstance(word, str)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(written)), padding_side="left",
        clean_up_tokenization_spaces=False, additional_special_tokens=["<image>"], **roles,
    )  # fmt: skip
    processor = copy.copy(vlm.processor)
    processor.tokenizer = tokenizer
    processor.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return VLM(
        name=f"{vlm.name} renumbered",
        model=_rows_moved(vlm.model, order, len(extra) + num_spare, tokenizer),
        processor=processor,
        image_aspect=vlm.image_aspect,
    )


def _rows_moved(model: Any, order: Sequence[int], num_more: int, tokenizer: Any) -> Any:
    moved = copy.deepcopy(model)
    rows = moved.get_input_embeddings().weight.data[list(order)].clone()
    moved.resize_token_embeddings(len(order) + num_more, mean_resizing=False)
    moved.get_input_embeddings().weight.data[: len(order)] = rows
    moved.get_input_embeddings().weight.data[len(order) :] = 0.0
    moved.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    moved.generation_config.eos_token_id = tokenizer.eos_token_id
    return moved.eval()


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return asked(
        4, sampling=Sampling(max_new_tokens=LENGTH), guidance=Guidance(weight=0.4), explain=True
    )


def shuffled(vlm: VLM) -> list[int]:
    number = len(vlm.tokenizer.get_vocab())
    return torch.randperm(number, generator=torch.Generator().manual_seed(3)).tolist()


def alike(engine: Engine, wanted: Engine, requests: Sequence[Request]) -> None:
    for ours, theirs in zip(engine.generate(requests), wanted.generate(requests), strict=True):
        assert ours.token_ids == theirs.token_ids
        for one, other in zip(ours.tokens, theirs.tokens, strict=True):
            assert one.reward == pytest.approx(other.reward, abs=1e-4)
            assert one.combined == pytest.approx(other.combined, abs=1e-4)


class TestAnswers:
    """The demo's models give the same answers with one of them renumbered."""

    def test_equal_vocabularies_need_no_map(self, base: VLM, reward: VLM) -> None:
        assert match_vocabularies(Models(base, reward)).maps == {}
        assert match_vocabularies(Models(base, renumbered(reward, num_spare=27))).maps == {}

    @pytest.mark.parametrize(
        "change",
        [
            {"order": True},
            {"order": True, "num_spare": 15},
            {"extra": ["<tool>", "<pad2>"], "num_spare": 5},
            {"names": {"</s>": "<|im_end|>"}},
            {"order": True, "names": {"</s>": "<|im_end|>"}, "extra": ["<box>"]},
        ],
        ids=["reordered", "padded", "added to", "other end token", "all of it"],
    )
    @pytest.mark.parametrize("way", ["greedy", "sampled", "drafted"])
    def test_renumbered_reward_model_gives_the_same_answers(
        self, base: VLM, reward: VLM, requests: list[Request], change: dict[str, Any], way: str
    ) -> None:
        change = change | ({"order": shuffled(reward)} if "order" in change else {})
        other = renumbered(reward, **change)
        if way == "sampled":
            warm = Sampling(max_new_tokens=LENGTH, temperature=2.0, seed=3)
            requests = [dataclasses.replace(r, sampling=warm) for r in requests]
        engine, wanted = Engine(Models(base, other)), Engine(Models(base, reward))
        if way == "drafted":
            engine.draft_policy = Always(max_drafts=3)
            for request in requests[:4]:
                alike(engine, wanted, [request])
            assert engine.draft_policy.num_accepted > 0
        else:
            alike(engine, wanted, requests)

    def test_weight_1_is_the_reward_if_it_knows_all_tokens(
        self, base: VLM, reward: VLM, requests: list[Request]
    ) -> None:
        other = renumbered(reward, order=shuffled(reward), names={"</s>": "<end>"})
        sure = [dataclasses.replace(request, guidance=Guidance(weight=1.0)) for request in requests]
        alone = [
            dataclasses.replace(request, guidance=Guidance(weight=0.0)) for request in requests
        ]
        guided = [answer.text for answer in Engine(Models(base, other)).generate(sure)]
        assert guided == [answer.text for answer in Engine(Models(other)).generate(alone)]

    def test_base_with_own_tokens_at_weight_0(
        self, base: VLM, reward: VLM, requests: list[Request]
    ) -> None:
        wider = renumbered(base, extra=["<tool>", "<box>"], num_spare=3)
        alone = [
            dataclasses.replace(request, guidance=Guidance(weight=0.0), explain=False)
            for request in requests
        ]
        engine = Engine(Models(wider, reward))
        assert engine.generate(alone) == Engine(Models(wider)).generate(alone)
        assert all(answer.text for answer in engine.generate(requests))


class TestArithmetic:
    """Base: a b c E x (x its own); reward: c a E' b y (y its own), E and E' their ends."""

    vocabulary = Vocabulary(
        columns=torch.tensor([1, 3, 0, -1, -1]), reads=[1, 3, 0, 2, 2], base_ends=[3],
        reward_ends=[2],
    )  # fmt: skip
    base = torch.tensor([[0.3, 0.1, 0.1, 0.1, 0.4]])
    reward = torch.tensor([[0.1, 0.2, 0.3, 0.2, 0.2]])

    def test_shared_tokens_are_reordered_by_the_bases_ids(self) -> None:
        projected = self.vocabulary.project(self.reward.log())
        torch.testing.assert_close(projected.exp(), torch.tensor([[0.2, 0.2, 0.1, 0.3, 0.0]]))

    def test_tokens_of_the_base_keep_their_probability(self) -> None:
        projected = self.vocabulary.project(self.reward.log() + 7)
        self.vocabulary.complete(self.base.log() + 2, projected)
        # Of 0.6 for shared tokens, the reward gives a quarter to each of a and b, and so on.
        wanted = torch.tensor([[0.15, 0.15, 0.075, 0.225, 0.4]])
        torch.testing.assert_close(projected.softmax(-1), wanted)

    def test_several_end_tokens_share_the_probability_of_one(self) -> None:
        """The base has two end tokens, the reward another one."""
        vocabulary = Vocabulary(
            columns=torch.tensor([0, -1, -1]), reads=[0, 1, 1], base_ends=[1, 2], reward_ends=[1]
        )
        base, reward = torch.tensor([[0.2, 0.6, 0.2]]), torch.tensor([[0.6, 0.4]])
        projected = vocabulary.project(reward.log())
        vocabulary.complete(base.log(), projected)
        torch.testing.assert_close(projected.exp(), torch.tensor([[0.6, 0.3, 0.1]]))


class TestOverlap:
    def test_different_vocabularies_are_refused_with_numbers(self, base: VLM, reward: VLM) -> None:
        words = [word for word in reward.tokenizer.get_vocab() if word.isalpha()]
        foreign = renumbered(reward, names={word: f"▁{word}" for word in words[:12]})
        known = len(base.tokenizer.get_vocab())
        with pytest.raises(TitaError, match=rf"knows {known - 12} of the base model's {known} "):
            Engine(Models(base, foreign))
        with pytest.raises(TitaError, match=r"and not '.+', '.+', '.+'.*choose a reward model of"):
            Engine(Models(base, foreign))

    def test_reference_needs_the_rewards_vocabulary(self, base: VLM, reward: VLM) -> None:
        other = renumbered(reward, order=shuffled(reward))
        with pytest.raises(TitaError, match="another vocabulary than the reward"):
            Engine(Models(base, reward, other))

    def test_unknown_tokens_are_read_as_unknown(self, base: VLM, reward: VLM) -> None:
        wider = renumbered(base, extra=["<tool>"])
        vocabulary = match_vocabularies(Models(wider, reward)).maps["reward"]
        at = wider.tokenizer.convert_tokens_to_ids("<tool>")
        assert vocabulary.reads[at] == reward.tokenizer.unk_token_id
        assert vocabulary.reads[:at] == list(range(at))

    def test_most_likely_end_token_is_first(self, fresh_models: Models) -> None:
        vlm = fresh_models.base
        vlm.model.generation_config.eos_token_id = [9, 2]
        assert end_tokens(vlm) == [9, 2]
        vlm.model.generation_config.eos_token_id = None
        assert end_tokens(vlm) == [vlm.tokenizer.eos_token_id]
