"""Tiny models of other families than LLaVA-1.5, untrained, with processors of their own."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from tita.demo.models import demo_model_path

Built = tuple[Any, Any]
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def _template(image: str) -> str:
    return (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        + image
        + "{% else %} {{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )


def _tokenizer(*specials: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(str(demo_model_path("reward")))
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    return tokenizer


class _WithoutVideos:
    """Its video processor needs torchvision, which its images do not."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        if name == "video_processor":
            return None
        return super().check_argument_for_proper_class(name, argument)  # type: ignore[misc]


class _Qwen2(_WithoutVideos, Qwen2VLProcessor):  # type: ignore[misc]
    pass


class _Qwen25(_WithoutVideos, Qwen2_5_VLProcessor):  # type: ignore[misc]
    pass


def _qwen(config_class: Any, processor_class: Any, vision: dict[str, Any]) -> tuple[Any, Any]:
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer = _tokenizer(*(f"<|{name}|>" for name in names))
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**_TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = config_class(
        text_config={**text, **ends}, vision_config=vision, **dict(zip(keys, ids, strict=True))
    )
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)
    template = _template("<|vision_start|><|image_pad|><|vision_end|>")
    processor = processor_class(
        image_processor=images, tokenizer=tokenizer, video_processor=None, chat_template=template
    )
    return config, processor


def qwen2_vl() -> Built:
    """Patches of all images in one row, with a grid an image; positions in three dimensions."""
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config, processor = _qwen(Qwen2VLConfig, _Qwen2, vision)
    return Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl() -> Built:
    """As Qwen2-VL, with a tower that attends within windows."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    config, processor = _qwen(Qwen2_5_VLConfig, _Qwen25, vision)
    return Qwen2_5_VLForConditionalGeneration(config), processor


def llava_next() -> Built:
    """Tiles of an image, as many as its form asks for, and `image_sizes` beside them."""
    tokenizer = _tokenizer("<image>")
    config = LlavaNextConfig(
        text_config={**_TEXT, "model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 32,
            "patch_size": 16,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": 32,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )
    return LlavaNextForConditionalGeneration(config), processor


def idefics3() -> Built:
    """Images padded to one number of tiles a batch, with a mask of pixels."""
    names = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tokenizer = _tokenizer(*names)
    config = Idefics3Config(
        text_config={**_TEXT, "model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config={
            "image_size": 32,
            "patch_size": 16,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    processor = Idefics3Processor(
        image_processor=images,
        tokenizer=tokenizer,
        image_seq_len=1,
        chat_template=_template("<image>"),
    )
    return Idefics3ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], Built]] = {
    family.__name__: family for family in (llava_next, idefics3, qwen2_vl, qwen2_5_vl)
}


def built(name: str) -> Built:
    """Model and processor, the same every time."""
    torch.manual_seed(0)
    return FAMILIES[name]()
