"""Negative images: for each pair an image under which its chosen answer is a worse one.

The choice depends on the seed and the pairs alone, so that the reference's log-probabilities under
negative images are cached like the others.
"""

import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
from PIL.Image import Image

from tita.data.balance import seeded_digest
from tita.data.digest_set import text_digest
from tita.data.shortcuts import question_kind
from tita.errors import TitaError
from tita.records import Pair
from tita.vlm.noise import add_pixel_noise

NegativeKind = Literal["other", "crop", "noise", "rejected_image"]

_NOISE_STEP = 500
"""Step of 1,000 of DDPM's schedule, as for VCD's distorted images (arXiv 2311.16922)."""
_CROP = 0.01, 0.2
"""Least and largest share of the image that a crop keeps (mDPO, arXiv 2406.11839, section 3.2)."""
_DRAWS = 100
"""After as many draws of the pair's own picture, the others are listed: most pairs show it."""


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


class NegativeRows(Sequence[Negative]):
    """The negative image of each pair, made when it is read: 4 bytes per pair."""

    def __init__(self, pairs: Sequence[Pair], *, kind: NegativeKind, values: Any) -> None:
        """`values[N]` are numbers of other pairs, or seeds of changes, whatever `kind` needs."""
        self._pairs, self._kind, self._values = pairs, kind, values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> Negative: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Negative]: ...
    def __getitem__(self, index: int | slice) -> Negative | Sequence[Negative]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        value = int(self._values[index])
        if self._kind == "other":
            return Negative(image=self._pairs[value].image)
        pair = self._pairs[index]
        if self._kind == "rejected_image":
            return Negative(image=str(pair.rejected_image))
        return Negative(image=pair.image, change=self._kind, seed=value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def choose_negatives(
    pairs: Sequence[Pair], *, kind: NegativeKind, digests: Mapping[str, str], seed: int
) -> Sequence[Negative]:
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
    values = np.zeros(len(pairs), dtype=np.uint32)
    if kind == "rejected_image":
        for pair in pairs:
            _check_rejected_image(pair, digests=digests)
        return NegativeRows(pairs, kind=kind, values=values)
    if kind != "other":
        for number, pair in enumerate(pairs):
            values[number] = _derive_seed(pair, seed=seed)
        return NegativeRows(pairs, kind=kind, values=values)
    kinds: dict[str, array[int]] = {}
    first: dict[str, str] = {}
    several: set[str] = set()
    pictures = array("Q")
    for number, pair in enumerate(pairs):
        name, digest = question_kind(pair.question), digests[pair.image]
        kinds.setdefault(name, array("I")).append(number)
        pictures.append(text_digest(digest))
        if first.setdefault(name, digest) != digest:
            several.add(name)
    if len(set(first.values())) == 1 and not several:
        raise TitaError(
            f"{len(pairs)} pairs show the same image, so there is no other one",
            where="recipe of train-dpo",
            remedy="add pairs with other images",
        )
    others: dict[tuple[str | None, int], Any] = {}
    """Candidates with other pictures, by kind of question and a picture that most of them show."""
    for number, pair in enumerate(pairs):
        name, picture = question_kind(pair.question), pictures[number]
        among = name if name in several else None
        candidates = range(len(pairs)) if among is None else kinds[among]
        choice = random.Random(_derive_seed(pair, seed=seed))
        drawn = (choice.choice(candidates) for _ in range(_DRAWS))
        other = next((other for other in drawn if pictures[other] != picture), None)
        if other is None:
            if (among, picture) not in others:
                others[among, picture] = _with_other_pictures(candidates, pictures, picture)
            other = choice.choice(others[among, picture])
        values[number] = other
    return NegativeRows(pairs, kind=kind, values=values)


def _with_other_pictures(candidates: Sequence[int], pictures: Sequence[int], picture: int) -> Any:
    numbers = np.asarray(candidates, dtype=np.uint32)
    return numbers[np.asarray(pictures, dtype=np.uint64)[numbers] != np.uint64(picture)]


def _check_rejected_image(pair: Pair, *, digests: Mapping[str, str]) -> None:
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
