"""Reads conversations: messages in every form, and the turns that they make.

Conversations are lists of messages in TRL's form (`{"role", "content"}`, also with content parts;
https://huggingface.co/docs/trl/dataset_formats) or in LLaVA's and ShareGPT's (`{"from", "value"}`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tita.data.cells import parse_structure
from tita.data.image_marks import check_no_media, check_no_template, remove_marks
from tita.data.row_values import RowValues
from tita.records import IMAGE_MARK, ContextTurn
from tita.vlm.prompts import strip_ends

Role = Literal["system", "user", "assistant"]

_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_MESSAGE_KEYS = {"role", "from", "content", "value"}
_IGNORED_KEYS = {"name", "weight", "loss", "train"}
_PART_IMAGES = ("image", "path", "image_url", "url", "bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message of a row, as it is written there."""

    role: Role
    text: str
    num_images: int = 0
    """Images among its content parts; marks in the text are counted by `read_turns`."""


def is_dialogue(value: Any) -> bool:
    """Whether a value is a message or a list of messages."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping)


def is_assistant(message: Any) -> bool:
    """Whether a value is a message of the assistant, with a text or without."""
    if not isinstance(message, Mapping):
        return False
    name = message.get("role") or message.get("from")
    return isinstance(name, str) and _ROLES.get(name) == "assistant"


def parse_dialogue(value: Any) -> Any:
    """A text that is a message or a list of messages in JSON, as such; others are unchanged."""
    parsed = parse_structure(value)
    if parsed is value or not is_dialogue(parsed):
        return value
    first = parsed[0] if isinstance(parsed, list) else parsed
    return parsed if first.keys() & {"role", "from"} else value


def read_dialogue(row: RowValues, value: Any, column: str) -> list[ChatMessage]:
    """The messages of a column."""
    value = parse_dialogue(value)
    return [_read_message(row, m, column) for m in (value if isinstance(value, list) else [value])]


def _read_message(row: RowValues, message: Any, column: str) -> ChatMessage:
    if not isinstance(message, Mapping):
        what = f"{column!r} contains an item that is not a message"
        raise row.error(what, 'write {"role": ..., "content": ...}')
    unknown = [k for k, v in message.items() if v and k not in _MESSAGE_KEYS | _IGNORED_KEYS]
    if unknown:
        what = f"{column!r} contains a message with {unknown[0]!r}, which is not used"
        raise row.error(what, "keep only role and content")
    for one, other in (("role", "from"), ("content", "value")):
        if message.get(one) and message.get(other) and message[one] != message[other]:
            what = f"{column!r} contains a message with different {one!r} and {other!r}"
            raise row.error(what, "keep one of them")
    name = message.get("role") or message.get("from")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        what = f"{column!r} contains a message of role {name!r}"
        raise row.error(what, "keep only system, user and assistant messages")
    content = message.get("content")
    if content is None:
        content = message.get("value")
    num_images = 0
    if isinstance(content, list):
        content, num_images = _read_parts(row, content, column)
    if not isinstance(content, str):
        raise row.error(f"{column!r} contains a message without text", "add its content")
    return ChatMessage(role=role, text=row.text(content, column), num_images=num_images)


def _read_parts(row: RowValues, parts: list[Any], column: str) -> tuple[str | None, int]:
    """The text of content parts, and the number of images among them."""
    pieces: list[str | None] = []  # None is an image
    for part in parts:
        if not isinstance(part, Mapping):
            return None, 0
        given = {key: value for key, value in part.items() if value is not None}
        kind = given.pop("type", "text" if "text" in given else None)
        text = given.pop("text", None)
        if kind == "text" and isinstance(text, str) and not given:
            pieces.append(text)
        elif kind in ("image", "image_url") and not text:
            pieces.append(None)
            _read_inline_image(row, given, column)
        else:
            what = f"{column!r} contains a part of type {kind!r}"
            raise row.error(what, 'keep only parts {"type": "text"} and {"type": "image"}')
    texts = [piece for piece in pieces if piece is not None]
    num_images = len(pieces) - len(texts)
    if texts and pieces in ([None] * num_images + texts, texts + [None] * num_images):
        return "\n".join(texts), num_images
    # Images between texts: their marks are counted with the others.
    return "\n".join(IMAGE_MARK if piece is None else piece for piece in pieces) or None, 0


def _read_inline_image(row: RowValues, given: Mapping[str, Any], column: str) -> None:
    if given.keys() - {"detail", *_PART_IMAGES} or len(given.keys() & {*_PART_IMAGES}) > 1:
        what = f"{column!r} contains an image with {', '.join(map(repr, given))}"
        raise row.error(what, 'write {"type": "image"}, and the path in the column "images"')
    value = next((given[key] for key in _PART_IMAGES if key in given), None)
    if isinstance(value, Mapping) and "url" in value and value.keys() <= {"url", "detail"}:
        value = value["url"]
    image = row.image_cell(value)
    if image is not None:
        row.inline_images.append(image)


def read_history(row: RowValues, value: Any, column: str = "history") -> list[ChatMessage]:
    """Earlier turns as `[[question, answer], ...]`."""
    messages = []
    value = parse_structure(value)
    for turn in value if isinstance(value, list) else [None]:
        if not (isinstance(turn, list | tuple) and len(turn) == 2):
            what = f"{column!r} is not a list of questions with answers"
            raise row.error(what, 'write [["question", "answer"], ...]')
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append(ChatMessage(role=_ROLES[role], text=row.text(text, column)))
    return messages


def read_turns(
    row: RowValues, messages: Sequence[ChatMessage], *, num_images: int, column: str
) -> tuple[ContextTurn, ...]:
    """The turns of a conversation that ends with a question, without the marks of images.

    Args:
        row: for error messages.
        messages: the conversation up to the question.
        num_images: of the row. Without marks, the first user turn shows them.
        column: where the conversation stands.

    Raises:
        TitaError: the last message is not the user's, or marks and images differ in number.
    """
    if not messages or messages[-1].role != "user":
        raise row.error(f"{column!r} does not end with a question", "end it with a user message")
    _check_roles(row, messages, column)
    turns = [_read_turn(row, message, column) for message in messages]
    num_marks = sum(turn.num_images for turn in turns)
    if not num_marks:
        first = next(n for n, turn in enumerate(turns) if turn.role == "user")
        turns[first] = replace(turns[first], num_images=num_images)
    elif num_marks != num_images:
        number = f"{num_images or 'no'} image{'' if num_images == 1 else 's'}"
        raise row.error(
            f"{column!r} has {num_marks} image mark{'' if num_marks == 1 else 's'}, "
            f"and the row has {number}",
            "add the images, or remove the marks",
        )
    return tuple(turns)


def _check_roles(row: RowValues, messages: Sequence[ChatMessage], column: str) -> None:
    """System message first, then user and assistant in turns."""
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[n % 2] for n, role in enumerate(spoken)):
        what = f"{column!r} has the roles {', '.join(roles)}"
        raise row.error(what, "let user and assistant speak in turns, after one system message")


def _read_turn(row: RowValues, message: ChatMessage, column: str) -> ContextTurn:
    """A message without the marks of its images."""
    if message.role == "assistant":
        return ContextTurn(role=message.role, text=read_answer(row, message.text, column))
    check_no_template(row, message.text, column)
    if message.role == "system":
        check_no_media(row, message.text, column)
        return ContextTurn(role=message.role, text=message.text)
    text, num_marks = remove_marks(row, message.text, column)
    num_images = message.num_images or num_marks
    if message.num_images and num_marks not in (0, message.num_images):
        what = f"{column!r} has {num_marks} image marks and {message.num_images} image parts"
        raise row.error(what, "remove the marks")
    return ContextTurn(role="user", text=row.text(text, column), num_images=num_images)


def read_answer(row: RowValues, text: str, column: str) -> str:
    """An answer without the end of a turn behind it, which every chat template adds.

    Raises:
        TitaError: it contains the mark of an image or of a chat template, or nothing is left.
    """
    check_no_media(row, text, column)
    check_no_template(row, text, column)
    return row.text(strip_ends(text), column)
