"""Reference answers of a question, in the form that its metric compares with.

A reference that no answer can match under its metric is an error, not a question that every model
gets wrong.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from tita.bench.choice_answers import LETTERS
from tita.errors import TitaError

_TRUE = frozenset(("yes", "y", "true", "t", "1", "1.0"))
_FALSE = frozenset(("no", "n", "false", "f", "0", "0.0"))
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:answer|option|choice)\s*(?:is|:)?\s*)?[(\[]?([A-Za-z])[)\].:,]?", re.I
)
_LABELLED = re.compile(r"[(\[]?([A-Za-z])[)\].:]\s*(.+)", re.S)


class InvalidReference(TitaError):
    """A reference that no answer can match."""


def text_references(references: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
    """References of a metric that compares texts; empty texts are dropped.

    Raises:
        InvalidReference: all references are empty.
    """
    del choices
    kept = tuple(reference for reference in references if reference.strip())
    if not kept:
        raise InvalidReference(
            "the reference is empty", remedy="write the answer, or leave the reference out"
        )
    return kept


def annotator_references(references: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
    """References of a metric that counts annotators: empty answers count, but not alone.

    Raises:
        InvalidReference: all references are empty.
    """
    text_references(references, choices)
    return tuple(references)


def period_free_references(references: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
    """References of a metric that drops the answer's final period.

    Raises:
        InvalidReference: all references are empty.
    """
    dropped = [reference.strip().rstrip(".") for reference in references]
    return text_references(dropped, choices)


def yes_no_references(references: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
    """`yes` or `no`, from Yes, true, 1, No, false, 0 and the like.

    Raises:
        InvalidReference: a reference is none of them, or they disagree.
    """
    found = []
    for reference in text_references(references, choices):
        word = reference.strip().strip(".").lower()
        if word not in _TRUE | _FALSE:
            raise InvalidReference(
                f"the reference {reference[:60]!r} is neither yes nor no",
                remedy="write yes or no, or set another metric",
            )
        found.append("yes" if word in _TRUE else "no")
    if len(set(found)) > 1:
        raise InvalidReference("the references say both yes and no", remedy="keep one of them")
    return (found[0],)


def choice_references(references: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
    """Letters of the right options, from a letter, an option's text, or an index from 0.

    Accepted letters are `B`, `b`, `(B)`, `B.`, `option B` and `B. <text of B>`.

    Raises:
        InvalidReference: the question has no options, a reference names none of them, or it
            names one by its text and another by its letter or index.
    """
    if not choices:
        raise InvalidReference(
            "the question has no options", remedy="give them as `choices`, or set another metric"
        )
    if len(choices) == 1:
        raise InvalidReference(
            f"the question has the only option {choices[0][:40]!r}",
            remedy="give `choices` as a list of texts",
        )
    if len(choices) > len(LETTERS):
        raise InvalidReference(
            f"the question has {len(choices)} options", remedy=f"keep {len(LETTERS)} or fewer"
        )
    named = text_references(references, choices)
    found = [LETTERS[_option(reference.strip(), choices)] for reference in named]
    return tuple(dict.fromkeys(found))


def _option(reference: str, choices: Sequence[str]) -> int:
    """The index of the option that a reference names."""
    letters = LETTERS[: len(choices)]
    if reference and reference in letters:
        # The form of all published suites; it is never the text of an option.
        return letters.index(reference)
    same = {n for n, text in enumerate(choices) if _plain(text) == _plain(reference)}
    named = set()
    if reference.isascii() and re.fullmatch(r"\d+(?:\.0)?", reference):
        number = int(float(reference))
        if number < len(choices):
            named.add(number)
    elif letter := _LETTER.fullmatch(reference):
        if letter[1].upper() in letters:
            named.add(letters.index(letter[1].upper()))
    elif labelled := _LABELLED.fullmatch(reference):
        index = LETTERS.index(labelled[1].upper())
        if index < len(choices) and _plain(labelled[2]) == _plain(choices[index]):
            named.add(index)
    if len(same | named) == 1:
        return (same | named).pop()
    listed = zip(LETTERS, choices, strict=False)
    options = ", ".join(f"{letter} {text[:30]!r}" for letter, text in listed)
    how_many = "more than one" if same | named else "none"
    or_index = ", or its index counted from 0" if reference.isdigit() and not same else ""
    raise InvalidReference(
        f"the reference {reference[:60]!r} names {how_many} of the options {options[:200]}",
        remedy=f"write the option's letter{or_index}",
    )


def _plain(text: str) -> str:
    return " ".join(text.lower().strip().rstrip(".").split())


ReferenceRule = Callable[[Sequence[str], Sequence[str]], tuple[str, ...]]
"""References and options of a question -> the references in the metric's form."""


@lru_cache(maxsize=1 << 14)
def apply_rule(
    rule: ReferenceRule, references: tuple[str, ...], choices: tuple[str, ...]
) -> tuple[str, ...]:
    """The references in the metric's form, remembered: many questions share theirs.

    Raises:
        InvalidReference: no answer can match them.
    """
    return rule(references, choices)
