"""Pairs of small models with random weights, whose answers are varied and no near ties."""

import json
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tita.demo.models import demo_model_path

IMAGE_SIZE, PATCH_SIZE = 84, 14
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2


def llava(
    folder: Path,
    *,
    seed: int,
    width: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    layers: int,
    tied: bool,
    extra_tokens: int = 0,
    padding: int = 0,
) -> str:
    """A LLaVA-1.5 with the demo's tokenizer and template; returns its folder.

    Args:
        extra_tokens: number of tokens that the tokenizer has beyond the demo's.
        padding: number of columns of the output layer beyond the tokenizer's tokens.
    """
    demo = demo_model_path("base")
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    tokenizer.add_tokens([f"extra{n}" for n in range(extra_tokens)])
    tokenizer.save_pretrained(folder)
    for name in ("chat_template.jinja", "generation_config.json"):
        shutil.copy(demo / name, folder / name)
    settings = json.loads((demo / "processor_config.json").read_text())
    settings["patch_size"] = PATCH_SIZE
    settings["image_processor"]["crop_size"] = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    settings["image_processor"]["size"] = {"shortest_edge": IMAGE_SIZE}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer) + padding,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.06,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=NUM_IMAGE_TOKENS,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lm_head" in name:
                weight.mul_(6)
            if "position_embedding" in name or "patch_embedding" in name:
                weight.mul_(3)
            if "projector" in name:
                weight.mul_(4)
        if tied:
            model.get_input_embeddings().weight.mul_(4)
    model.save_pretrained(folder)
    return str(folder)


def random_pair(folder: Path) -> dict[str, str]:
    """Grouped-query attention beside plain, head sizes 64 and 32, untied and tied weights."""
    return {
        "base": llava(
            folder / "base", seed=1, width=256, heads=4, kv_heads=4, head_size=64, layers=4,
            tied=False,
        ),
        "reward": llava(
            folder / "reward", seed=2, width=128, heads=4, kv_heads=2, head_size=32, layers=2,
            tied=True,
        ),
    }  # fmt: skip


def wider_pair(folder: Path) -> dict[str, str]:
    """The reward model has three tokens fewer, and a padded output layer."""
    return {
        "base": llava(
            folder / "base", seed=3, width=128, heads=4, kv_heads=4, head_size=32, layers=2,
            tied=False, extra_tokens=3,
        ),
        "reward": llava(
            folder / "reward", seed=4, width=64, heads=2, kv_heads=2, head_size=32, layers=2,
            tied=False, padding=5,
        ),
    }  # fmt: skip
