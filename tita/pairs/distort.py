"""Distortions that take away an image's content and leave the question: `rejected` comes of it."""

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def diffusion(image: "Image", *, step: int, seed: int) -> "Image":
    """Noise of step t of DDPM's forward process (arXiv 2006.11239), as VCD and SeVa distort.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e with the linear schedule b = 1e-4 .. 0.02 of 1,000 steps,
    a_t the product of (1 - b), x in [-1, 1].
    """
    import numpy as np
    import PIL.Image

    betas = np.linspace(1e-4, 0.02, 1000)
    kept = np.cumprod(1 - betas)[step]
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    noise = np.random.default_rng(seed).standard_normal(pixels.shape, dtype=np.float32)
    noisy = np.sqrt(kept) * pixels + np.sqrt(1 - kept) * noise
    return PIL.Image.fromarray(((noisy.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8))


def crop(image: "Image", *, step: int, seed: int) -> "Image":
    """A random part of half the width and height, enlarged to the image's size."""
    import random

    generator = random.Random(seed)
    width, height = max(1, image.width // 2), max(1, image.height // 2)
    left = generator.randint(0, image.width - width)
    top = generator.randint(0, image.height - height)
    return image.resize(image.size, box=(left, top, left + width, top + height))


def blur(image: "Image", *, step: int, seed: int) -> "Image":
    """Gaussian blur with a radius of a twelfth of the shorter side."""
    import PIL.ImageFilter

    return image.filter(PIL.ImageFilter.GaussianBlur(min(image.size) / 12))


def downscale(image: "Image", *, step: int, seed: int) -> "Image":
    """Down to an eighth of each side and back."""
    small = image.resize((max(1, image.width // 8), max(1, image.height // 8)))
    return small.resize(image.size)


DISTORTIONS: dict[str, Callable[..., "Image"]] = {
    "diffusion": diffusion,
    "crop": crop,
    "blur": blur,
    "downscale": downscale,
}


def seed_of(question: str, *, distortion: str, seed: int) -> int:
    """A seed that hangs on the question alone, not on the shard or batch that meets it."""
    return zlib.crc32(f"{seed}/{distortion}/{question}".encode())
