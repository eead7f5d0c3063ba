"""Noise that hides the content of images, of two diffusion schedules.

`seva` is that of the published code of SeVa (arXiv 2404.10501, github.com/Kevinz-code/SeVa,
`data/step2/generate_with_aug.py`) and of VCD (arXiv 2311.16922): betas along a sigmoid from 1e-5 to
5e-3, and noise on the output of the image processor, after resizing and normalisation. `ddpm` is
the linear schedule of DDPM (arXiv 2006.11239), betas from 1e-4 to 0.02, on the pixels of the image
in [-1, 1].

At step 500, `seva` multiplies the image by 0.86 and the noise by 0.51 (in units of the processor,
where 1 is about a quarter of the range from black to white), `ddpm` by 0.28 and 0.96. The last step
of `seva`, 999, is as strong as that: 0.29 and 0.96.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import PIL.Image
import torch
from PIL.Image import Image

_NUM_STEPS = 1000


@cache
def noise_factors(step: int, *, schedule: Literal["seva", "ddpm"]) -> tuple[float, float]:
    """Return the factors of image and noise, sqrt(a) and sqrt(1 - a), where a = prod(1 - b)."""
    if schedule == "seva":
        betas = (5e-3 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, _NUM_STEPS))) + 1e-5
    else:
        betas = np.linspace(1e-4, 0.02, _NUM_STEPS)
    share = float(np.cumprod(1 - betas)[step])
    return math.sqrt(share), math.sqrt(1 - share)


NOISE_KEY = "tita-noise"
"""Key of `Image.info` for noise that is added after the image's processor."""


@dataclass(frozen=True, slots=True)
class SevaNoise:
    """Noise of SeVa's schedule, added to an image after its processor."""

    step: int
    seed: int

    def add_to(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return `pixels` (any shape, in the processor's units) with noise."""
        image_factor, noise_factor = noise_factors(self.step, schedule="seva")
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(pixels.shape, generator=generator, dtype=torch.float32)
        return (image_factor * pixels.float() + noise_factor * noise).to(pixels.dtype)


def pixel_names(inputs: Iterable[str]) -> list[str]:
    """Names of the tensors with pixels among a processor's; some have images in two resolutions."""
    return [name for name in inputs if "pixel_values" in name]


def add_pixel_noise(image: Image, *, step: int, seed: int) -> Image:
    """Return the image with noise of DDPM's schedule on its pixels."""
    image_factor, noise_factor = map(np.float64, noise_factors(step, schedule="ddpm"))
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    noise = np.random.default_rng(seed).standard_normal(pixels.shape, dtype=np.float32)
    noisy = image_factor * pixels + noise_factor * noise
    return PIL.Image.fromarray(((noisy.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8))
