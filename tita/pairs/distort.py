"""Distortions that take away an image's content and leave the question: `rejected` comes of it."""

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from tita.pairs.noise import Noise, marked, on_pixels
from tita.recipes import PairsRecipe

if TYPE_CHECKING:
    from PIL.Image import Image


def distorted(
    image: "Image", *, question: str, distortion: str, recipe: PairsRecipe, pad: bool
) -> "Image":
    """The image as a question's rejected answer is to see it.

    Args:
        image: the clean one.
        question: its id, which the random choices hang on.
        distortion: one of the recipe's.
        recipe: of the run.
        pad: whether the model's images are made square.

    Returns:
        an image; with SeVa's noise, one for a `NoisyProcessor`.
    """
    seed = seed_of(question, distortion=distortion, seed=recipe.seed)
    if distortion != "diffusion":
        return _DISTORTIONS[distortion](image, seed)
    if recipe.noise == "ddpm":
        return on_pixels(image, step=recipe.diffusion_steps, seed=seed)
    return marked(image, Noise(recipe.diffusion_steps, seed), pad=pad)


def crop(image: "Image", seed: int) -> "Image":
    """A random part of half the width and height, enlarged to the image's size."""
    import random

    generator = random.Random(seed)
    width, height = max(1, image.width // 2), max(1, image.height // 2)
    left = generator.randint(0, image.width - width)
    top = generator.randint(0, image.height - height)
    return image.resize(image.size, box=(left, top, left + width, top + height))


def blur(image: "Image", seed: int) -> "Image":
    """Gaussian blur with a radius of a twelfth of the shorter side."""
    import PIL.ImageFilter

    return image.filter(PIL.ImageFilter.GaussianBlur(min(image.size) / 12))


def downscale(image: "Image", seed: int) -> "Image":
    """Down to an eighth of each side and back."""
    small = image.resize((max(1, image.width // 8), max(1, image.height // 8)))
    return small.resize(image.size)


_DISTORTIONS: dict[str, Callable[["Image", int], "Image"]] = {
    "crop": crop,
    "blur": blur,
    "downscale": downscale,
}


def seed_of(question: str, *, distortion: str, seed: int) -> int:
    """A seed that hangs on the question alone, not on the shard or batch that meets it."""
    return zlib.crc32(f"{seed}/{distortion}/{question}".encode())
