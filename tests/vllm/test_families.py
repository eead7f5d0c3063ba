"""Tiny random models of families other than LLaVA-1.5, over both engines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageTextToText

pytest.importorskip("vllm", reason="engine vllm is not installed: run make test-vllm")

from tests import families
from tests.vllm.engines import answers, assert_same, pictures, reference_engine, vllm_batch
from tita.align import Guidance, Request, Sampling, Turn
from tita.align.prompts import Preparer
from tita.engine.vllm_engine import load_outlines
from tita.engine.vllm_inputs import to_engine_input
from tita.vllm_plugin.families import FAMILIES
from tita.vlm.inputs import image_token_id
from tita.vlm.prompts import BadConversation


def build(folder: Path, family: Callable[[Path], Any], *, seed: int, layers: int) -> str:
    """A model of a family, with a head size that vLLM's attention on CPUs has."""
    folder.mkdir(parents=True)
    config = family(folder)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    text.hidden_size, text.head_dim = 64, 32
    if "mrope_section" in (text.rope_parameters or {}):
        text.rope_parameters["mrope_section"] = [4, 6, 6]
        # Published checkpoints of Qwen3-VL have it; transformers does not read it.
        text.rope_parameters["mrope_interleaved"] = config.model_type == "qwen3_vl"
        vision = config.vision_config
        setattr(vision, "hidden_size" if config.model_type == "qwen2_vl" else "out_hidden_size", 64)
    text.initializer_range = 0.2
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * layers
    config.vision_config.initializer_range = 0.2
    # As published checkpoints have them: vLLM would normalise pixels by them once more.
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"do_rescale": True, "do_normalize": True}
    settings |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).float()
    model.save_pretrained(folder)
    return str(folder)


def family_pair(folder: Path, name: str) -> dict[str, str]:
    """A base and a reward model of a family by its name in `families`."""
    family = getattr(families, name)
    return {
        "base": build(folder / "base", family, seed=1, layers=2),
        "reward": build(folder / "reward", family, seed=2, layers=1),
    }


def family_requests() -> list[Request]:
    """Questions about no image, one, and several of different sizes, with different weights."""
    images = pictures(4)
    wide = images[0].resize((64, 32))
    shown = [(), *((image,) for image in (*images, wide)), (images[1], "and", wide), images[2:]]
    return [
        Request(
            turns=(Turn(role="user", parts=(*parts, question)),),
            guidance=Guidance(weight=weight),
            sampling=Sampling(max_new_tokens=16, ignore_end=True),
        )
        for parts in shown
        for question in ("what number is written ?", "is there a 3")
        for weight in (0.0, 0.4, 1.0)
    ]


@pytest.mark.parametrize(
    "name",
    ["llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"],
)
def test_family(name: str, tmp_path: Path) -> None:
    paths = family_pair(tmp_path, name)
    requests = family_requests()
    expected = reference_engine(paths).generate(requests)
    assert len({answer.token_ids for answer in expected}) > 6, "the answers are too much alike"
    with vllm_batch(paths, max_model_len=512) as batch:
        assert_same(expected, answers(batch, requests))


def test_images_beside_each_other(tmp_path: Path) -> None:
    """It is not known where the first one ends, if their sizes decide their numbers of tokens."""
    models = load_outlines(
        {"base": build(tmp_path / "base", families.llava_next, seed=1, layers=1)}
    )
    preparer = Preparer(models)

    def places(*sizes: tuple[int, int], between: str = "") -> list[int]:
        request = Request(
            raw=between.join(["<image>"] * len(sizes)) + " what ?",
            images=tuple(PIL.Image.new("RGB", size) for size in sizes),
            guidance=Guidance(weight=0.0),
        )
        found = to_engine_input(
            preparer.prepare(request),
            family=FAMILIES["LlavaNextForConditionalGeneration"],
            image_token=image_token_id(models.base.model),
            vocabularies={},
        )
        return [each.length for each in found["mm_placeholders"]["image"]]  # type: ignore[typeddict-item]

    one, other = (64, 64), (64, 32)
    lengths = places(one, other, between=" and ")
    assert lengths == places(one) + places(other)
    assert lengths[0] != lengths[1]
    assert places(one, one) == 2 * places(one)
    with pytest.raises(BadConversation, match="2 images in 1 places; put text between images"):
        places(one, other)
