"""Image aspect: the rule by family, and the value in a checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlavaConfig

from tests.families import FAMILIES, mllama, pixtral
from tita.demo.models import demo_model_path
from tita.vlm.images import aspect_of, write_aspect
from tita.vlm.loading import load_vlm

REWARD = demo_model_path("reward")


@pytest.mark.parametrize("family", [*FAMILIES.values(), mllama, pixtral])
def test_other_families_keep_the_aspect(family: Callable[[Path], Any], tmp_path: Path) -> None:
    assert aspect_of(family(tmp_path)) == "keep"


@pytest.mark.parametrize(
    ("text", "tower", "aspect"),
    [
        ("llama", "clip_vision_model", "pad"),
        ("mistral", "clip_vision_model", "pad"),  # BakLLaVA
        ("llama", "siglip_vision_model", "keep"),
    ],
)
def test_llava_is_padded_by_its_tower(text: str, tower: str, aspect: str) -> None:
    config = LlavaConfig(text_config={"model_type": text}, vision_config={"model_type": tower})
    assert aspect_of(config) == aspect


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_given_aspect_overrides(family: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(REWARD) if family == "llava" else FAMILIES[family](tmp_path)
    assert aspect_of(config, wanted="pad") == "pad"
    assert aspect_of(config, wanted="keep") == "keep"


def test_checkpoint_value_is_used(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(REWARD, model)
    assert load_vlm(str(model)).image_aspect == "pad"
    write_aspect(model, "keep")
    vlm = load_vlm(str(model))
    assert vlm.image_aspect == "keep"
    assert load_vlm(str(model), image_aspect="pad").image_aspect == "pad"
    vlm.model.save_pretrained(tmp_path / "again")
    assert aspect_of(AutoConfig.from_pretrained(tmp_path / "again")) == "keep"


@pytest.mark.parametrize(
    ("word", "aspect"), [("pad", "pad"), ("square", "keep"), ("anyres", "keep"), (None, "keep")]
)
def test_llavas_values_are_read(tmp_path: Path, word: str | None, aspect: str) -> None:
    config = FAMILIES["qwen2_vl"](tmp_path)
    config.image_aspect_ratio = word
    assert aspect_of(config) == aspect


def test_only_the_aspect_is_written(tmp_path: Path) -> None:
    shutil.copy(REWARD / "config.json", tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    write_aspect(tmp_path, "pad")
    after = json.loads((tmp_path / "config.json").read_text())
    assert after == before | {"image_aspect_ratio": "pad"}
