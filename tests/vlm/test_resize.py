"""An image resized before its processor gives the same pixels, and its processor a small array."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from tests.families import FAMILIES, saved
from tita.demo.models import demo_model_path
from tita.vlm.images import pad_to_square
from tita.vlm.inputs import prepare
from tita.vlm.loading import load_vlm
from tita.vlm.processors import resize_first
from tita.vlm.prompts import Prompt

STEPS = [
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
    CLIPImageProcessorPil(size={"height": 90, "width": 70}, resample=2),
    CLIPImageProcessorPil(do_resize=False, crop_size={"height": 64, "width": 64}),
    SiglipImageProcessorPil(size={"height": 48, "width": 48}, resample=1),
]


def noise(width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.effect_noise((width, height), 90).convert("RGB")


@pytest.mark.parametrize("step", STEPS)
def test_pixels_are_the_same(step: Any) -> None:
    dice = random.Random(1)
    processor = SimpleNamespace(image_processor=step)
    for _ in range(40):
        image = noise(dice.randrange(20, 500), dice.randrange(20, 500))
        first = resize_first(processor, image)
        wanted, found = (step(each, return_tensors="np")["pixel_values"] for each in (image, first))
        assert np.array_equal(wanted, found)
        assert (first is image) or step.do_resize


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_sees_what_its_processor_makes(family: str, tmp_path: Path) -> None:
    vlm = load_vlm(saved(FAMILIES[family], tmp_path))
    image = noise(150, 90)
    shown = pad_to_square(image) if vlm.image_aspect == "pad" else image
    found = prepare(vlm, [Prompt(text="what", images=(image,))])["pixel_values"]
    wanted = vlm.processor.image_processor([shown], return_tensors="pt")["pixel_values"]
    assert torch.equal(found.cpu().reshape(wanted.shape), wanted)


def test_its_processor_copies_no_photograph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor copies an image as an array several times, which takes most of its time."""
    vlm = load_vlm(demo_model_path("base"))
    kind, seen = type(vlm.processor.image_processor), []
    preprocess = kind.preprocess

    def recorded(self: Any, images: Any, **options: Any) -> Any:
        seen.extend(images)
        return preprocess(self, images, **options)

    monkeypatch.setattr(kind, "preprocess", recorded)
    prepare(vlm, [Prompt(text="what", images=(noise(4000, 3000),))])
    assert [image.size for (image,) in seen] == [(32, 32)]
