"""Reasoning in the text of an answer: `<think>...</think>` is separated from the answer."""

from dataclasses import dataclass
from enum import StrEnum

_OPEN, _CLOSE = "<think>", "</think>"


class Thinking(StrEnum):
    """What is done with `<think>...</think>` in an answer before it is scored."""

    AUTO = "auto"
    """Cut it off where it is closed."""
    CUT = "cut"
    """Also cut off a block that is not closed, so that no answer is left."""
    KEEP = "keep"
    """Score the whole text."""


@dataclass(frozen=True, slots=True)
class SeparatedText:
    """The text of a response, separated into reasoning and answer."""

    answer: str
    reasoning: str
    answer_start: int
    """Offset of the answer in the text."""


def separate(text: str, mode: Thinking = Thinking.AUTO) -> SeparatedText:
    """Separate a leading block `<think>...</think>` from the answer.

    Chat templates may end the prompt with `<think>`, so that the text has only the closing mark.
    """
    if mode is Thinking.KEEP:
        return SeparatedText(text, "", 0)
    body = text.lstrip()
    head, mark, tail = text.partition(_CLOSE)
    if mark:
        answer = tail.lstrip()
        reasoning = head.strip().removeprefix(_OPEN).strip()
        return SeparatedText(answer, reasoning, len(text) - len(answer))
    if mode is Thinking.CUT and body.startswith(_OPEN):
        return SeparatedText("", body.removeprefix(_OPEN).strip(), len(text))
    return SeparatedText(text, "", 0)
