"""Metrics of one answer, or of the parsed answers of a run: pure functions with their source.

Open answers: exact, contained, relaxed and soft matches, ANLS. Yes/no questions: parsing, POPE and
MME scores. Multiple choice: ScienceQA's parsing, MMBench's CircularEval. An empty answer is never
right.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tita.bench.choice_answers import LETTERS
from tita.data.normalise import comparable, normalise, normalise_official

_NUMBER = re.compile(r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?%?")


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference after EvalAI's normalisation.

    A text of which the normalisation leaves nothing, such as "A", is compared without it.
    """
    return float(comparable(answer) in map(comparable, references) and bool(answer.strip()))


def contains_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer contains a reference as whole words, both normalised as for `exact_match`."""
    return float(any(_contains(answer, text) for text in references))


def _contains(answer: str, reference: str) -> bool:
    if wanted := normalise(reference):
        return f" {wanted} " in f" {normalise(answer)} "
    # Only an article or punctuation is left: "A" is not the article in "a dog".
    words = [word.strip(".,:;!?\"'") for word in answer.split()]
    return bool(reference.strip()) and reference.strip() in words


def ocr_vqa_match(answer: str, references: Sequence[str]) -> float:
    """OCR-VQA's exact match: equal except for case and outer spaces (Mishra et al., ICDAR 2019)."""
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
    """Soft VQA accuracy: mean over left-out annotators of min(1, matches among the others / 3).

    Answer and references are normalised as EvalAI does, as in the evaluations of TextVQA
    (arXiv 1904.08920), VizWiz (arXiv 1802.08218) and LLaVA-1.5. Ten references are usual; other
    numbers follow the same formula, except that a single reference is an exact match.
    """
    return _soft_scores(tuple(map(normalise, references))).get(_not_empty(normalise(answer)), 0.0)


def vqa_official_accuracy(answer: str, references: Sequence[str]) -> float:
    """Soft accuracy as VQA v2's evaluation code computes it (arXiv 1612.00837).

    As `vqa_accuracy`, except that answer and references are compared unchanged, with their case,
    if the annotators are unanimous, and that otherwise digits with a comma between them change how
    punctuation is removed (github.com/GT-Vision-Lab/VQA, `vqaEval.py`).
    """
    given, wanted = _in_one_line(answer), tuple(map(_in_one_line, references))
    if len(set(wanted)) > 1:
        given, wanted = normalise_official(given), tuple(map(normalise_official, wanted))
    return _soft_scores(wanted).get(_not_empty(given), 0.0)


def _in_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _not_empty(answer: str) -> str | None:
    # An annotator's empty answer, or "a", is no reason to accept an empty one.
    return answer or None


@lru_cache(maxsize=1 << 14)
def _soft_scores(answers: tuple[str, ...]) -> dict[str | None, float]:
    if len(answers) == 1:
        return {answers[0]: 1.0}
    size = len(answers)
    scores: dict[str | None, float] = {}
    for answer in set(answers):
        count = answers.count(answer)
        # Leaving out one of the `count` annotators who agree leaves count - 1 matches, else count.
        left_out = min(1.0, (count - 1) / 3)
        kept = min(1.0, count / 3)
        scores[answer] = (count * left_out + (size - count) * kept) / size
    return scores


_MMMU_SENTENCE = re.compile(r"\n|\.\s(?=[A-Z])")
_MMMU_LEADS = (
    "could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ",
)  # fmt: skip
_MMMU_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def mmmu_open_match(answer: str, references: Sequence[str]) -> float:
    """MMMU's accuracy of open questions (arXiv 2311.16502, `eval_utils.py`).

    Of every sentence the text after the last lead ("so", "is", "=" in the last sentence) that
    leaves the least counts, and the numbers in it. A number must equal a reference rounded to two
    decimals, a text must contain one; a reference of one character must stand beside a space.
    """
    wanted = [form for reference in references for form in _mmmu_forms(reference)]
    for given in _mmmu_answers(answer):
        if isinstance(given, float):
            if given in wanted:
                return 1.0
        elif any(isinstance(form, str) and form in given for form in wanted):
            return 1.0
    return 0.0


