"""Reads conversations and image marks.

Conversations are lists of messages in TRL's form (`{"role", "content"}`, also with content parts;
https://huggingface.co/docs/trl/dataset_formats) or in LLaVA's and ShareGPT's (`{"from", "value"}`).
Marks of images, `<image>` or those of other tools, only say where an image is shown: every model's
chat template inserts its own.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tita.data.row_values import RowValues, parse_structure
from tita.records import IMAGE_MARK, ContextTurn

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

_MARK = re.compile(
    # LLaVA, TRL, ms-swift; InternLM-XComposer; MMMU and MMPR; Qwen2-VL; Llama 3.2, GLM; Phi-3;
    # MiniGPT-4; Qwen-VL; Gemma 3; InternVL
    r"<image>|<ImageHere>|<image[ _-]?\d+>"
    r"|<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<\|image_pad\|>"
    r"|<\|image\|>|<\|image_\d+\|>|<image_placeholder>|<ImageContent>"
    r"|<img>(?:<ImageHere>|[^<\n]*)</img>|<start_of_image>|<image_soft_token>|<IMG_CONTEXT>",
    re.IGNORECASE,
)
_OTHER_MEDIA = re.compile(r"<video>|<audio>|<\|video_pad\|>|<\|audio_pad\|>", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")


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
    if isinstance(value, Mapping) and value.keys() == {"url"}:
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
    if message.role != "user":
        return ContextTurn(role=message.role, text=read_answer(row, message.text, column))
    text, num_marks = _remove_marks(row, message.text, column)
    num_images = message.num_images or num_marks
    if message.num_images and num_marks not in (0, message.num_images):
        what = f"{column!r} has {num_marks} image marks and {message.num_images} image parts"
        raise row.error(what, "remove the marks")
    return ContextTurn(role="user", text=row.text(text, column), num_images=num_images)


def read_answer(row: RowValues, text: str, column: str) -> str:
    """An answer, which may not contain an image's mark: no model writes images.

    Raises:
        TitaError: it contains one.
    """
    mark = _MARK.search(text) or _OTHER_MEDIA.search(text)
    if mark:
        what = f"{column!r} contains the mark {mark.group()[:40]!r} in an answer"
        raise row.error(what, "remove it from the answer")
    return text


def _remove_marks(row: RowValues, text: str, column: str) -> tuple[str, int]:
    """The text, and the number of images.

    Marks at both ends, and a single one on a line of its own, are removed: the images are shown
    before the text, as LLaVA does it (`preprocess_multimodal` in `llava/train/train.py`). Other
    marks become `IMAGE_MARK` at their places.
    """
    media = _OTHER_MEDIA.search(text)
    if media:
        what = f"{column!r} contains {media.group()!r}"
        raise row.error(what, "use rows with images only")
    marks = [match.group() for match in _MARK.finditer(text)]
    if not marks:
        return text, 0
    numbers = [
        int(n) for mark in marks for n in _NUMBER.findall(mark) if "</img>" not in mark.lower()
    ]
    kept = text.strip()
    if len(marks) == 1:
        lines = kept.splitlines()
        kept = "\n".join(line for line in lines if not _MARK.search(line) or _strip_marks(line))
    kept = _strip_marks(kept)
    if _MARK.search(kept):
        kept = _MARK.sub(IMAGE_MARK, text.strip())
    if numbers and numbers != list(range(1, len(marks) + 1)):
        what = f"{column!r} has the image marks {', '.join(marks)}"
        raise row.error(what, "mark every image once, in the order of the images")
    return kept, len(marks)


def _strip_marks(text: str) -> str:
    while True:
        stripped = text.strip()
        match = _MARK.match(stripped)
        if match:
            text = stripped[match.end() :]
            continue
        marks = list(_MARK.finditer(stripped))
        if not marks or marks[-1].end() != len(stripped):
            return stripped
        text = stripped[: marks[-1].start()]
