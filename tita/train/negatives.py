"""Negative images: for each pair an image under which its chosen answer is a worse one.

The choice depends on the seed and the pairs alone, so that the reference's log-probabilities under
negative images are cached like the others.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL.Image import Image

from tita.data.balance import seeded_digest
from tita.data.shortcuts import question_kind
from tita.errors import TitaError
from tita.records import Pair
from tita.vlm.noise import add_pixel_noise

NegativeKind = Literal["other", "crop", "noise", "rejected_image"]

_NOISE_STEP = 500
"""Step of 1,000 of DDPM's schedule, as for VCD's distorted images (arXiv 2311.16922)."""
_CROP = 0.01, 0.2
"""Least and largest share of the image that a crop keeps (mDPO, arXiv 2406.11839, section 3.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Negative:
    """The negative image of one pair."""

    image: str
    """Name of the file it is made from."""
    change: Literal["", "crop", "noise"] = ""
    """What is done to it; empty if nothing is."""
    seed: int = 0
    """Of the change."""

    @property
    def key(self) -> str:
        """Equal for equal images."""
        return f"{self.change}:{self.seed}:{self.image}" if self.change else self.image

    def apply(self, image: Image) -> Image:
        """The negative image, made from the image of the file; of the same size."""
        return _CHANGES[self.change](image, self.seed) if self.change else image


def choose_negatives(
    pairs: Sequence[Pair], *, kind: NegativeKind, digests: Mapping[str, str], seed: int
) -> tuple[Negative, ...]:
    """The negative image of each pair.

    `other` chooses among the images of pairs that ask the same kind of question, and among all if
    those show the same image.

    Args:
        pairs: the pairs; `other` is chosen among their images.
        kind: `image_preference.negative` of the recipe.
        digests: SHA-256 of each image by name; images with equal digests are the same picture.
        seed: of the recipe.

    Raises:
        TitaError: a pair has no other image.
    """
    if kind == "rejected_image":
        return tuple(_of_row(pair, digests=digests) for pair in pairs)
    if kind != "other":
        return tuple(
            Negative(image=pair.image, change=kind, seed=_derive_seed(pair, seed=seed))
            for pair in pairs
        )
    kinds: dict[str, list[Pair]] = {}
    for pair in pairs:
        kinds.setdefault(question_kind(pair.question), []).append(pair)
    several = {name for name, some in kinds.items() if _has_several(some, digests)}
    if not _has_several(pairs, digests):
        raise TitaError(
            f"{len(pairs)} pairs show the same image, so there is no other one",
            where="recipe of train-dpo",
            remedy="add pairs with other images",
        )
    found = []
    for pair in pairs:
        name = question_kind(pair.question)
        candidates = kinds[name] if name in several else pairs
        choice = random.Random(_derive_seed(pair, seed=seed))
        while digests[(other := choice.choice(candidates)).image] == digests[pair.image]:
            pass
        found.append(Negative(image=other.image))
    return tuple(found)


def _has_several(pairs: Sequence[Pair], digests: Mapping[str, str]) -> bool:
    return any(digests[pair.image] != digests[pairs[0].image] for pair in pairs)


def _of_row(pair: Pair, *, digests: Mapping[str, str]) -> Negative:
    fault = None
    if pair.rejected_image is None:
        fault = "has no `rejected_image`"
    elif digests[pair.rejected_image] == digests[pair.image]:
        fault = "has its own image as `rejected_image`"
    if fault or pair.rejected_image is None:
        raise TitaError(
            f"pair {pair.id!r} {fault}",
            where="recipe of train-dpo",
            remedy="fix the row, or --set image_preference.negative=other",
        )
    return Negative(image=pair.rejected_image)


def _derive_seed(pair: Pair, *, seed: int) -> int:
    return int.from_bytes(seeded_digest(pair, seed=seed)[:4])


def _crop(image: Image, seed: int) -> Image:
    """A random part of the image's shape with 1 to 20 % of its area, enlarged to its size."""
    generator = random.Random(seed)
    scale = generator.uniform(*_CROP) ** 0.5
    width, height = (max(1, round(scale * side)) for side in image.size)
    left = generator.randint(0, image.width - width)
    top = generator.randint(0, image.height - height)
    return image.resize(image.size, box=(left, top, left + width, top + height))


def _add_noise(image: Image, seed: int) -> Image:
    return add_pixel_noise(image, step=_NOISE_STEP, seed=seed)


_CHANGES: dict[str, Callable[[Image, int], Image]] = {"crop": _crop, "noise": _add_noise}
