"""Models with positions on three axes (M-RoPE) equal their own `generate`."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tita.align import Engine, EngineOptions, Guidance, Request, Sampling, TokenOutput
from tita.align.prompts import PreparedRequest
from tita.vlm.inputs import Inputs
from tita.vlm.loading import VLM, Models

IMAGE, START, END = 90, 91, 92
LENGTH = 12
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}


class NumberTokenizer:
    """The part of a tokenizer that decoding needs."""

    eos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" {token}" for token in ids)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "rope_parameters": ROPE,
            "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.4,
        },
        vision_config={
            "depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4,
            "initializer_range": 0.4,
        },
        image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=END,
        video_token_id=93,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    processor = SimpleNamespace(tokenizer=NumberTokenizer())
    return VLM(name="qwen", model=model, processor=processor, image_aspect="keep")


def inputs(seed: int, *, grid: tuple[int, int, int], num_words: int) -> Inputs:
    dice = torch.Generator().manual_seed(seed)
    num_patches = grid[0] * grid[1] * grid[2]
    words = torch.randint(80, (2 + num_words,), generator=dice).tolist()
    ids = torch.tensor([[words[0], START, *[IMAGE] * (num_patches // 4), END, *words[1:]]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(num_patches, 3 * 2 * 4 * 4, generator=dice),
        "image_grid_thw": torch.tensor([grid]),
    }


@pytest.mark.parametrize("prefill_tokens", [512, 4])
@pytest.mark.parametrize("prefix_cache_bytes", [0, 2**20])
def test_sequences_equal_generate(vlm: VLM, prefill_tokens: int, prefix_cache_bytes: int) -> None:
    prompts = [
        inputs(0, grid=(1, 8, 8), num_words=5),
        inputs(1, grid=(1, 8, 8), num_words=9),
        inputs(2, grid=(1, 4, 12), num_words=3),
    ]
    options = EngineOptions(prefill_tokens=prefill_tokens, prefix_cache_bytes=prefix_cache_bytes)
    batch = Engine(Models(vlm, vlm), options).new_batch()
    sampling = Sampling(max_new_tokens=LENGTH)
    for round_ in range(2):
        tokens: dict[object, list[int]] = {}
        for key, prompt in enumerate(prompts):
            request = Request(question="", guidance=Guidance(weight=0.5), sampling=sampling)
            batch.admit(
                key,
                PreparedRequest(
                    request=request,
                    terms=request.guidance.terms(("reward",), has_images=True),
                    inputs={"base": prompt, "reward": prompt},
                    max_new_tokens=LENGTH,
                    num_prompt_tokens=0,
                    image_digests={"base": str(key), "reward": str(key)},
                ),
            )
        while len(batch):
            for key, output in batch.step():
                assert isinstance(output, TokenOutput), output
                tokens.setdefault(key, []).append(output.id)
        for key, prompt in enumerate(prompts):
            output = vlm.model.generate(**prompt, max_new_tokens=LENGTH, do_sample=False)
            assert tokens[key] == output[0, prompt["input_ids"].shape[1] :].tolist(), round_
    assert sum(r.num_prefix_hits for r in batch.runners.values()) == (
        6 if prefix_cache_bytes else 0
    )
