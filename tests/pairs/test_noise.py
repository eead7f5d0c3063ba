"""Diffusion noise: published schedules, where it is added, and what it depends on."""

import dataclasses

import pytest
import torch
from PIL import Image

from tests.families import FAMILIES, built
from tita.align import Request
from tita.align.forms import UNGUIDED
from tita.align.prompts import PreparedRequest, Preparer
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.pairs.distort import NoisyProcessor, attach_noise, render_noise
from tita.vlm.loading import VLM, Models, load_vlm
from tita.vlm.noise import SevaNoise, noise_factors


def base() -> VLM:
    return load_vlm(str(demo_model_path("base")), dtype="float32")


def scene(shade: int = 90, *, size: tuple[int, int] = (48, 32)) -> Image.Image:
    return Image.effect_noise(size, shade).convert("RGB")


def pixels(vlm: VLM, *images: Image.Image) -> list[torch.Tensor]:
    requests = [Request(question="What?", images=(image,), guidance=UNGUIDED) for image in images]
    prepared = Preparer(Models(vlm)).prepare_all(requests)
    assert not [each for each in prepared if isinstance(each, TitaError)]
    return [
        each.inputs["base"]["pixel_values"]
        for each in prepared
        if isinstance(each, PreparedRequest)
    ]


def test_schedules_equal_the_published_ones() -> None:
    # SeVa, data/step2/generate_with_aug.py, step by step.
    shares, share = [], 1.0
    for beta in torch.sigmoid(torch.linspace(-6, 6, 1000, dtype=torch.float64)):
        share *= 1 - (float(beta) * (0.5e-2 - 1e-5) + 1e-5)
        shares.append(share)
    for step in (1, 500, 800, 999):
        left, added = noise_factors(step, schedule="seva")
        assert left**2 == pytest.approx(shares[step])
        assert left**2 + added**2 == pytest.approx(1)
    # DDPM, section 4: about N(0, 1) is left at the end of the linear schedule.
    assert noise_factors(999, schedule="ddpm")[0] ** 2 == pytest.approx(4.0e-5, rel=0.02)


def test_noise_is_added_to_the_input_of_the_vision_tower() -> None:
    vlm = base()
    noisy = dataclasses.replace(vlm, processor=NoisyProcessor(vlm.processor))
    image = scene()
    (clean,) = pixels(vlm, image)
    (with_noise,) = pixels(noisy, attach_noise(image, SevaNoise(500, 7), pad=True))
    left, added = noise_factors(500, schedule="seva")
    noise = (with_noise - left * clean) / added
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert float(noise.abs().max()) > 2.5, "the noise was clipped"
    assert torch.equal(pixels(noisy, image)[0], clean)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_noise_depends_only_on_the_seed_in_every_family(family: str) -> None:
    model, processor = built(family)
    vlm = VLM(name=family, model=model, processor=NoisyProcessor(processor), image_aspect="keep")
    image = scene(size=(64, 64))
    first, second = (attach_noise(image, SevaNoise(800, seed), pad=False) for seed in (1, 2))
    alone = [pixels(vlm, one)[0] for one in (first, second)]
    assert not torch.equal(*alone)
    assert torch.equal(pixels(vlm, first)[0], alone[0])
    together = pixels(vlm, second, image, first)
    assert torch.equal(together[0], alone[1])
    assert torch.equal(together[2], alone[0])


def test_rendered_noise_equals_the_input_of_the_tower() -> None:
    vlm = base()
    image = scene()
    assert render_noise(image, vlm.processor) is image
    shown = render_noise(attach_noise(image, SevaNoise(500, 7), pad=True), vlm.processor)
    (tower,) = pixels(
        dataclasses.replace(vlm, processor=NoisyProcessor(vlm.processor)),
        attach_noise(image, SevaNoise(500, 7), pad=True),
    )
    assert shown.size == (tower.shape[-1], tower.shape[-2])
    image_processor = vlm.processor.image_processor
    bytes_ = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8)
    restored = bytes_.reshape(*shown.size[::-1], 3).permute(2, 0, 1) / 255
    wanted = tower[0] * torch.tensor(image_processor.image_std)[:, None, None]
    wanted = (wanted + torch.tensor(image_processor.image_mean)[:, None, None]).clamp(0, 1)
    assert float((restored - wanted).abs().max()) < 1 / 255
