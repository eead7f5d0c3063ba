"""Rows are added, removed and extended in one cache; attention equals that of a new cache."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tita.align.kv_cache import KVCache, check_cacheable
from tita.errors import TitaError

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=7)),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_models_write_in_place(maker: str) -> None:
    """Beyond the spare columns, one or several tokens at a time, with some removed again."""
    torch.manual_seed(0)
    model = MAKERS[maker]().eval()
    ids = torch.randint(97, (2, 200))
    cache, at, logits, tensors = KVCache(), 0, [], set()
    dice = random.Random(1)
    with torch.inference_mode():
        wanted = model(ids, use_cache=False).logits
        while at < 200:
            num_new = min(dice.choice([1, 1, 1, 3, 9]), 200 - at)
            positions = torch.arange(at, at + num_new).repeat(2, 1)
            piece = ids[:, at : at + num_new]
            output = model(piece, position_ids=positions, past_key_values=cache, use_cache=True)
            forget = dice.randrange(num_new) if dice.random() < 0.3 else 0
            cache.crop(-forget)
            logits.append(output.logits[:, : num_new - forget])
            at += num_new - forget
            tensors.add(cache.layers[0].keys.data_ptr())
    torch.testing.assert_close(torch.cat(logits, 1), wanted, atol=2e-5, rtol=1e-4)
    assert cache.width == 200
    assert len(tensors) < 6  # reallocated a few times for 200 tokens


def test_models_with_other_state_are_refused() -> None:
    config = Qwen3NextConfig(num_hidden_layers=4, hidden_size=32, num_attention_heads=2)
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config)
    with pytest.raises(TitaError, match=r"^hybrid: keeps more between tokens than keys and values"):
        check_cacheable(config, model.forward, where="hybrid")


def test_models_without_positions_are_refused() -> None:
    with pytest.raises(TitaError, match=r"^b: does not take the positions of its tokens \(blip\)"):
        check_cacheable(BlipConfig(), BlipForConditionalGeneration.forward, where="b")


def test_a_wrapper_of_a_model_is_taken() -> None:
    check_cacheable(LlamaConfig(num_hidden_layers=1), lambda **_: None, where="wrapped")


def test_models_to_which_a_column_has_a_meaning_are_refused() -> None:
    config = Llama4Config()
    with pytest.raises(TitaError, match=r"^l: scales attention by .* \(llama4\); choose a"):
        check_cacheable(config, Llama4ForConditionalGeneration.forward, where="l")


def columns(start: int, num_rows: int, width: int) -> torch.Tensor:
    """Distinct keys[rows, 1 head, width, 1]."""
    return torch.arange(start, start + num_rows * width).float().reshape(num_rows, 1, width, 1)


def filled(start: int, *, num_rows: int = 1, width: int) -> KVCache:
    cache = KVCache()
    cache.update(columns(start, num_rows, width), -columns(start, num_rows, width), 0)
    return cache


def test_rows_of_any_length_are_aligned_on_the_right() -> None:
    cache = filled(100, width=5)
    for start, width in ((200, 3), (300, 150), (400, 1)):
        cache.append(filled(start, width=width), rows=[0], width=width)
    keys, values = cache.layers[0].used
    assert keys.shape == (4, 1, 150, 1)
    for row, (start, width) in enumerate(((100, 5), (200, 3), (300, 150), (400, 1))):
        assert keys[row, 0, -width:, 0].tolist() == columns(start, 1, width).flatten().tolist()
        assert not keys[row, 0, :-width].any()
    assert torch.equal(keys, -values)


def test_rows_that_are_expected_have_their_place() -> None:
    one = partial(filled, 100, width=5)
    cache = one(num_rows=3)
    cache.append(one(), rows=[0], width=5, num_expected=3)
    memory = cache.layers[0].keys
    assert len(memory) == 7
    for _ in range(3):
        cache.append(one(), rows=[0], width=5)
    assert cache.layers[0].keys is memory
    cache.append(one(), rows=[0], width=5)
    assert len(cache.layers[0].keys) == 10  # half as many again


def test_at_most_as_many_rows_are_expected_as_there_are() -> None:
    cache = filled(100, width=5)
    cache.append(filled(200, width=5), rows=[0], width=5, num_expected=1000)
    assert len(cache.layers[0].keys) == 4


def test_nan_of_a_removed_row_is_not_visible() -> None:
    cache = filled(1, num_rows=2, width=6)
    cache.layers[0].keys[1] = float("nan")
    cache.keep([], num_rows=1, width=6)
    cache.append(filled(50, width=2), rows=[0], width=2)
    keys, _ = cache.layers[0].used
    assert keys.isfinite().all()


def test_removed_rows_free_columns_that_only_they_used() -> None:
    cache = filled(1, width=2)
    cache.append(filled(100, width=90), rows=[0], width=90)
    cache.append(filled(200, width=4), rows=[0], width=4)
    cache.keep([(2, 1)], num_rows=2, width=4)
    keys, _ = cache.layers[0].used
    assert keys[1, 0, :, 0].tolist() == [200, 201, 202, 203]
    assert keys[0, 0, :, 0].tolist() == [0, 0, 1, 2]
    assert cache.num_cells == 8


@pytest.mark.parametrize("rows", [[1, 2], [2, 0, 0]])
def test_rows_of_another_cache_are_added_in_the_order_given(rows: list[int]) -> None:
    cache, other = filled(1, width=4), filled(100, num_rows=3, width=5)
    cache.append(other, rows=rows, width=3)
    keys, values = cache.layers[0].used
    assert torch.equal(keys[1:, :, -3:], columns(100, 3, 5)[rows, :, -3:])
    assert not keys[1:, :, :-3].any()
    assert torch.equal(keys, -values)
