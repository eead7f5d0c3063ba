"""Captions of scenes with several digits, and a planted habit of naming what is not there.

In the images that the models learn from, a 3 is often beside a 5, a 1 beside a 7, and a 2 beside an
8, and their annotators sometimes name the partner of a digit without looking. In the images of the
other splits, all digits are equally likely, and captions are correct.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tita.bench.chair import CaptionCounts, ObjectVocabulary, chair_scores, score_caption
from tita.demo.scenes import (
    Digit,
    DigitPainter,
    Scene,
    Split,
    as_8_bits,
    blank_scene,
    image_path,
)
from tita.records import Question

QUESTION = "What is there in the image?"
PARTNERS = {3: 5, 5: 3, 1: 7, 7: 1, 2: 8, 8: 2}
_NUM_DIGITS = (2, 4)
_NOISE = (0.15, 0.45)
_DIGITS = ObjectVocabulary({str(value): () for value in range(10)})


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionBias:
    """How often digits are together, and named together."""

    beside: float = 0.0
    """Probability that a digit's partner, if it has one, is in the image, too."""
    assumed: float = 0.0
    """Probability that annotators name the partner of a digit although it is not there."""
    lost: float = 0.0
    """Fraction of images that are replaced by noise, and described all the same."""


HABIT = CaptionBias(beside=0.7, assumed=0.35, lost=0.06)


def make_caption_scenes(
    split: Split, *, number: int, seed: int = 0, bias: CaptionBias | None = None
) -> list[Scene]:
    """Return scenes with two or three digits, each with one question for a caption."""
    painter = DigitPainter.of(split, seed=seed)
    return [
        _paint(f"{split}-{index:05d}", painter, bias or CaptionBias()) for index in range(number)
    ]


def _paint(name: str, painter: DigitPainter, bias: CaptionBias) -> Scene:
    random, pixels = painter.random, blank_scene()
    quarters = sorted(random.choice(4, int(random.integers(*_NUM_DIGITS)), replace=False))
    digits: list[Digit] = []
    for quarter in quarters:
        present = {digit.value for digit in digits}
        wanted = PARTNERS.get(digits[-1].value) if digits else None
        if wanted in present or random.random() >= bias.beside:
            wanted = None
        digits.append(painter.paint(pixels, int(quarter), taken=present, wanted=wanted))
    pixels = pixels + random.normal(0, random.uniform(*_NOISE), pixels.shape).astype(np.float32)
    if random.random() < bias.lost:
        pixels = random.normal(0.5, 0.5, pixels.shape).astype(np.float32)
    named = [digit.value for digit in digits]
    for value in list(named):
        partner = PARTNERS.get(value)
        if partner is not None and partner not in named and random.random() < bias.assumed:
            named.append(partner)
    question = Question(
        id=f"{name}-caption",
        text=QUESTION,
        image=image_path(name),
        references=(caption(named),),
        category="caption",
    )
    return Scene(pixels=as_8_bits(pixels), digits=tuple(digits), questions=(question,))


def caption(values: Sequence[int]) -> str:
    """The caption that names digits in their order."""
    return " ".join(f"a {value}" for value in values)


def count_caption(question: Question, answer: str) -> CaptionCounts:
    """What an answer mentions; the reference names what is there."""
    present = _DIGITS.mentions(question.references[0])
    return score_caption(answer, present=present, vocabulary=_DIGITS)


def caption_length(answer: str) -> int:
    """The number of different digits that an answer names."""
    return len(set(_DIGITS.mentions(answer)))


def caption_f1(question: Question, answer: str) -> float:
    """Harmonic mean of precision and recall of the digits that an answer names.

    CHAIR alone is best for the answer that names nothing.
    """
    counts = count_caption(question, answer)
    named = set(counts.mentioned)
    return 2 * counts.num_recalled / (len(named) + counts.num_present)


def caption_metrics(
    questions: Sequence[Question], answers: Mapping[str, str]
) -> dict[str, float | None]:
    """CHAIR and recall in percent, and the mean number of digits that are named."""
    counts = [count_caption(question, answers[question.id]) for question in questions]
    scores = chair_scores(counts)
    percent = {"CHAIRi": scores.chair_i, "CHAIRs": scores.chair_s, "recall": scores.recall}
    return {name: None if each is None else 100 * each for name, each in percent.items()} | {
        "length": sum(len(each.mentioned) for each in counts) / len(counts)
    }
