"""Conversations as columns: TRL's and LLaVA's, to one question and its answers.

TRL (huggingface.co/docs/trl/dataset_formats): `prompt`, `chosen` and `rejected` are lists of
`{"role", "content"}`; without a `prompt` the two answers begin with it (an *implicit* prompt);
content is text or a list of parts. LLaVA: `conversations` is a list of `{"from", "value"}`, and
`<image>` stands in the text where the image was.
"""

from collections.abc import Mapping
from typing import Any

from tita.errors import TitaError

Turn = tuple[str, str]
"""Role and text."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
IMAGE_MARK = "<image>"


def is_conversation(value: Any) -> bool:
    """Whether a column holds messages, not text."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping)


def turns_of(value: Any, *, field: str, where: str) -> list[Turn]:
    """The messages of a column; one alone need not stand in a list.

    Raises:
        TitaError: a message without role or text, or of a role that has no place here.
    """
    messages = value if isinstance(value, list) else [value]
    return [_turn(message, field=field, where=where) for message in messages]


def split_answer(turns: list[Turn], *, field: str, where: str) -> tuple[list[Turn], str]:
    """What comes before the answer, and the answer.

    Raises:
        TitaError: the assistant does not have the last word.
    """
    if not turns or turns[-1][0] != "assistant":
        raise TitaError(
            f"{field!r} does not end with the assistant's message",
            where=where,
            remedy="end it with the answer",
        )
    return turns[:-1], turns[-1][1]


def question_in(turns: list[Turn], *, field: str, where: str) -> str:
    """The question of a prompt with nothing else in it.

    Raises:
        TitaError: several turns, which have no place in a pair of one question.
    """
    if len(turns) != 1 or turns[0][0] != "user":
        raise TitaError(
            f"{field!r} holds {len(turns)} messages, not one question",
            where=where,
            remedy="keep the user's message alone",
        )
    return turns[0][1]


def without_mark(text: str) -> str:
    """The text without `<image>` before or after it: every model's template sets its own."""
    stripped = text.strip()
    while stripped.startswith(IMAGE_MARK) or stripped.endswith(IMAGE_MARK):
        stripped = stripped.removeprefix(IMAGE_MARK).removesuffix(IMAGE_MARK).strip()
    return stripped if IMAGE_MARK in text else text


def _turn(message: Any, *, field: str, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise TitaError(
            f"{field!r} holds something that is no message",
            where=where,
            remedy='write {"role": ..., "content": ...}',
        )
    said = message.get("role") or message.get("from")
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise TitaError(
            f"{field!r} holds a message of role {said!r}",
            where=where,
            remedy="keep those of user and assistant",
        )
    content = message.get("content") if message.get("content") is not None else message.get("value")
    return role, _text_in(content, field=field, where=where)


def _text_in(content: Any, *, field: str, where: str) -> str:
    """The text of a message's content: plain, or all text parts of a list."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, Mapping)]
        texts = [str(part["text"]) for part in parts if part.get("text")]
        content = "\n".join(texts) if len(parts) == len(content) else None
    if not isinstance(content, str):
        raise TitaError(
            f"{field!r} holds a message without text", where=where, remedy="give it its content"
        )
    return content
