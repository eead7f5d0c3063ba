"""Distortions that take away an image's content and leave the question: `rejected` comes of it."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from tita.recipes import PairsRecipe
from tita.vlm import pad_to_square

if TYPE_CHECKING:
    import torch
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


Schedule = Literal["seva", "ddpm"]

_STEPS = 1000
_MARK = "tita-noise"


@cache
def kept(step: int, *, schedule: Schedule) -> tuple[float, float]:
    """Factors of image and noise after `step`: the roots of a and 1 - a, a the product of 1 - b."""
    import numpy as np

    if schedule == "seva":
        betas = (5e-3 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, _STEPS))) + 1e-5
    else:
        betas = np.linspace(1e-4, 0.02, _STEPS)
    share = float(np.cumprod(1 - betas)[step])
    return math.sqrt(share), math.sqrt(1 - share)


def on_pixels(image: "Image", *, step: int, seed: int) -> "Image":
    """The image with noise of DDPM's schedule on its own pixels."""
    import numpy as np
    import PIL.Image

    left, added = map(np.float64, kept(step, schedule="ddpm"))
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    noise = np.random.default_rng(seed).standard_normal(pixels.shape, dtype=np.float32)
    noisy = left * pixels + added * noise
    return PIL.Image.fromarray(((noisy.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8))


@dataclass(frozen=True, slots=True)
class Noise:
    """What an image is to have added once a processor has been over it."""

    step: int
    seed: int

    def on(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """`pixels` of any shape, in the processor's units, with noise of SeVa's schedule."""
        import torch

        left, added = kept(self.step, schedule="seva")
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(pixels.shape, generator=generator, dtype=torch.float32)
        return (left * pixels.float() + added * noise).to(pixels.dtype)


def marked(image: "Image", noise: Noise, *, pad: bool) -> "Image":
    """A copy of the image that a `NoisyProcessor` adds noise to.

    Args:
        image: the clean one.
        noise: what to add.
        pad: whether the model's images are made square, which would lose the mark; done here.
    """
    copy = (pad_to_square(image) if pad else image).copy()
    copy.info[_MARK] = noise
    return copy


class NoisyProcessor:
    """A model's processor that adds noise to the images that are `marked`."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *, images: "Sequence[Sequence[Image]] | None" = None, **options: Any) -> Any:
        """What the processor makes of it, `pixel_values` with noise.

        Raises:
            ValueError: which pixels are whose cannot be told; ask with one image at a time.
        """
        inputs = self._processor(images=images, **options)
        noises = [image.info.get(_MARK) for row in images or () for image in row]
        if not any(noises):
            return inputs
        pixels = inputs["pixel_values"]
        # Most processors stack images; some lay the patches of all of them in one row.
        parts = [pixels] if len(noises) == 1 else list(pixels)
        if len(parts) != len(noises):
            raise ValueError("the pixels of several images in one tensor")
        for part, noise in zip(parts, noises, strict=True):
            if noise is not None:
                part.copy_(noise.on(part))
        return inputs


def as_seen(image: "Image", processor: Any) -> "Image":
    """A marked image as the vision tower is given it, for people; others as they are.

    What noise drives beyond black and white is cut off, which the tower's pixels are not. Where a
    processor cuts images into patches, the noise is shown on the image's own pixels.
    """
    import numpy as np
    import PIL.Image
    import torch

    noise = image.info.get(_MARK)
    if noise is None:
        return image
    theirs = processor.image_processor
    mean, std = (
        torch.tensor(getattr(theirs, name, None) or [0.5] * 3)[:, None, None]
        for name in ("image_mean", "image_std")
    )
    pixels = theirs(images=[image], return_tensors="pt")["pixel_values"][0]
    if pixels.ndim != 3:
        pixels = (torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1) - mean) / std
    shown = ((noise.on(pixels) * std + mean).clamp(0, 1) * 255).round()
    return PIL.Image.fromarray(shown.permute(1, 2, 0).to(torch.uint8).numpy())
