"""One row's object to one record: every field by the names that it goes by."""

from collections.abc import Callable, Mapping
from pathlib import PureWindowsPath
from typing import Any

from tita.data.rows import Row
from tita.errors import TitaError
from tita.records import Pair, Question
from tita.storage.manifest import is_inside

# LLaVA's question files, POPE's, SeVa's pair files, TRL's columns, Hugging Face's image folders.
_ID = ("id", "question_id")
_IMAGE = ("image", "image_id", "images", "file_name")
_QUESTION = ("question", "prompt", "text", "conversations")
_REFERENCES = ("references", "answers", "answer", "label")
_REJECTED = ("rejected", "reject")

_MAX_NAME_BYTES = 255

Picture = str | bytes
"""An image as a row has it: a path relative to the images' folder, or the file's bytes."""
Place = Callable[[Picture, Row], str]
"""Finds or makes the file of a picture, and says its name."""


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row is a pair; all others are questions."""
    return _first(row, ("chosen", *_REJECTED)) is not None or "chosen" in row


def question_of(row: Row, *, place: Place) -> Question:
    """A row as a question.

    Raises:
        TitaError: something is missing or does not fit; names the row.
    """
    values = row.read()
    references = _first(values, _REFERENCES)
    text, answer = _asked(values, where=row.where)
    known = answer if references is None else references
    many = known if isinstance(known, list) else [known]
    picture = _picture(values, where=row.where)
    category = values.get("category")
    return Question(
        id=_id(values, row=row),
        text=text,
        image=None if picture is None else place(picture, row),
        references=tuple(str(one) for one in many if one is not None),
        category=None if category is None else str(category),
    )


def pair_of(row: Row, *, place: Place) -> Pair:
    """A row as a preference pair.

    Raises:
        TitaError: something is missing or does not fit; names the row.
    """
    values, where = row.read(), row.where
    said, chosen = _answer(values, ("chosen",), where=where)
    also_said, rejected = _answer(values, _REJECTED, where=where)
    if _first(values, _QUESTION) is not None:
        question, _ = _asked(values, where=where)
    elif said and said == also_said:
        text = without_mark(question_in(said, field="chosen", where=where))
        question = _sound(text, field="chosen", where=where)
    elif said or also_said:
        raise TitaError(
            "chosen and rejected answer different prompts", where=where, remedy="drop the line"
        )
    else:
        raise TitaError(f"no field {_QUESTION[0]!r}", where=where, remedy="add it")
    if chosen.split() == rejected.split():
        raise TitaError(
            "chosen and rejected are the same", where=where, remedy="drop or mend the line"
        )
    picture = _picture(values, where=where)
    if picture is None:
        raise TitaError(f"no field {_IMAGE[1]!r}", where=where, remedy="name the image")
    return Pair(
        id=_id(values, row=row),
        image=place(picture, row),
        question=question,
        chosen=chosen,
        rejected=rejected,
    )


def _asked(values: Mapping[str, Any], *, where: str) -> tuple[str, str | None]:
    """The question, and the answer that a LLaVA conversation gives it."""
    field, value = _needed(values, _QUESTION, where=where)
    if not is_conversation(value):
        text = _sound(value, field=field, where=where)
        return _sound(without_mark(text), field=field, where=where), None
    turns = turns_of(value, field=field, where=where)
    packed = field == "conversations"
    # LLaVA packs several questions about an image into one row; the first stands for itself.
    text = question_in(turns[:1] if packed else turns, field=field, where=where)
    answer = turns[1][1] if packed and len(turns) > 1 and turns[1][0] == "assistant" else None
    return _sound(without_mark(text), field=field, where=where), answer


def _answer(
    values: Mapping[str, Any], names: tuple[str, ...], *, where: str
) -> tuple[list[tuple[str, str]], str]:
    """An answer with what is said before it, where both stand in one column."""
    field, value = _needed(values, names, where=where)
    if not is_conversation(value):
        return [], _sound(value, field=field, where=where)
    turns = turns_of(value, field=field, where=where)
    before, text = split_answer(turns, field=field, where=where)
    return before, _sound(text, field=field, where=where)


def _id(values: Mapping[str, Any], *, row: Row) -> str:
    value = _first(values, _ID)
    if value is None:
        return row.id
    if not isinstance(value, str | int):
        raise TitaError(
            f"id {value!r} is neither text nor a number", where=row.where, remedy="mend it"
        )
    return _sound(str(value), field="id", where=row.where)


def _sound(value: Any, *, field: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TitaError(f"{field!r} is empty or no text", where=where, remedy="mend the line")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TitaError(
            f"{field!r} holds half a character (a lone surrogate)",
            where=where,
            remedy="mend the line",
        ) from None
    return value


def picture_in(row: Row) -> Picture | None:
    """The image of a row as it stands there.

    Raises:
        TitaError: it is none that can be found.
    """
    return _picture(row.read(), where=row.where)


def _picture(values: Mapping[str, Any], *, where: str) -> Picture | None:
    value = _first(values, _IMAGE)
    if isinstance(value, list):
        if len(value) > 1:
            raise TitaError(
                f"{len(value)} images", where=where, remedy="keep one: a pair shows one image"
            )
        value = value[0] if value else None
    if isinstance(value, Mapping):  # the `datasets.Image` feature: {"bytes", "path"}
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TitaError(
            f"an image of type {type(value).__name__}", where=where, remedy="write its path"
        )
    return _image_path(str(value), where=where)


def _image_path(path: str, *, where: str) -> str:
    if path.startswith(("http://", "https://", "data:", "s3://")):
        raise TitaError(
            f"image {path[:60]!r} is a URL, not a file",
            where=where,
            remedy="download it and write its path",
        )
    if not is_inside(path) or PureWindowsPath(path).drive:
        raise TitaError(
            f"image path {path!r} leaves its folder", where=where, remedy="write a relative path"
        )
    if "\\" in path:
        raise TitaError(
            f"image path {path!r} has backslashes", where=where, remedy="write forward slashes"
        )
    if any(len(part.encode("utf-8", "replace")) > _MAX_NAME_BYTES for part in path.split("/")):
        raise TitaError(
            f"image path {path[:40]!r}... is longer than a file's name can be",
            where=where,
            remedy="write the path of a file",
        )
    if not path.isprintable():
        raise TitaError(
            f"image path {path!r} has control characters", where=where, remedy="rename the image"
        )
    return path


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _needed(row: Mapping[str, Any], names: tuple[str, ...], *, where: str) -> tuple[str, Any]:
    for name in names:
        if row.get(name) is not None:
            return name, row[name]
    raise TitaError(f"no field {names[0]!r}", where=where, remedy="add it")


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
