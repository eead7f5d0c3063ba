"""Multiple choice: the option that an answer means; MMBench's circular evaluation."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

LETTERS = "ABCDEFGHIJ"

_SCIENCE_QA = re.compile(r"The answer is ([A-Z]).")
_FIRST_LETTER = re.compile(r"^\s*[(\[]?([A-Z])(?:[)\].:,]|\s*$)")
_LONE_LETTER = re.compile(r"(?<![A-Za-z'])\(?([A-Z])\)?(?![A-Za-z'])")


def parse_science_qa(answer: str, *, num_choices: int) -> int | None:
    """Index of the chosen option by the rule that LLaVA scores ScienceQA with.

    The letter alone, "A. ..." at the start, or one "The answer is A."; all else is None.
    Source: arXiv 2209.09513, `llava/eval/eval_science_qa.py`.
    """
    if answer[:1] in tuple(LETTERS[:5]) and (len(answer) == 1 or answer[1:3] == ". "):
        letter = answer[0]
    else:
        found = _SCIENCE_QA.findall(answer)
        letter = found[0] if len(found) == 1 else ""
    return LETTERS.index(letter) if letter and letter in LETTERS[:num_choices] else None


def parse_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the option that the answer names by letter or by its text, or None.

    The heuristic matching of MMBench (arXiv 2307.06281): a letter at the start, else the only
    option letter that stands alone, else the only option whose text the answer holds.
    """
    letters = LETTERS[: len(choices)]
    start = _FIRST_LETTER.match(answer)
    if start and start[1] in letters:
        return letters.index(start[1])
    lone = {letter for letter in _LONE_LETTER.findall(answer) if letter in letters}
    # "A" and "I" are words too: only a short answer may mean them as options.
    if len(answer.split()) > 5:
        lone -= {"A", "I"}
    if len(lone) == 1:
        return letters.index(lone.pop())
    plain = answer.lower()
    held = [index for index, text in enumerate(choices) if text and text.lower() in plain]
    if len(held) > 1:
        # An option that is part of another that is held as well says nothing.
        held = [i for i in held if not any(_within(choices[i], choices[j]) for j in held if j != i)]
    return held[0] if len(held) == 1 else None


def _within(part: str, whole: str) -> bool:
    return part.lower() != whole.lower() and part.lower() in whole.lower()


def circular_accuracy(right_by_question: Iterable[tuple[str, bool]]) -> float | None:
    """MMBench's CircularEval (arXiv 2307.06281): a question is right if all its rotations are.

    Args:
        right_by_question: (id of the unrotated question, answered right) of every rotation.
    """
    questions: dict[str, bool] = defaultdict(lambda: True)
    for question, right in right_by_question:
        questions[question] &= right
    return sum(questions.values()) / len(questions) if questions else None
