"""Distorts images so that their content is lost: the model's answer to one is the rejected answer.

`diffusion` adds noise of one of the schedules in `tita.vlm.noise`.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL.Image import Image
from PIL.ImageFilter import GaussianBlur

from tita.recipes import PairsRecipe
from tita.vlm.images import pad_to_square
from tita.vlm.noise import NOISE_KEY, SevaNoise, add_pixel_noise, pixel_names


def distort(
    image: Image, *, question_id: str, distortion: str, recipe: PairsRecipe, pad: bool
) -> Image:
    """Return the image for the rejected answer of a question.

    Args:
        image: the clean image.
        question_id: determines the random choices.
        distortion: one of the recipe's.
        recipe: the recipe of the run.
        pad: whether the model's images are padded to squares.

    Returns:
        An image; with SeVa's noise, one for a `NoisyProcessor`.
    """
    seed = derive_seed(question_id, purpose=distortion, seed=recipe.seed)
    if distortion != "diffusion":
        return _DISTORTIONS[distortion](image, seed)
    if recipe.noise == "ddpm":
        return add_pixel_noise(image, step=recipe.diffusion_steps, seed=seed)
    return attach_noise(image, SevaNoise(recipe.diffusion_steps, seed), pad=pad)


def derive_seed(question_id: str, *, purpose: str, seed: int) -> int:
    """Return a seed that depends on the question, not on the worker or batch that answers it."""
    return zlib.crc32(f"{seed}/{purpose}/{question_id}".encode())


def crop(image: Image, seed: int) -> Image:
    """A random part of half the width and height, enlarged to the image's size."""
    generator = random.Random(seed)
    width, height = max(1, image.width // 2), max(1, image.height // 2)
    left = generator.randint(0, image.width - width)
    top = generator.randint(0, image.height - height)
    return image.resize(image.size, box=(left, top, left + width, top + height))


def blur(image: Image, seed: int) -> Image:
    """Gaussian blur with a radius of a twelfth of the shorter side."""
    return image.filter(GaussianBlur(min(image.size) / 12))


def downscale(image: Image, seed: int) -> Image:
    """Down to an eighth of each side and back."""
    small = image.resize((max(1, image.width // 8), max(1, image.height // 8)))
    return small.resize(image.size)


_DISTORTIONS: dict[str, Callable[[Image, int], Image]] = {
    "crop": crop,
    "blur": blur,
    "downscale": downscale,
}


def attach_noise(image: Image, noise: SevaNoise, *, pad: bool) -> Image:
    """Return a copy of the image that a `NoisyProcessor` adds noise to.

    Args:
        image: the clean image.
        noise: the noise to add.
        pad: whether the model's images are padded to squares; done here, because padding later
            would lose the attachment.
    """
    copy = (pad_to_square(image) if pad else image).copy()
    copy.info[NOISE_KEY] = noise
    return copy


class NoisyProcessor:
    """Wraps a model's processor and adds noise to images of `attach_noise`."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *, images: Sequence[Sequence[Image]] | None = None, **options: Any) -> Any:
        """Return the processor's output with noise in its pixels.

        Raises:
            ValueError: the output does not separate the pixels of several images.
        """
        inputs = self._processor(images=images, **options)
        noises = [image.info.get(NOISE_KEY) for row in images or () for image in row]
        if not any(noises):
            return inputs
        for name in pixel_names(inputs):
            # Most processors stack images; some concatenate the patches of all images.
            parts = [inputs[name]] if len(noises) == 1 else list(inputs[name])
            if len(parts) != len(noises):
                raise ValueError(f"{name} does not separate the images; pass one at a time")
            for part, noise in zip(parts, noises, strict=True):
                if noise is not None:
                    part.copy_(noise.add_to(part))
        return inputs


def render_noise(image: Image, processor: Any) -> Image:
    """Return an image of `attach_noise` as the vision tower sees it; others unchanged.

    Values beyond black and white are clipped, unlike those of the tower. For a processor that cuts
    images into patches, the noise is added to the pixels of the image.
    """
    noise = image.info.get(NOISE_KEY)
    if noise is None:
        return image
    image_processor = processor.image_processor
    mean, std = (
        torch.tensor(getattr(image_processor, name, None) or [0.5] * 3)[:, None, None]
        for name in ("image_mean", "image_std")
    )
    pixels = image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    if pixels.ndim != 3:
        pixels = (torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1) - mean) / std
    shown = ((noise.add_to(pixels) * std + mean).clamp(0, 1) * 255).round()
    return PIL.Image.fromarray(shown.permute(1, 2, 0).to(torch.uint8).numpy())
