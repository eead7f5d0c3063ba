"""The records that flow between jobs, one type each; other spellings are converted at the edge.

`Question` and `Pair` are what `tita.data` reads and writes. Images are named by paths relative
to the folder that their dataset lives in, with forward slashes.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question about one image, with reference answers where they are known."""

    id: str
    text: str
    image: str | None = None
    references: tuple[str, ...] = ()
    category: str | None = None
    """Kind of the question (`reading`, `existence`, ...): scores are reported by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One preference: for this image and question, `chosen` is better than `rejected`."""

    id: str
    image: str
    question: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgress:
    """How far a training run is: one of these a logging step, as a JSON line from rank 0."""

    step: int
    steps: int
    loss: float
    reward_margin: float
    """Mean of beta times the difference of the two log-ratios, chosen less rejected."""
    reward_accuracy: float
    """Share of pairs whose margin is above zero."""
    learning_rate: float
    samples_per_s: float
    """Pairs a second, of all ranks together."""
    seconds_left: float
    peak_memory_bytes: int
    tokens_per_s: float = 0.0
    """Of prompts and answers, image tokens included, padding not, of all ranks together."""
