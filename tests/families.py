"""Tiny untrained models of families other than LLaVA-1.5, in folders as on a hub.

Each folder has configuration, weights, tokenizer, image processor and template, so the models are
loaded like any other.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tita.demo.models import demo_model_path
from tita.vlm.processors import load_processor

Built = tuple[Any, Any]
Family = Callable[[Path], Any]
"""Writes tokenizer and processor into a folder; returns the model's configuration."""

_NUM_WORDS = 34
"""Number of tokens of the demo's tokenizer; added tokens follow."""
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_SIGHT = {
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_SIGLIP = {**_SIGHT, "model_type": "siglip_vision_model", "vision_use_head": False}


def _template(image: str) -> str:
    return (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        + image
        + "{% else %} {{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )


def _tokenizer(folder: Path, *specials: str, **named: str) -> Any:
    """The demo's tokenizer with more special tokens, some of them named attributes."""
    demo = str(demo_model_path("reward"))
    tokenizer = AutoTokenizer.from_pretrained(demo, extra_special_tokens=named)
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _processor(
    folder: Path, kind: str, template: str, images: dict[str, Any], **options: Any
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    options["processor_class"] = f"{kind}Processor"
    (folder / "processor_config.json").write_text(json.dumps(options))


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    return {**_TEXT, "vocab_size": len(tokenizer), **ends, **more}


def _qwen(folder: Path, kind: str, vision: dict[str, Any], **images: Any) -> Any:
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer = _tokenizer(folder, *(f"<|{name}|>" for name in names))
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    _processor(
        folder,
        kind,
        _template("<|vision_start|><|image_pad|><|vision_end|>"),
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 56 * 56,
            "max_pixels": 56 * 56,
            **images,
        },
    )
    return getattr(transformers, f"{kind}Config")(
        text_config=_text(tokenizer, rope_parameters=rope, head_dim=16),
        vision_config=vision,
        **dict(zip(keys, ids, strict=True)),
    )


def qwen2_vl(folder: Path) -> Any:
    """Patches of all images in one row, with a grid per image; positions on three axes."""
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return _qwen(folder, "Qwen2VL", vision)


def qwen2_5_vl(folder: Path) -> Any:
    """As Qwen2-VL, with windowed attention in the tower."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    return _qwen(folder, "Qwen2_5_VL", vision)


def qwen3_vl(folder: Path) -> Any:
    """Features of the tower go into several layers of the text model (DeepStack)."""
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    return _qwen(folder, "Qwen3VL", vision, patch_size=16, size=None)


_TILES: dict[str, Any] = {
    "image_processor_type": "LlavaNextImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
}
"""Settings of LLaVA-NeXT's image processor, which Granite has, too."""


def llava_next(folder: Path) -> Any:
    """Tiles of an image, their number by its aspect, and `image_sizes`."""
    tokenizer = _tokenizer(folder, "<image>")
    _processor(
        folder,
        "LlavaNext",
        _template("<image>"),
        _TILES,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return transformers.LlavaNextConfig(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config={**_SIGHT, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=_TILES["image_grid_pinpoints"],
    )


def llava_onevision(folder: Path) -> Any:
    """As LLaVA-NeXT, but several images of one prompt are not cut into tiles."""
    tokenizer = _tokenizer(folder, "<image>", "<video>")
    pinpoints = [[32, 32], [32, 64], [64, 32], [64, 64]]
    _processor(
        folder,
        "LlavaOnevision",
        _template("<image>"),
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 32, "width": 32},
            "image_grid_pinpoints": pinpoints,
        },
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaOnevisionConfig(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config=_SIGLIP,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
    )


def _idefics(folder: Path, kind: str, *specials: str) -> Any:
    names = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tokenizer = _tokenizer(folder, *names, *specials)
    _processor(
        folder,
        kind,
        _template("<image>"),
        {
            "image_processor_type": f"{kind}ImageProcessor",
            "size": {"longest_edge": 32},
            "max_image_size": {"longest_edge": 32},
            "do_image_splitting": False,
        },
        image_seq_len=1,
    )
    return getattr(transformers, f"{kind}Config")(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_SIGHT,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )


def idefics3(folder: Path) -> Any:
    """Images padded to one number of tiles per batch, with a pixel mask."""
    return _idefics(folder, "Idefics3")


def smolvlm(folder: Path) -> Any:
    """As Idefics3, with a processor that also takes videos."""
    return _idefics(folder, "SmolVLM", "<video>")


def internvl(folder: Path) -> Any:
    """Tiles of all images in one row, without image boundaries."""
    tokenizer = _tokenizer(
        folder,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    _processor(
        folder,
        "InternVL",
        _template("<IMG_CONTEXT>"),
        {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 32, "width": 32},
            "crop_to_patches": True,
            "max_patches": 3,
        },
        image_seq_length=4,
    )
    return transformers.InternVLConfig(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config={**_SIGHT, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )


def gemma3(folder: Path) -> Any:
    """Tokens of an image attend to each other; some layers have a sliding window."""
    tokenizer = _tokenizer(
        folder, image_token="<soft>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    _processor(
        folder,
        "Gemma3",
        _template("<start_of_image>"),
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}},
        image_seq_length=4,
    )
    return transformers.Gemma3Config(
        text_config=_text(
            tokenizer,
            num_hidden_layers=3,
            head_dim=16,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        vision_config={**_SIGLIP, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )


def paligemma(folder: Path) -> Any:
    """All tokens of a prompt attend to each other."""
    tokenizer = _tokenizer(folder, image_token="<image>")
    _processor(
        folder,
        "PaliGemma",
        _template("<image>"),
        {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 32, "width": 32},
            "image_seq_length": 4,
        },
    )
    return transformers.PaliGemmaConfig(
        text_config=_text(tokenizer, model_type="gemma", head_dim=16),
        vision_config={**_SIGLIP, "projection_dim": 32},
        image_token_index=tokenizer.image_token_id,
        projection_dim=32,
    )


def aya_vision(folder: Path) -> Any:
    """Tiles with text between them; three layers in four have a sliding window."""
    tokenizer = _tokenizer(
        folder,
        "<image>",
        *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"),
        *("TILE", "TILE_GLOBAL"),
    )
    _processor(
        folder,
        "AyaVision",
        _template("<image>"),
        {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 32, "width": 32},
            "crop_to_patches": True,
            "max_patches": 3,
        },
        patch_size=8,
        img_size=32,
        downsample_factor=2,
    )
    return transformers.AyaVisionConfig(
        text_config=_text(
            tokenizer,
            model_type="cohere2",
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
            head_dim=16,
        ),
        vision_config={**_SIGLIP, "patch_size": 8},
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )


def mllama(folder: Path) -> Any:
    """Separate layers attend to images. Not among `FAMILIES`: it is refused."""
    tokenizer = _tokenizer(folder, "<|image|>", "<|python_tag|>")
    _processor(
        folder,
        "Mllama",
        _template("<|image|>"),
        {
            "image_processor_type": "MllamaImageProcessor",
            "size": {"height": 32, "width": 32},
            "max_image_tiles": 2,
        },
    )
    text = _text(tokenizer, cross_attention_layers=[1])
    return transformers.MllamaConfig(
        text_config={**text, "bos_token_id": 1},
        vision_config={
            **_SIGHT,
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )


def pixtral(folder: Path) -> Any:
    """A LLaVA whose tower takes images of any aspect. Its processor needs torchvision."""
    tokenizer = _tokenizer(folder, "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    _processor(
        folder,
        "Pixtral",
        _template("[IMG]"),
        {
            "image_processor_type": "PixtralImageProcessor",
            "size": {"longest_edge": 32},
            "patch_size": {"height": 16, "width": 16},
        },
        patch_size=16,
    )
    return transformers.LlavaConfig(
        text_config=_text(tokenizer, model_type="mistral"),
        vision_config={**_SIGHT, "model_type": "pixtral", "head_dim": 16},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


def qwen3_vl_moe(folder: Path) -> Any:
    """As Qwen3-VL, with a mixture of experts."""
    dense = qwen3_vl(folder).to_dict()
    text, vision = dense["text_config"], dense["vision_config"]
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "router_aux_loss_coef": 0.0,
    }
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return transformers.Qwen3VLMoeConfig(
        text_config={**text, **experts, "model_type": "qwen3_vl_moe_text"},
        vision_config={**vision, "model_type": "qwen3_vl_moe_vision"},
        **{name: dense[name] for name in tokens},
    )


def qwen3_5(folder: Path) -> Any:
    """Layers of linear attention. Not among `ALL_FAMILIES`: it is refused."""
    dense = qwen3_vl(folder).to_dict()
    linear = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
    }
    kept = ("vocab_size", "eos_token_id", *_TEXT)
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return transformers.Qwen3_5Config(
        text_config={**{name: dense["text_config"][name] for name in kept}, **linear},
        vision_config=vision,
        **{name: dense[name] for name in tokens},
    )


def glm4v(folder: Path) -> Any:
    """Positions on three axes, as Qwen2-VL; a convolution of its own merges patches."""
    names = ("image", "begin_of_image", "end_of_image", "video", "begin_of_video", "end_of_video")
    tokenizer = _tokenizer(folder, *(f"<|{name}|>" for name in names))
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]
    keys = ("image", "image_start", "image_end", "video", "video_start", "video_end")
    _processor(
        folder,
        "Glm4v",
        _template("<|begin_of_image|><|image|><|end_of_image|>"),
        {
            "image_processor_type": "Glm4vImageProcessor",
            "size": {"shortest_edge": 56 * 56, "longest_edge": 84 * 84 * 2},
        },
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return transformers.Glm4vConfig(
        text_config=_text(
            tokenizer, rope_parameters={**rope, "partial_rotary_factor": 1.0}, head_dim=16
        ),
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "image_size": 56,
            "out_hidden_size": 32,
            "intermediate_size": 48,
        },
        **{f"{key}_token_id": id for key, id in zip(keys, ids, strict=True)},
    )


def gemma4(folder: Path) -> Any:
    """Layers that share keys, embeddings per layer, and images whose tokens see each other."""
    tokenizer = _tokenizer(
        folder,
        "<|video|>",
        image_token="<|image|>",
        boi_token="<boi>",
        eoi_token="<eoi>",
        audio_token="<|audio|>",
        boa_token="<boa>",
        eoa_token="<eoa>",
    )
    _processor(
        folder,
        "Gemma4",
        _template("<|image|>"),
        {
            "image_processor_type": "Gemma4ImageProcessor",
            "max_soft_tokens": 70,
            "pooling_kernel_size": 2,
            "feature_extractor_type": "Gemma4AudioFeatureExtractor",
        },
        image_seq_length=70,
    )
    return transformers.Gemma4Config(
        text_config=_text(
            tokenizer,
            pad_token_id=0,
            head_dim=16,
            num_hidden_layers=3,
            global_head_dim=16,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=len(tokenizer),
            num_kv_shared_layers=1,
            use_bidirectional_attention="vision",
            tie_word_embeddings=False,
        ),
        vision_config={
            **_TEXT,
            "num_hidden_layers": 1,
            "head_dim": 16,
            "position_embedding_size": 128,
            "pooling_kernel_size": 2,
        },
        audio_config=None,
        # The rows of tokens that are never generated are zero, which no input may be.
        tie_word_embeddings=False,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        audio_token_id=tokenizer.audio_token_id,
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
    )


def ovis2(folder: Path) -> Any:
    """The tokens around an image depend on it, too, and tie tiles to a grid."""
    marks = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    tokenizer = _tokenizer(folder, "<image>", "<IMG_ATOM>", *marks)
    _processor(
        folder,
        "Ovis2",
        _template("<image>"),
        {
            "image_processor_type": "Ovis2ImageProcessor",
            "size": {"height": 32, "width": 32},
            "crop_to_patches": True,
            "max_patches": 4,
        },
        image_seq_length=4,
    )
    return transformers.Ovis2Config(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config={**_SIGHT, "vocab_size": 24, "num_visual_indicator_tokens": len(marks)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(list(marks)),
        vocab_size=len(tokenizer),
        hidden_size=32,
    )


def ernie4_5_vl_moe(folder: Path) -> Any:
    """Experts of images and of text, by a type per token that the processor makes."""
    names = {
        f"{kind}{end}_token": f"<|{kind}{end}|>"
        for kind in ("image", "video")
        for end in ("", "_start", "_end")
    }
    tokenizer = _tokenizer(folder, **names)
    _processor(
        folder,
        "Ernie4_5_VLMoe",
        _template("<|image_start|><|image|><|image_end|>"),
        {
            "image_processor_type": "Ernie4_5_VLMoeImageProcessor",
            "size": {"shortest_edge": 56 * 56, "longest_edge": 84 * 84},
        },
    )
    return transformers.Ernie4_5_VLMoeConfig(
        text_config=_text(
            tokenizer,
            moe_intermediate_size=[32, 16],
            moe_k=2,
            moe_num_experts=4,
            moe_num_shared_experts=1,
            router_aux_loss_coef=0.0,
            mlp_layer_types=["dense", "sparse"],
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [3, 3, 2],
            },
            head_dim=16,
        ),
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48},
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in names},
    )


