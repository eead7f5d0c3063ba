"""Outcomes of questions: an answer, or the reason why the endpoint's response is none."""

import re
from enum import StrEnum

_MAX_REASON = 200
_MAX_SHOWN = 300
_MAX_WORDINGS = 5
# Finish reasons of OpenAI's API, and those that gateways and other vendors send in its format.
_WITHHELD = {
    "content_filter": "content_filter", "content-filter": "content_filter",
    "safety": "content_filter", "sensitive": "content_filter",
    "refusal": "refusal",
    "error": "error", "abort": "error", "aborted": "error", "cancelled": "error",
    "timeout": "error",
}  # fmt: skip


class Outcome(StrEnum):
    """How a question ended."""

    ANSWERED = "answered"
    EMPTY = "empty"
    """The model ended its answer without any text: an answer, which scores as wrong."""
    LENGTH = "length"
    """No text before the token limit, as when a model spends all tokens on reasoning."""
    CONTENT_FILTER = "content_filter"
    """The answer was withheld, wholly or after its first words."""
    REFUSAL = "refusal"
    """The response has a refusal in the place of an answer."""
    TOOL_CALLS = "tool_calls"
    """The response calls tools that were not offered."""
    ERROR = "error"
    """The request failed: no connection, an HTTP status, a broken stream."""

    @property
    def is_answer(self) -> bool:
        """Whether the question has an answer; only then is it a success and scored."""
        return self in (Outcome.ANSWERED, Outcome.EMPTY)

    @property
    def is_timed(self) -> bool:
        """Whether the model generated to its end, so that the times are those of a full response.

        A refusal or a filtered answer is shorter than what was measured.
        """
        return self.is_answer or self is Outcome.LENGTH


def outcome_of(text: str, *, finish_reason: str | None, refusal: str = "") -> Outcome:
    """The outcome of a complete response.

    Args:
        text: the answer, without reasoning.
        finish_reason: as the endpoint reports it.
        refusal: content of the field `refusal` (OpenAI's chat completions).
    """
    finish = (finish_reason or "").lower()
    if finish in _WITHHELD:
        return Outcome(_WITHHELD[finish])
    if refusal:
        return Outcome.REFUSAL
    if text.strip():
        return Outcome.ANSWERED
    if finish in ("length", "max_tokens"):
        return Outcome.LENGTH
    if finish in ("tool_calls", "tool_use", "function_call"):
        return Outcome.TOOL_CALLS
    return Outcome.EMPTY


def error_kind(message: object) -> str:
    """An `error_message` without its details, so that similar errors are counted together."""
    return re.split(r"[(:']", str(message or ""), maxsplit=1)[0].strip()[:60] or "no reason given"


def shown_message(message: object) -> str:
    """An `error_message` as it is shown: in one line, bounded, without control characters.

    It comes from a server and could otherwise control a terminal.
    """
    printable = "".join(c if c.isprintable() else " " for c in str(message or ""))
    return " ".join(printable.split())[:_MAX_SHOWN]


class ErrorMessages:
    """The first `error_message` of each wording: words with digits, such as ids, make no other.

    Their number is bounded.
    """

    def __init__(self) -> None:
        self._by_wording: dict[str, str] = {}
        self._has_more = False

    def add(self, message: str) -> str | None:
        """The message as it is shown; None if one of this wording is known or there are many."""
        shown = shown_message(message)
        wording = re.sub(r"\S*\d\S*", "0", shown)
        if wording in self._by_wording:
            return None
        if len(self._by_wording) >= _MAX_WORDINGS:
            self._has_more = True
            return None
        self._by_wording[wording] = shown
        return shown

    def lines(self) -> list[str]:
        """The messages that say more than their kind."""
        shown = self._by_wording.values()
        lines = [text for text in shown if text != error_kind(text)]
        return [*lines, "further messages are in the results files"] if self._has_more else lines


def describe(outcome: Outcome, *, refusal: str = "") -> str:
    """The `error_message` of a response that is no answer."""
    reason = " ".join(refusal.split())[:_MAX_REASON]
    return {
        Outcome.LENGTH: "no answer before the token limit (finish_reason length)",
        Outcome.CONTENT_FILTER: "withheld by the content filter",
        Outcome.REFUSAL: f"refused to answer: {reason}" if reason else "refused to answer",
        Outcome.TOOL_CALLS: "tool calls instead of an answer",
        Outcome.ERROR: "the endpoint ended the answer with an error",
    }.get(outcome, "")
