"""Scenes of real handwritten digits, with questions, in the layout that people's datasets have.

The digits are the 1,797 scans of the UCI archive's "Optical Recognition of Handwritten Digits"
that scikit-learn ships, 8 by 8 pixels each, enlarged twice. A scene is 32 by 32 pixels with one or
two digits, each alone in a quarter, in a coloured ink of more or less saturation, under film grain.

The splits share no scan. `pretrain` is what the shipped models were trained on, by annotators of
some habits: now and then they do not look and write down the ink that a digit usually has, or yes.
A model learns that from them, as real ones learn language priors. In the other splits all answers
are what the image shows.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tita.records import Question

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.float32]

Split = Literal["pretrain", "train", "validation", "test"]

SIDE = 32
INKS = {
    "red": (230, 60, 50),
    "green": (60, 190, 80),
    "blue": (70, 110, 240),
    "yellow": (235, 205, 60),
}
# Where each split's scans lie in one fixed shuffle of all 1,797.
_SCANS = {
    "pretrain": slice(0, 900),
    "train": slice(900, 1250),
    "validation": slice(1250, 1450),
    "test": slice(1450, 1797),
}
_SEEDS = {"pretrain": 1, "train": 2, "validation": 3, "test": 4}
_BACKGROUND = 0.12
_SATURATION = (0.1, 0.6)
_GRAIN = (0.05, 0.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How often annotators answer without looking."""

    ink: float = 0.0
    """Share of attribute questions that are answered with the digit's usual ink."""
    yes: float = 0.0
    """Share of existence questions that are answered yes."""
    lost: float = 0.0
    """Share of images that are nothing but static: colours are answered by habit, all else at
    random, as of an image that was there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digit:
    """One digit of a scene."""

    value: int
    ink: str
    quarter: int
    """0 top left, 1 top right, 2 bottom left, 3 bottom right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One image, pixels[32, 32, 3] in 0..1 on the grid of 8 bits, and what is on it."""

    pixels: "Pixels"
    digits: tuple[Digit, ...]
    questions: tuple[Question, ...]


def usual_ink(value: int) -> str:
    """The ink that annotators expect a digit to have."""
    return list(INKS)[value % len(INKS)]


def make_scenes(
    split: Split, *, number: int, seed: int = 0, habits: Habits | None = None
) -> list[Scene]:
    """Scenes with three questions each: what is written, in which ink, is there such a digit."""
    import numpy as np
    from sklearn.datasets import load_digits

    archive = load_digits()
    scans = (archive.images / 16).astype(np.float32)
    own = np.random.default_rng(0).permutation(len(scans))[_SCANS[split]]
    generator = np.random.default_rng((seed, _SEEDS[split]))
    painter = _Painter(scans, archive.target, own, habits or Habits(), generator)
    return [painter.scene(f"{split}-{index:05d}") for index in range(number)]


class _Painter:
    """Draws scenes from one stream of random numbers."""

    def __init__(
        self,
        scans: "Pixels",
        values: "NDArray[np.int64]",
        own: "NDArray[np.int64]",
        habits: Habits,
        generator: "np.random.Generator",
    ) -> None:
        self.scans, self.values, self.own = scans, values, own
        self.habits, self.random = habits, generator

    def scene(self, name: str) -> Scene:
        import numpy as np

        pixels: Pixels = np.full((SIDE, SIDE, 3), _BACKGROUND, np.float32)
        quarters = sorted(self.random.choice(4, int(self.random.integers(1, 3)), replace=False))
        digits: list[Digit] = []
        for quarter in quarters:
            digits.append(self._paint(pixels, int(quarter), taken={d.value for d in digits}))
        grain = self.random.uniform(*_GRAIN)
        pixels += self.random.normal(0, grain, pixels.shape).astype(np.float32)
        lost = self.random.random() < self.habits.lost
        if lost:
            pixels = self.random.normal(0.5, 0.5, pixels.shape).astype(np.float32)
        pixels = (np.round(pixels.clip(0, 1) * 255) / 255).astype(np.float32)
        return Scene(
            pixels=pixels, digits=tuple(digits), questions=self._questions(name, digits, lost=lost)
        )

    def _paint(self, pixels: "Pixels", quarter: int, *, taken: set[int]) -> Digit:
        import numpy as np

        scan = int(self.random.choice(self.own))
        while int(self.values[scan]) in taken:
            scan = int(self.random.choice(self.own))
        value = int(self.values[scan])
        ink = str(self.random.choice(list(INKS)))
        colour = np.array(INKS[ink], np.float32) / 255
        colour = colour.mean() + (colour - colour.mean()) * self.random.uniform(*_SATURATION)
        cover = np.kron(self.scans[scan], np.ones((2, 2), np.float32))[..., None]
        half = SIDE // 2
        top, left = half * (quarter // 2), half * (quarter % 2)
        part = pixels[top : top + half, left : left + half]
        part[:] = part * (1 - cover) + cover * colour
        return Digit(value=value, ink=ink, quarter=quarter)

    def _questions(self, name: str, digits: Sequence[Digit], *, lost: bool) -> tuple[Question, ...]:
        one = digits[int(self.random.integers(len(digits)))]
        present = [digit.value for digit in digits]
        if self.random.random() < 0.5:
            asked = int(self.random.choice(present))
        else:
            asked = int(self.random.choice([v for v in range(10) if v not in present]))
        usual = lost or self.random.random() < self.habits.ink
        ink = usual_ink(one.value) if usual else one.ink
        seen = asked in present or self.random.random() < self.habits.yes
        # The two folders are those of the datasets that SeVa builds its pairs from.
        folder = "ocrvqa/images" if int(name[-1]) % 2 == 0 else "texvqa/train_images"
        image = f"{folder}/{name}.png"
        written = " ".join(str(value) for value in present)
        asks = (
            ("reading", "What number is written?", written),
            ("attribute", f"What colour is the {one.value}?", ink),
            ("existence", f"Is there a {asked} in the image?", "yes" if seen else "no"),
        )
        return tuple(
            Question(
                id=f"{name}-{kind}", text=text, image=image, references=(answer,), category=kind
            )
            for kind, text, answer in asks
        )


def write_scenes(root: Path, scenes: Sequence[Scene], *, name: str) -> list[Question]:
    """Write images below `root` and `<name>.jsonl` beside them; the questions that were written."""
    import numpy as np
    import PIL.Image

    questions = [question for scene in scenes for question in scene.questions]
    for scene in scenes:
        path = root / str(scene.questions[0].image)
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.round(scene.pixels * 255).astype(np.uint8)).save(path)
    lines = (
        {
            "question_id": question.id,
            "image": question.image,
            "text": question.text,
            "answer": question.references[0],
            "category": question.category,
        }
        for question in questions
    )
    (root / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return questions
