"""Tiny untrained models of families other than LLaVA-1.5, in folders as on a hub.

Each folder has configuration, weights, tokenizer, image processor and template, so the models are
loaded like any other.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def llava_next(folder: Path) -> Any:
    """Tiles of an image, their number by its aspect, and `image_sizes`."""
    tokenizer = _tokenizer(folder, "<image>")
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    _processor(
        folder,
        "LlavaNext",
        _template("<image>"),
        {
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
            "image_grid_pinpoints": pinpoints,
        },
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return transformers.LlavaNextConfig(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config={**_SIGHT, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
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
        config = FAMILIES[name](Path(folder))
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
