"""Yes/no questions: parsing answers, POPE's scores, MME's accuracy and accuracy+."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_WORDS = re.compile(r"[a-z']+")
_YES = frozenset(("yes", "yeah", "yep", "true", "correct"))
_NO = frozenset(("no", "not", "nope", "false", "isn't", "aren't", "doesn't", "don't"))


def parse_yes_no(answer: str) -> bool | None:
    """Yes is True, no is False, anything else None.

    The answer's first word decides when it is a yes or a no; else the first sentence does, if it
    holds one of the two and not both.
    """
    words = _WORDS.findall(answer.lower().replace("\u2019", "'"))
    if not words:
        return None
    if words[0] in ("yes", "no"):
        return bool(words[0] == "yes")
    sentence = re.split(r"[.!?\n]", answer.strip().lower().replace("\u2019", "'"), maxsplit=1)[0]
    found = set(_WORDS.findall(sentence))
    yes, no = bool(found & _YES), bool(found & _NO)
    return None if yes == no else yes


def parse_pope(answer: str) -> bool:
    """POPE's own rule: no if the first sentence has the word No, no or not, else yes.

    Source: `evaluate.py` of github.com/AoiDragon/POPE. It takes any chatter for a yes; use
    `parse_yes_no` to see how many answers are neither.
    """
    words = answer.split(".", maxsplit=1)[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class YesNoScores:
    """POPE's scores (arXiv 2305.10355) as fractions, yes the positive class; None if undefined."""

    num_questions: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    yes_ratio: float | None
    """Share of the *answers* that say yes; the labels have no part in it."""
    num_unparsed: int
    """Answers that are neither yes nor no. They count as wrong, and as no yes."""


def pope_scores(answers: Sequence[bool | None], labels: Sequence[bool]) -> YesNoScores:
    """Scores of parsed answers against labels of the same order.

    Raises:
        ValueError: the two are not equally long.
    """
    pairs = list(zip(answers, labels, strict=True))
    right = sum(answer is label for answer, label in pairs)
    hits = sum(answer is True and label for answer, label in pairs)
    said_yes = sum(answer is True for answer in answers)
    precision = _ratio(hits, said_yes)
    recall = _ratio(hits, sum(labels))
    return YesNoScores(
        num_questions=len(pairs),
        accuracy=_ratio(right, len(pairs)),
        precision=precision,
        recall=recall,
        f1=_f1(precision, recall),
        yes_ratio=_ratio(said_yes, len(pairs)),
        num_unparsed=sum(answer is None for answer in answers),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MmeScores:
    """MME's scores of one task (arXiv 2306.13394), in percent; `score` is their sum."""

    accuracy: float
    accuracy_plus: float
    """Share of images whose questions are all answered right."""

    @property
    def score(self) -> float:
        return self.accuracy + self.accuracy_plus


def parse_mme(answer: str) -> bool | None:
    """MME's own rule: yes or no within the first four characters.

    Source: `calculation.py` of MME's eval tool.
    """
    start = answer.strip().lower()[:4]
    if "yes" in start:
        return True
    return False if "no" in start else None


def mme_scores(right_by_image: Iterable[tuple[str, bool]]) -> MmeScores:
    """Scores of one task from (image, answered right) of each question; every image has two."""
    images: dict[str, list[bool]] = defaultdict(list)
    for image, right in right_by_image:
        images[image].append(right)
    if not images:
        return MmeScores(accuracy=0.0, accuracy_plus=0.0)
    answers = [right for rights in images.values() for right in rights]
    return MmeScores(
        accuracy=100 * sum(answers) / len(answers),
        accuracy_plus=100 * sum(map(all, images.values())) / len(images),
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _f1(precision: float | None, recall: float | None) -> float | None:
    if precision is None or recall is None:
        return None
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0
