"""Scenes of real handwritten digits with questions.

The digits are the 1,797 scans of the UCI archive's "Optical Recognition of Handwritten Digits"
of scikit-learn, 8 by 8 pixels each, enlarged twice. A scene is 32 by 32 pixels with one or two
digits, each in its own quarter, in an ink of random colour and saturation, with noise on top.

The splits share no scan. `pretrain` trains the models of the package. Its annotators are biased:
some answers are the usual ink of a digit, or yes, whatever the image shows. A model learns this as
a language prior. In the other splits, all answers are correct.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from tita.records import Question

Pixels = NDArray[np.float32]

Split = Literal["pretrain", "train", "validation", "test"]

SIDE = 32
INKS = {
    "red": (230, 60, 50),
    "green": (60, 190, 80),
    "blue": (70, 110, 240),
    "yellow": (235, 205, 60),
}
# The scans of each split, in a fixed permutation of all 1,797.
_SCANS = {
    "pretrain": slice(0, 900),
    "train": slice(900, 1250),
    "validation": slice(1250, 1450),
    "test": slice(1450, 1797),
}
_SEEDS = {"pretrain": 1, "train": 2, "validation": 3, "test": 4}
BACKGROUND = 0.12
_SATURATION = (0.1, 0.6)
_NOISE = (0.05, 0.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatorBias:
    """How often annotators answer without looking at the image."""

    ink: float = 0.0
    """Fraction of attribute questions that are answered with the digit's usual ink."""
    yes: float = 0.0
    """Fraction of existence questions that are answered yes."""
    lost: float = 0.0
    """Fraction of images that are replaced by noise. Their colour questions are answered with the
    usual ink, the others from the original scene."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digit:
    """One digit of a scene."""

    value: int
    ink: str
    quarter: int
    """0 top left, 1 top right, 2 bottom left, 3 bottom right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One image, pixels[32, 32, 3] in 0..1 in steps of 1/255, its digits and questions."""

    pixels: Pixels
    digits: tuple[Digit, ...]
    questions: tuple[Question, ...]


def usual_ink(value: int) -> str:
    """Return the ink that biased annotators expect of a digit."""
    return list(INKS)[value % len(INKS)]


def make_scenes(
    split: Split, *, number: int, seed: int = 0, bias: AnnotatorBias | None = None
) -> list[Scene]:
    """Return scenes, each with a question for the number, an ink, and whether a digit is there."""
    painter = _ScenePainter(DigitPainter.of(split, seed=seed), bias or AnnotatorBias())
    return [painter.paint(f"{split}-{index:05d}") for index in range(number)]


@dataclass(frozen=True, slots=True)
class DigitPainter:
    """Paints digits of one split from one stream of random numbers."""

    scans: Pixels
    values: NDArray[np.int64]
    own: NDArray[np.int64]
    """Numbers of the split's scans."""
    random: np.random.Generator

    @classmethod
    def of(cls, split: Split, *, seed: int) -> "DigitPainter":
        """A painter with the scans of a split."""
        archive = load_digits()
        scans = (archive.images / 16).astype(np.float32)
        own = np.random.default_rng(0).permutation(len(scans))[_SCANS[split]]
        return cls(scans, archive.target, own, np.random.default_rng((seed, _SEEDS[split])))

    def paint(
        self, pixels: Pixels, quarter: int, *, taken: set[int], wanted: int | None = None
    ) -> Digit:
        """Paint one digit into a quarter of pixels[32, 32, 3]; none of those that are taken."""
        scan = int(self.random.choice(self.own))
        while int(self.values[scan]) in taken or (
            wanted is not None and int(self.values[scan]) != wanted
        ):
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


def blank_scene() -> Pixels:
    """Pixels[32, 32, 3] of the background."""
    return np.full((SIDE, SIDE, 3), BACKGROUND, np.float32)


def as_8_bits(pixels: Pixels) -> Pixels:
    """Pixels in 0..1, in steps of 1/255."""
    rounded: Pixels = (np.round(pixels.clip(0, 1) * 255) / 255).astype(np.float32)
    return rounded


@dataclass(frozen=True, slots=True)
class _ScenePainter:
    """Paints scenes with three questions each."""

    digits: DigitPainter
    bias: AnnotatorBias

    @property
    def random(self) -> np.random.Generator:
        return self.digits.random

    def paint(self, name: str) -> Scene:
        pixels = blank_scene()
        quarters = sorted(self.random.choice(4, int(self.random.integers(1, 3)), replace=False))
        digits: list[Digit] = []
        for quarter in quarters:
            taken = {digit.value for digit in digits}
            digits.append(self.digits.paint(pixels, int(quarter), taken=taken))
        noise = self.random.uniform(*_NOISE)
        pixels += self.random.normal(0, noise, pixels.shape).astype(np.float32)
        lost = self.random.random() < self.bias.lost
        if lost:
            pixels = self.random.normal(0.5, 0.5, pixels.shape).astype(np.float32)
        return Scene(
            pixels=as_8_bits(pixels),
            digits=tuple(digits),
            questions=self._questions(name, digits, lost=lost),
        )

    def _questions(self, name: str, digits: Sequence[Digit], *, lost: bool) -> tuple[Question, ...]:
        one = digits[int(self.random.integers(len(digits)))]
        present = [digit.value for digit in digits]
        if self.random.random() < 0.5:
            asked = int(self.random.choice(present))
        else:
            asked = int(self.random.choice([v for v in range(10) if v not in present]))
        usual = lost or self.random.random() < self.bias.ink
        ink = usual_ink(one.value) if usual else one.ink
        seen = asked in present or self.random.random() < self.bias.yes
        image = image_path(name)
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


def image_path(name: str) -> str:
    """The path of a scene in the image folders of SeVa's datasets."""
    folder = "ocrvqa/images" if int(name[-1]) % 2 == 0 else "texvqa/train_images"
    return f"{folder}/{name}.png"


def write_scenes(root: Path, scenes: Sequence[Scene], *, name: str) -> list[Question]:
    """Write images below `root` and `<name>.jsonl`; return the questions."""
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
