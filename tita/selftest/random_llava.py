"""LLaVA-architecture models of any size with random weights, as fast as trained ones."""

from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Dimensions of a model. Both models of a pair have the same image side and vocabulary."""

    width: int
    mlp: int
    layers: int
    head_width: int = 64
    vision_width: int = 128
    vision_layers: int = 3
    image_side: int = 336
    num_words: int = 32_000
    """Size of the vocabulary."""
    spread: float = 0.02
    """Standard deviation of the weights. 0.9 / sqrt(width) gives distributions as peaked as a
    trained model's, with 0.02 every token is about as likely."""

    @property
    def num_image_tokens(self) -> int:
        return (self.image_side // PATCH) ** 2

    @property
    def num_parameters(self) -> int:
        """About: embedding, head, and the language model's layers."""
        layer = 4 * self.width**2 + 3 * self.width * self.mlp
        return 2 * self.num_words * self.width + self.layers * layer


PATCH = 14
BASE = Size(width=768, mlp=2048, layers=12)
REWARD = Size(width=256, mlp=704, layers=6)
NUM_WORDS = BASE.num_words


def random_llava(
    name: str,
    size: Size,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> VLM:
    """A model with `size.num_image_tokens` tokens per image; LLaVA-1.5 has 576.

    Args:
        name: of the model, for messages.
        seed: of the weights, which are drawn on `device` in `dtype`.
    """
    processor = _processor(size)
    vision = CLIPVisionConfig(
        hidden_size=size.vision_width, intermediate_size=2 * size.vision_width,
        num_hidden_layers=size.vision_layers, num_attention_heads=size.vision_width // 64,
        image_size=size.image_side, patch_size=PATCH, projection_dim=size.vision_width,
        initializer_range=size.spread,
    )  # fmt: skip
    heads = size.width // size.head_width
    text = LlamaConfig(
        vocab_size=size.num_words, hidden_size=size.width, intermediate_size=size.mlp,
        num_hidden_layers=size.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=2048, tie_word_embeddings=False, initializer_range=size.spread,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1,
        image_seq_length=size.num_image_tokens, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    return VLM(name=name, model=model, processor=processor, image_aspect="pad")


def save_vlm(vlm: VLM, folder: str | Path) -> None:
    """Write model and processor as `load_vlm` reads them."""
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)


def random_image(number: int, *, side: int) -> PIL.Image.Image:
    """A square image of random pixels."""
    pixels = np.random.default_rng(number).integers(256, size=(side, side, 3))
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def question(
    number: int = 0,
    *,
    weight: float,
    num_tokens: int = 64,
    num_words: int = 20,
    size: Size = BASE,
) -> Request:
    """A request with one image and an answer of exactly `num_tokens`.

    With the default size its prompt has about 600 tokens.
    """
    words = " ".join(f"w{(7 * number + place) % 1000}" for place in range(num_words))
    sampling = Sampling(max_new_tokens=num_tokens, ignore_end=True)
    return Request(
        question=words,
        images=(random_image(number, side=size.image_side),),
        guidance=Guidance(weight=weight),
        sampling=sampling,
    )


def _processor(size: Size) -> Any:
    special = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "user:", "assistant:")
    words = [*special, *(f"w{number}" for number in range(size.num_words - len(special)))]
    whole = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    )
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", additional_special_tokens=["<image>"], padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    side = size.image_side
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