def granite4_vision(folder: Path) -> Any:
    """Tiles as LLaVA-NeXT, in windows, whose features go into several layers."""
    tokenizer = _tokenizer(folder, "<image>")
    _processor(
        folder,
        "Granite4Vision",
        _template("<image>"),
        _TILES,
        patch_size=8,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
    )
    return transformers.Granite4VisionConfig(
        text_config=_text(tokenizer),
        vision_config={**_SIGLIP, "patch_size": 8, "hidden_size": 64},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=_TILES["image_grid_pinpoints"],
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_target_layers=[0, 1],
        projector_dropout=0.0,
        qformer_config={
            "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
            "model_type": "blip_2_qformer",
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "encoder_hidden_size": 32,
            "cross_attention_frequency": 1,
        },
    )


def idefics2(folder: Path) -> Any:
    """A fixed number of tokens per image, whatever its size; all layers have a sliding window."""
    tokenizer = _tokenizer(folder, "<fake_token_around_image>", "<image>", "<end_of_utterance>")
    _processor(
        folder,
        "Idefics2",
        _template("<image>"),
        {
            "image_processor_type": "Idefics2ImageProcessor",
            "size": {"shortest_edge": 28, "longest_edge": 64},
            "do_image_splitting": False,
        },
        image_seq_len=4,
    )
    return transformers.Idefics2Config(
        text_config=_text(tokenizer, model_type="mistral", sliding_window=6, head_dim=16),
        vision_config={**_SIGHT, "image_size": 64},
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )


