"""LLaVA-architecture models of any size with random weights, as fast as trained ones."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tita.align import Guidance, Request, Sampling
from tita.demo.tiny_llava import CHAT_TEMPLATE
from tita.vlm.loading import VLM

NUM_WORDS = 32_000
IMAGE_SIDE, PATCH = 336, 14
NUM_IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2


@dataclass(frozen=True)
class Size:
    """Dimensions of the language model."""

    width: int
    mlp: int
    layers: int


BASE = Size(width=768, mlp=2048, layers=12)
REWARD = Size(width=256, mlp=704, layers=6)


def random_llava(name: str, size: Size, *, seed: int) -> VLM:
    """A float32 model with 576 tokens per image, as LLaVA-1.5."""
    processor = _processor()
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
        image_size=IMAGE_SIDE, patch_size=PATCH, projection_dim=128,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=NUM_WORDS, hidden_size=size.width, intermediate_size=size.mlp,
        num_hidden_layers=size.layers, num_attention_heads=size.width // 64,
        num_key_value_heads=size.width // 64, max_position_embeddings=2048,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1,
        image_seq_length=NUM_IMAGE_TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    return VLM(name=name, model=model, processor=processor, image_aspect="pad")


def question(
    number: int = 0, *, weight: float, num_tokens: int = 64, num_words: int = 20
) -> Request:
    """A request with about 600 prompt tokens and an answer of exactly `num_tokens`."""
    pixels = np.random.default_rng(number).integers(256, size=(IMAGE_SIDE, IMAGE_SIDE, 3))
    image = PIL.Image.fromarray(pixels.astype(np.uint8))
    words = " ".join(f"w{(7 * number + place) % 1000}" for place in range(num_words))
    sampling = Sampling(max_new_tokens=num_tokens, ignore_end=True)
    return Request(
        question=words, images=(image,), guidance=Guidance(weight=weight), sampling=sampling
    )


def _processor() -> Any:
    special = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "user:", "assistant:")
    words = [*special, *(f"w{number}" for number in range(NUM_WORDS - len(special)))]
    whole = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    )
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", additional_special_tokens=["<image>"], padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
