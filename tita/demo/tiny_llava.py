"""Tiny VLMs of LLaVA's architecture: CLIP tower, projector and Llama, 200 to 600 thousand weights.

They are ordinary transformers checkpoints, like `llava-hf/llava-1.5-7b-hf`. Such small models only
learn to use the image with four image tokens of at most one digit each, a vision tower that is
pretrained to classify, and initial weights of standard deviation 0.9 / sqrt(width), not 0.02.
"""

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tita.demo.scenes import INKS, SIDE

PATCH = SIDE // 2
NUM_IMAGE_TOKENS = (SIDE // PATCH) ** 2
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_WORDS = (
    *("user:", "assistant:", "what", "number", "is", "written", "?", "there", "a", "in", "the"),
    *("image", "colour", "yes", "no", *INKS, *map(str, range(10))),
)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig:
    """Size of a tiny model, whose vision tower has two layers."""

    width: int
    """Hidden size of vision tower and language model."""
    text_layers: int


BASE = TinyConfig(width=96, text_layers=4)
REWARD = TinyConfig(width=64, text_layers=2)


def make_processor() -> LlavaProcessor:
    """Return a `LlavaProcessor` with a tokenizer of whole words, the same for both models."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *_WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessor(
        do_resize=True,
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=half,
        image_std=half,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        # CLIP's class token, which LLaVA's `default` strategy removes.
        num_additional_image_tokens=1,
    )


def make_model(size: TinyConfig, *, processor: Any, seed: int) -> Any:
    """Return a `LlavaForConditionalGeneration` with random float32 weights."""
    tokenizer = processor.tokenizer
    shared: dict[str, Any] = {
        "hidden_size": size.width,
        "intermediate_size": 2 * size.width,
        "num_attention_heads": size.width // 32,
        "initializer_range": 0.9 / size.width**0.5,
    }
    vision = CLIPVisionConfig(
        **shared,
        num_hidden_layers=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=size.width,
    )
    text = LlamaConfig(
        **shared,
        vocab_size=len(tokenizer),
        num_hidden_layers=size.text_layers,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=NUM_IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)