def exaone4_5(folder: Path) -> Any:
    """Patches as Qwen2.5-VL, with positions on one axis and a sliding window."""
    tokenizer = _tokenizer(folder, "<vision>", "</vision>", "<|image_pad|>", "<|video_pad|>")
    _processor(
        folder,
        "Exaone4_5_",
        _template("<vision><|image_pad|></vision>"),
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 56 * 56,
            "max_pixels": 112 * 112,
        },
    )
    return transformers.Exaone4_5_Config(
        text_config=_text(
            tokenizer,
            model_type="exaone4",
            head_dim=16,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )


def deepseek_vl(folder: Path) -> Any:
    """A LLaVA with bars around images and a tower named differently."""
    tokenizer = _tokenizer(folder, image_token="<image_placeholder>")
    _processor(
        folder,
        "DeepseekVL",
        _template("<image_placeholder>"),
        {
            "image_processor_type": "DeepseekVLImageProcessor",
            "size": {"height": 32, "width": 32},
            "min_size": 14,
        },
        num_image_tokens=4,
    )
    return transformers.DeepseekVLConfig(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_SIGLIP,
        image_token_id=tokenizer.image_token_id,
    )


def aria(folder: Path) -> Any:
    """Pixels are not converted to the dtype of the weights; a mixture of experts."""
    tokenizer = _tokenizer(folder, image_token="<fim>")
    _processor(
        folder,
        "Aria",
        _template("<fim>"),
        {
            "image_processor_type": "AriaImageProcessor",
            "max_image_size": 980,
            "min_image_size": 28,
            "split_resolutions": [[490, 490]],
        },
        size_conversion={"980": 4},
    )
    return transformers.AriaConfig(
        text_config=_text(
            tokenizer,
            model_type="aria_text",
            moe_num_experts=4,
            moe_topk=2,
            moe_num_shared_experts=1,
            head_dim=16,
            pad_token_id=0,
        ),
        vision_config={
            **_SIGHT,
            "model_type": "idefics3_vision",
            "image_size": 980,
            "patch_size": 140,
        },
        projector_patch_to_query_dict={49: 4},
        image_token_index=tokenizer.image_token_id,
    )


def paddleocr_vl(folder: Path) -> Any:
    """Positions on three axes, with a merge of patches after the tower."""
    tokenizer = _tokenizer(
        folder, "<|IMAGE_START|>", "<|IMAGE_END|>", "<|video|>", image_token="<|image|>"
    )
    start, end, video = tokenizer.convert_tokens_to_ids(
        ["<|IMAGE_START|>", "<|IMAGE_END|>", "<|video|>"]
    )
    _processor(
        folder,
        "PaddleOCRVL",
        _template("<|IMAGE_START|><|image|><|IMAGE_END|>"),
        {
            "image_processor_type": "PaddleOCRVLImageProcessor",
            "size": {"shortest_edge": 56 * 56, "longest_edge": 84 * 84},
        },
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return transformers.PaddleOCRVLConfig(
        text_config=_text(tokenizer, head_dim=16, rope_parameters=rope),
        vision_config={**_SIGHT, "image_size": 56, "patch_size": 14},
        image_token_id=tokenizer.image_token_id,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )


def deepseek_vl_hybrid(folder: Path) -> Any:
    """Two towers, which read the image in two resolutions."""
    tokenizer = _tokenizer(folder, image_token="<image_placeholder>")
    _processor(
        folder,
        "DeepseekVLHybrid",
        _template("<image_placeholder>"),
        {
            "image_processor_type": "DeepseekVLHybridImageProcessor",
            "size": {"height": 32, "width": 32},
            "high_res_size": {"height": 64, "width": 64},
            "min_size": 14,
        },
        num_image_tokens=4,
    )
    return transformers.DeepseekVLHybridConfig(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_SIGLIP,
        high_res_vision_config={
            **_SIGHT,
            "model_type": "sam_vision_model",
            "image_size": 64,
            "output_channels": 16,
            "mlp_dim": 64,
            "window_size": 2,
            "global_attn_indexes": [0, 1],
            "num_pos_feats": 8,
        },
        image_token_id=tokenizer.image_token_id,
    )


def video_llama_3(folder: Path) -> Any:
    """Patches as Qwen2-VL, with a merge size per image and positions on one axis."""
    tokenizer = _tokenizer(folder, "<|image_pad|>", "<|video_pad|>")
    _processor(
        folder,
        "VideoLlama3",
        _template("<|image_pad|>"),
        {
            "image_processor_type": "VideoLlama3ImageProcessor",
            "min_pixels": 32 * 32,
            "max_pixels": 64 * 64,
            "patch_size": 16,
            "merge_size": 1,
        },
    )
    sizes = {name: value for name, value in _SIGHT.items() if name != "image_size"}
    return transformers.VideoLlama3Config(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config=sizes,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )


_ALL: tuple[Family, ...] = (
    llava_next,
    llava_onevision,
    idefics3,
    smolvlm,
    internvl,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
    gemma3,
    paligemma,
    aya_vision,
)
FAMILIES: dict[str, Family] = {family.__name__: family for family in _ALL}
_FURTHER: tuple[Family, ...] = (ernie4_5_vl_moe, glm4v, ovis2)
_SELDOM: tuple[Family, ...] = (
    aria,
    deepseek_vl,
    deepseek_vl_hybrid,
    exaone4_5,
    gemma4,
    granite4_vision,
    idefics2,
    paddleocr_vl,
    qwen3_vl_moe,
    video_llama_3,
)
ALL_FAMILIES: dict[str, Family] = FAMILIES | {
    family.__name__: family for family in (*_FURTHER, *_SELDOM)
}
DECODED: list[Any] = [
    *sorted(FAMILIES),
    *(family.__name__ for family in _FURTHER),
    *(pytest.param(family.__name__, marks=pytest.mark.soak) for family in _SELDOM),
]
"""Families for the tests of decoding and training; some run only in `make soak`."""
TRAINED = [each for each in DECODED if each != "paligemma"]
LAYERED = ("granite4_vision", "qwen3_vl", "qwen3_vl_moe")
"""Families whose features of images come from several layers of the tower."""


def saved(family: Family, folder: Path, *, seed: int = 0) -> Path:
    """A family's model in a folder."""
    config = family(folder)
    model = _model(config, seed=seed)
    model.generation_config.eos_token_id = config.get_text_config().eos_token_id
    model.save_pretrained(folder)
    return folder


def built(name: str) -> Built:
    """Model and processor, the same every time."""
    with tempfile.TemporaryDirectory() as folder:
        config = ALL_FAMILIES[name](Path(folder))
        config.save_pretrained(folder)
        return _model(config, seed=0), load_processor(folder, where=name)


def _model(config: Any, *, seed: int) -> Any:
    """Weights so large that rounding does not change the most likely token."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = 0.3 * torch.randn(weight.shape)
    # The image token is never generated: a full forward would expect an image.
    unsaid = [config.image_token_id, *range(_NUM_WORDS, config.get_text_config().vocab_size)]
    model.get_output_embeddings().weight.data[unsaid] = 0
    return model.eval()
