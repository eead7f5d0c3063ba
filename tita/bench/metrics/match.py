"""Scores of one open answer against its references, each between 0 and 1."""

import re
from collections.abc import Sequence
from functools import lru_cache

from tita.data.normalise import normalise

_NUMBER = re.compile(r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?%?")


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference after EvalAI's normalisation."""
    return float(normalise(answer) in map(normalise, references))


def contains_match(answer: str, references: Sequence[str]) -> float:
    """1 if a reference stands in the answer as whole words, both normalised."""
    padded = f" {normalise(answer)} "
    return float(
        any(f" {normalise(reference)} " in padded for reference in references if reference)
    )


def ocr_vqa_match(answer: str, references: Sequence[str]) -> float:
    """OCR-VQA's exact match: equal but for case and outer space (Mishra et al., ICDAR 2019)."""
    plain = answer.strip().lower()
    return float(any(plain == reference.strip().lower() for reference in references))


def gqa_match(answer: str, references: Sequence[str]) -> float:
    """GQA's accuracy (arXiv 1902.09506) with LLaVA's conversion: lower case, no final period."""
    plain = answer.strip().rstrip(".").lower()
    return float(any(plain == reference.strip().lower() for reference in references))


def relaxed_match(answer: str, references: Sequence[str], *, tolerance: float = 0.05) -> float:
    """Relaxed accuracy of ChartQA (arXiv 2203.10244): numbers within 5 %, other text exactly."""
    return float(any(_relaxed(answer, reference, tolerance) for reference in references))


def _relaxed(answer: str, reference: str, tolerance: float) -> bool:
    wanted, got = _number(reference), _number(answer)
    if wanted is not None and got is not None:
        return abs(got - wanted) <= tolerance * abs(wanted)
    return answer.strip().rstrip(".").lower() == reference.strip().lower()


def _number(text: str) -> float | None:
    plain = text.strip().rstrip(".").replace(",", "").lower()
    if not _NUMBER.fullmatch(plain):
        return None
    return float(plain[:-1]) / 100 if plain.endswith("%") else float(plain)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Soft VQA accuracy: the mean over left-out annotators of min(1, matches among the rest / 3).

    Ten references are usual. Any other number, one included, follows the same formula, except that
    a single reference leaves no rest and so counts as an exact match. Source: VQA v2
    (arXiv 1612.00837), TextVQA (arXiv 1904.08920) and VizWiz (arXiv 1802.08218) evaluate so.
    """
    if not references:
        return 0.0
    return _soft_scores(tuple(references)).get(normalise(answer), 0.0)


@lru_cache(maxsize=1 << 14)
def _soft_scores(references: tuple[str, ...]) -> dict[str, float]:
    answers = [normalise(reference) for reference in references]
    if len(answers) == 1:
        return {answers[0]: 1.0}
    size = len(answers)
    scores = {}
    for answer in set(answers):
        count = answers.count(answer)
        # Leaving out one of the `count` who agree leaves count - 1 matches, else all of them.
        left_out = min(1.0, (count - 1) / 3)
        kept = min(1.0, count / 3)
        scores[answer] = (count * left_out + (size - count) * kept) / size
    return scores


def anls(answer: str, references: Sequence[str], *, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one question (ST-VQA, arXiv 1905.13648).

    1 - distance / length of the longer, for the best reference; below `threshold` it is 0.
    """
    return max((_similarity(answer, reference, threshold) for reference in references), default=0.0)


def _similarity(answer: str, reference: str, threshold: float) -> float:
    one, other = answer.lower().strip(), reference.lower().strip()
    longest = max(len(one), len(other))
    if not longest:
        return 1.0
    # The distance is at least the difference of the lengths.
    if 1 - abs(len(one) - len(other)) / longest < threshold:
        return 0.0
    similarity = 1 - edit_distance(one, other) / longest
    return similarity if similarity >= threshold else 0.0


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions between two strings."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(other, start=1):
            diagonal, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right)),
            )
    return row[-1]
