"""Shortcuts in preference pairs: how well chosen and rejected are told apart without the image.

A model that is trained on pairs with a shortcut may learn the shortcut, and not to look: mDPO calls
it unconditional preference (arXiv 2406.11839).
"""

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from tita.data.normalise import normalise
from tita.records import Pair
from tita.terminal import say

T = TypeVar("T")

MAX_ACCURACY = 0.6
"""A text-only classifier that is right on more of the pairs is a reason for a warning; 0.5 is
chance."""
SHORT = 3
"""Maximum number of words of a short answer, after `normalise`."""
_SAMPLE = 5_000
_MIN_QUESTIONS = 40
_FOLDS = 5
_Z = 1.96
_MAX_WORDS = 400
_BALANCE = "with --set balance=answers, or "
_NUM_WORST = 3
_NUM_ANSWERS = 6
_QUESTION_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SideCounts:
    """How often a word or a short answer is on one side of a pair only."""

    text: str
    kind: str = ""
    """Kind of the questions (`question_kind`); empty for all."""
    chosen: int
    rejected: int

    @property
    def skew(self) -> float:
        """Standard deviations from equal counts."""
        return abs(self.chosen - self.rejected) / math.sqrt(max(1, self.chosen + self.rejected))


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How often a text-only classifier finds the chosen answer of held-out pairs."""

    share: float
    """From 0 to 1; ties count one half."""
    low: float
    """Lower end of the 95 % interval, with as many observations as questions."""
    high: float
    kind: str = ""
    """Kind of the questions (`question_kind`); empty for all."""

    def __str__(self) -> str:
        kind = f" to {self.kind!r}" if self.kind else ""
        return f"{self.share:.0%} ({self.low:.0%} to {self.high:.0%}) of the pairs{kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortcuts:
    """What tells chosen from rejected answers without the image."""

    num_pairs: int
    """Number of pairs that were examined."""
    num_questions: int
    accuracy: Accuracy | None
    """Of a text-only classifier; None for fewer than 40 questions."""
    worst: Accuracy | None
    """The same for the kind of question with at least 40 questions where it is highest."""
    longer: float
    """Share of pairs whose chosen answer has more words, ties as one half."""
    short: tuple[float, float]
    """Share of short answers among the chosen and among the rejected ones."""
    answers: tuple[SideCounts, ...]
    """The most skewed short answers by kind of question."""
    words: tuple[SideCounts, ...]
    """The three most skewed words."""

    def describe(self) -> str:
        """Figures in one line."""
        parts = [f"{self.num_questions} questions are too few for a text-only classifier"]
        if self.accuracy is not None:
            parts = [f"without the image a classifier tells apart {self.accuracy}, 50% is chance"]
        if self.worst is not None and self.worst.kind:
            parts.append(f"{self.worst}")
        parts.append(f"chosen is longer in {self.longer:.0%}")
        parts.append(
            f"{self.short[0]:.0%} of chosen and {self.short[1]:.0%} of rejected answers are short"
        )
        parts += [_counts(each) for each in self.answers[:_NUM_WORST]]
        return "; ".join(parts)

    def warning(self, *, balanced: bool = False) -> str | None:
        """A warning with the three worst words; None if there is no reason for one.

        There is one if the lower end of an interval is above `MAX_ACCURACY`.

        Args:
            balanced: the pairs are what `balance` left.
        """
        found = (self.accuracy, self.worst)
        reason = next((each for each in found if each and each.low > MAX_ACCURACY), None)
        if reason is None:
            return None
        words = ", ".join(_counts(each) for each in self.words)
        return (
            f"warning: {reason} are told apart without the image, so that a model may learn to "
            f"answer without looking ({words}); train {'' if balanced else _BALANCE}on pairs "
            "whose answers differ only in what the image shows"
        )

    def report(self, *, balanced: bool = False) -> None:
        """Print the figures, and the warning if there is one."""
        say(self.describe())
        if warning := self.warning(balanced=balanced):
            say(warning)

    def as_json(self) -> dict[str, Any]:
        """The figures for `lineage.json`, `run.json` and scripts."""
        return {
            "num_pairs": self.num_pairs,
            "num_questions": self.num_questions,
            "accuracy": self.accuracy and asdict(self.accuracy),
            "worst": self.worst and asdict(self.worst),
            "longer": self.longer,
            "short": {"chosen": self.short[0], "rejected": self.short[1]},
            "answers": [
                {"answer": a.text, "kind": a.kind, "chosen": a.chosen, "rejected": a.rejected}
                for a in self.answers
            ],
            "words": [
                {"word": w.text, "chosen": w.chosen, "rejected": w.rejected} for w in self.words
            ],
        }


def _counts(side: SideCounts) -> str:
    kind = f" to {side.kind!r}" if side.kind else ""
    return f"{side.text!r}{kind}: {side.chosen:,} chosen, {side.rejected:,} rejected"


@dataclass(slots=True)
class PairSample(Generic[T]):
    """A random sample of at most 5,000 pairs of a stream, or of their numbers.

    It is the same for streams of the same length.
    """

    pairs: list[T] = field(default_factory=list)
    num_seen: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, pair: T) -> None:
        """Add a pair; it may replace another one (Vitter's algorithm R)."""
        self.num_seen += 1
        if len(self.pairs) < _SAMPLE:
            self.pairs.append(pair)
        elif (place := self._random.randrange(self.num_seen)) < _SAMPLE:
            self.pairs[place] = pair


def question_kind(question: str) -> str:
    """The first two words of a question in lower case, as in VQA's question types ("how many")."""
    return " ".join(_QUESTION_WORD.findall(question.lower())[:2])


def short_answer(answer: str) -> str | None:
    """The answer after `normalise` if it is short, else None."""
    found = normalise(answer) or answer.strip().casefold()
    return found if len(found.split()) <= SHORT else None


def measure_shortcuts(pairs: Sequence[Pair]) -> Shortcuts | None:
    """Measure what tells the answers of pairs apart without the image; None without pairs.

    More than 5,000 pairs are sampled. It takes seconds.
    """
    sample = PairSample[int]()
    for number in range(len(pairs)):
        sample.add(number)
    found = [pairs[number] for number in sample.pairs]
    if not found:
        return None
    groups = _question_numbers(found)
    accuracy, worst, num_questions = None, None, max(groups) + 1
    if num_questions >= _MIN_QUESTIONS:
        accuracy, *kinds = _accuracies(found, groups)
        worst = max(kinds, key=lambda each: each.low, default=None)
    sizes = [(len(pair.chosen.split()), len(pair.rejected.split())) for pair in found]
    shorts = [(short_answer(pair.chosen), short_answer(pair.rejected)) for pair in found]
    return Shortcuts(
        num_pairs=len(found),
        num_questions=num_questions,
        accuracy=accuracy,
        worst=worst,
        longer=sum((a > b) + 0.5 * (a == b) for a, b in sizes) / len(found),
        short=(
            sum(chosen is not None for chosen, _ in shorts) / len(found),
            sum(rejected is not None for _, rejected in shorts) / len(found),
        ),
        answers=_most_skewed(_answer_sides(found, shorts), number=_NUM_ANSWERS),
        words=_most_skewed(_word_sides(found), number=_NUM_WORST),
    )


Side = tuple[tuple[str, str], bool]
"""Text and kind of question, and whether the text is in the chosen answer."""


def _answer_sides(
    pairs: Sequence[Pair], shorts: Sequence[tuple[str | None, str | None]]
) -> Iterator[Side]:
    for pair, (chosen, rejected) in zip(pairs, shorts, strict=True):
        kind = question_kind(pair.question)
        if chosen != rejected:
            if chosen is not None:
                yield (chosen, kind), True
            if rejected is not None:
                yield (rejected, kind), False


def _word_sides(pairs: Sequence[Pair]) -> Iterator[Side]:
    for pair in pairs:
        chosen, rejected = set(_words(pair.chosen)), set(_words(pair.rejected))
        for word in chosen ^ rejected:
            yield (word, ""), word in chosen


def _most_skewed(sides: Iterable[Side], *, number: int) -> tuple[SideCounts, ...]:
    counts = Counter(sides)
    names = sorted({name for name, _ in counts})
    found = (
        SideCounts(
            text=text,
            kind=kind,
            chosen=counts[(text, kind), True],
            rejected=counts[(text, kind), False],
        )
        for text, kind in names
    )
    return tuple(sorted(found, key=lambda side: -side.skew)[:number])


def _question_numbers(pairs: Sequence[Pair]) -> list[int]:
    """A number per pair, equal for pairs of one question about one image."""
    numbers: dict[tuple[Any, ...], int] = {}
    return [
        numbers.setdefault((pair.image, pair.question, pair.context), len(numbers))
        for pair in pairs
    ]


def _accuracies(pairs: Sequence[Pair], groups: Sequence[int]) -> Iterator[Accuracy]:
    """Over all pairs, then for each kind of question with enough questions."""
    hits = _held_out_hits(pairs, groups)
    kinds: dict[str, list[int]] = {"": list(range(len(pairs)))}
    for index, pair in enumerate(pairs):
        if kind := question_kind(pair.question):
            kinds.setdefault(kind, []).append(index)
    for kind, indices in kinds.items():
        number = len({groups[index] for index in indices})
        if number >= _MIN_QUESTIONS:
            share = sum(hits[index] for index in indices) / len(indices)
            low, high = _wilson(share, number)
            yield Accuracy(share=share, low=low, high=high, kind=kind)


def _held_out_hits(pairs: Sequence[Pair], groups: Sequence[int]) -> list[float]:
    """1 for each pair whose chosen answer is found by a cross-validated classifier, 0.5 for ties.

    It is a logistic regression on the difference of the answers' features; pairs of one question
    are in one fold.
    """
    # A second of imports, which only those who measure need.
    import numpy as np
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.linear_model import SGDClassifier
    from sklearn.model_selection import GroupKFold

    hasher = FeatureHasher(n_features=1 << 18, input_type="pair", alternate_sign=False)
    chosen, rejected = (
        hasher.transform(_features(pair, getattr(pair, side)) for pair in pairs)
        for side in ("chosen", "rejected")
    )
    difference = (chosen - rejected).tocsr()
    # Half of the pairs are turned around, because a classifier needs two classes.
    signs = np.where(np.random.default_rng(0).random(len(pairs)) < 0.5, -1.0, 1.0)
    scores = np.zeros(len(pairs))
    for learned, held_out in GroupKFold(_FOLDS, shuffle=True, random_state=0).split(
        difference, groups=groups
    ):
        model = SGDClassifier(
            loss="log_loss",
            fit_intercept=False,
            average=True,
            max_iter=20,
            tol=None,
            random_state=0,
        )
        turned = difference[learned].multiply(signs[learned, None]).tocsr()
        if len(set(signs[learned])) == 2:
            model.fit(turned, signs[learned])
            scores[held_out] = model.decision_function(difference[held_out])
    return list(map(float, (scores > 0) + 0.5 * (scores == 0)))


def _features(pair: Pair, answer: str) -> Iterator[tuple[str, float]]:
    words, kind = _words(answer), question_kind(pair.question)
    for word in dict.fromkeys(words):
        yield word, 1.0
        yield f"{kind}\t{word}", 1.0
    if len(words) <= SHORT:
        yield f"{pair.question}\t{' '.join(words)}", 1.0
    yield "\twords", len(words) / 20


def _words(answer: str) -> list[str]:
    return (normalise(answer) or answer.strip().casefold()).split()[:_MAX_WORDS]


def _wilson(share: float, number: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `number` observations (Wilson, 1927)."""
    squared = _Z**2 / number
    centre = (share + squared / 2) / (1 + squared)
    half = _Z / (1 + squared) * (share * (1 - share) / number + squared / (4 * number)) ** 0.5
    return centre - half, centre + half