def _mmmu_answers(answer: str) -> list[str | float]:
    plain = answer.strip().strip(".").lower()
    sentences = _MMMU_SENTENCE.split(plain)
    keys = []
    for number, sentence in enumerate(sentences, start=1):
        leads = (*_MMMU_LEADS, "=") if number == len(sentences) else _MMMU_LEADS
        rests = [sentence.split(lead)[-1].strip() for lead in leads if lead in sentence]
        # Of equally short rests the first counts; an empty one is replaced by the next.
        shortest = ""
        for rest in rests:
            if not shortest or len(rest) < len(shortest):
                shortest = rest
        if shortest and shortest not in set(":,.!?;'"):
            keys.append(shortest)
    keys = keys or [plain]
    numbers = [found for key in keys for form in _MMMU_NUMBERS for found in form.findall(key)]
    return [form for text in (*keys, *numbers) for form in _mmmu_forms(text)]


def _mmmu_forms(text: str) -> list[str | float]:
    plain = text.strip()
    try:
        return [round(float(plain.replace(",", "")), 2)]
    except ValueError:
        lower = plain.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


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
            row[j], diagonal = min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right)), row[j]
    return row[-1]


_SCIENCE_QA = re.compile(r"The answer is ([A-Z]).")


def parse_science_qa(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the chosen option by the rule that LLaVA scores ScienceQA with.

    The letter alone, "A. ..." at the start, or "The answer is A." once; otherwise None.
    Source: arXiv 2209.09513, `llava/eval/eval_science_qa.py`.
    """
    if answer[:1] in tuple(LETTERS[:5]) and (len(answer) == 1 or answer[1:3] == ". "):
        letter = answer[0]
    else:
        found = _SCIENCE_QA.findall(answer)
        letter = found[0] if len(found) == 1 else ""
    return LETTERS.index(letter) if letter and letter in LETTERS[: len(choices)] else None


def circular_accuracy(right_by_question: Iterable[tuple[str, bool]]) -> float | None:
    """MMBench's CircularEval (arXiv 2307.06281): a question is right if every rotation is.

    Args:
        right_by_question: (id of the unrotated question, answered right) of every rotation, with
            False for a rotation without an answer.
    """
    questions: dict[str, bool] = defaultdict(lambda: True)
    for question, right in right_by_question:
        questions[question] &= right
    return sum(questions.values()) / len(questions) if questions else None


_WORDS = re.compile(r"[a-z']+")
_YES = frozenset(("yes", "yeah", "yep", "true", "correct"))
_NO = frozenset(("no", "not", "nope", "false", "isn't", "aren't", "doesn't", "don't"))


def parse_yes_no(answer: str) -> bool | None:
    """Yes is True, no is False, anything else None.

    The first word decides if it is yes or no; otherwise the first sentence, if it contains one of
    the two and not both.
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

    Source: `evaluate.py` of github.com/AoiDragon/POPE. Every answer that is not a no counts as a
    yes; `parse_yes_no` shows how many answers are neither.
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
    """Fraction of the *answers* that are yes, regardless of the labels."""


def pope_scores(answers: Sequence[bool | None], labels: Sequence[bool]) -> YesNoScores:
    """Scores of parsed answers against labels in the same order.

    An unparsed answer, None, counts as wrong and not as yes.

    Raises:
        ValueError: `answers` and `labels` differ in length.
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
    )


MME_QUESTIONS_PER_IMAGE = 2


def parse_mme(answer: str) -> bool | None:
    """MME's own rule: yes or no within the first four characters.

    Source: `calculation.py` of MME's eval tool.
    """
    start = answer.strip().lower()[:4]
    if "yes" in start:
        return True
    return False if "no" in start else None


def mme_scores(right_by_image: Iterable[tuple[str, bool | None]]) -> dict[str, float]:
    """MME's scores of one task (arXiv 2306.13394), in percent.

    Args:
        right_by_image: (image, answered right) of each question, two per image; None for a
            question without an answer.

    Returns:
        `accuracy`, of the answered questions; `accuracy_plus`, the share of images whose two
        questions are both answered right; and `score`, their sum.
    """
    images: dict[str, list[bool | None]] = defaultdict(list)
    for image, right in right_by_image:
        images[image].append(right)
    answers = [right for rights in images.values() for right in rights if right is not None]
    num_right = sum(
        len(rights) >= MME_QUESTIONS_PER_IMAGE and all(rights) for rights in images.values()
    )
    accuracy = _ratio(100 * sum(answers), len(answers)) or 0.0
    plus = _ratio(100 * num_right, len(images)) or 0.0
    return {"score": accuracy + plus, "accuracy": accuracy, "accuracy_plus": plus}


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _f1(precision: float | None, recall: float | None) -> float | None:
    if precision is None or recall is None:
        return None
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0
