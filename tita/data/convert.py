"""Converts the rows of dataset files into `Question` and `Pair` records.

`JOB_SCHEMA` and `BENCHMARK_SCHEMA` list the columns that hold each field, and what is accepted in
them. Questions and answers are text or messages, in TRL's form (`prompt`, `chosen` and `rejected`
are lists of `{"role", "content"}`; without `prompt`, both answers start with the prompt;
https://huggingface.co/docs/trl/dataset_formats) or in LLaVA's (`conversations` is a list of
`{"from", "value"}`, with `<image>` in the text).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any

from tita.data.rows import RawRow
from tita.errors import TitaError
from tita.records import Pair, Question
from tita.storage.manifest import is_inside

ImageValue = str | bytes
"""An image in a row: a path relative to the image folder, or the content of an image file."""
ImageResolver = Callable[[ImageValue, RawRow], str]
"""Returns the path of an image relative to the image folder of its dataset."""
IMAGE_TOKEN = "<image>"

_Message = tuple[str, str]  # role, text
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_MAX_NAME_BYTES = 255
_URL_SCHEMES = ("http://", "https://", "data:", "s3://")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSchema:
    """The columns of each field, in order of preference, and what is accepted in them."""

    id: tuple[str, ...]
    question: tuple[str, ...]
    image: tuple[str, ...]
    references: tuple[str, ...]
    chosen: tuple[str, ...] = ("chosen",)
    rejected: tuple[str, ...] = ("rejected", "reject")

    id_required: bool
    """Whether a row without an id is invalid; otherwise its id is file and line."""
    strict_ids: bool
    """Whether an id must be a number or a text that is not blank."""
    messages: bool
    """Whether messages are accepted as questions, and `<image>` around a question is removed."""
    several_images: bool
    """Whether a row may have several images."""
    integer_images: bool
    """Whether an integer names an image file, as COCO's ids do; otherwise it is ignored."""
    strict_images: bool
    """Whether URLs, backslashes, drives, control characters and other types are invalid."""
    vqa_references: bool
    """Whether references may be objects `{"answer": ...}`, and an empty text is no reference."""


JOB_SCHEMA = RowSchema(
    id=("id", "question_id"),
    question=("question", "prompt", "text", "conversations"),
    image=("image", "image_id", "images", "file_name"),
    references=("references", "answers", "answer", "label"),
    id_required=False,
    strict_ids=True,
    messages=True,
    several_images=False,
    integer_images=True,
    strict_images=True,
    vqa_references=False,
)
"""Rows of `build-pairs`, `train-dpo`, `tita infer` and `tita data validate`."""
BENCHMARK_SCHEMA = RowSchema(
    id=("question_id", "id", "qid"),
    question=("text", "question", "prompt", "query"),
    image=("images", "image", "image_id"),
    references=("references", "reference", "answers", "answer", "label"),
    id_required=True,
    strict_ids=False,
    messages=False,
    several_images=True,
    integer_images=False,
    strict_images=False,
    vqa_references=True,
)
"""Rows of `tita-bench`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionFields:
    """The fields of a question, with its images as the row has them."""

    id: str
    raw_id: str | int | None
    """The id with its JSON type; None if the row has none."""
    text: str
    images: tuple[ImageValue, ...]
    references: tuple[str, ...]
    values: Mapping[str, Any]
    """All columns of the row."""


def parse_question(row: RawRow, *, schema: RowSchema = JOB_SCHEMA) -> QuestionFields:
    """Reads the fields of a question from a row.

    Raises:
        TitaError: a field is missing or invalid; names file and line.
    """
    values = row.parse()
    text, answer = _parse_text(values, schema=schema, where=row.where)
    references = _first(values, schema.references)
    images = _parse_images(values, schema=schema, where=row.where)
    return QuestionFields(
        id=_parse_id(values, schema=schema, row=row),
        raw_id=_first(values, schema.id),
        text=text,
        images=images,
        references=to_texts(
            answer if references is None else references, vqa=schema.vqa_references
        ),
        values=values,
    )


def to_question(row: RawRow, *, resolve_image: ImageResolver) -> Question:
    """Converts a row to a question.

    Raises:
        TitaError: a field is missing or invalid; names file and line.
    """
    fields = parse_question(row)
    category = fields.values.get("category")
    return Question(
        id=fields.id,
        text=fields.text,
        image=resolve_image(fields.images[0], row) if fields.images else None,
        references=fields.references,
        category=None if category is None else str(category),
    )


def to_pair(row: RawRow, *, resolve_image: ImageResolver) -> Pair:
    """Converts a row to a preference pair.

    Raises:
        TitaError: a field is missing or invalid; names file and line.
    """
    schema, values, where = JOB_SCHEMA, row.parse(), row.where
    prompt, chosen = _parse_answer(values, schema.chosen, where=where)
    other_prompt, rejected = _parse_answer(values, schema.rejected, where=where)
    if _first(values, schema.question) is not None:
        question, _ = _parse_text(values, schema=schema, where=where)
    elif prompt and prompt == other_prompt:
        text = _strip_image_token(_single_question(prompt, field="chosen", where=where))
        question = _check_text(text, field="chosen", where=where)
    elif prompt or other_prompt:
        raise TitaError(
            "chosen and rejected answer different prompts", where=where, remedy="delete the line"
        )
    else:
        raise _missing(schema.question, where=where)
    if chosen.split() == rejected.split():
        raise TitaError(
            "chosen and rejected are the same", where=where, remedy="fix or delete the line"
        )
    images = _parse_images(values, schema=schema, where=where)
    if not images:
        raise TitaError("no field 'image_id'", where=where, remedy="add the path of the image")
    return Pair(
        id=_parse_id(values, schema=schema, row=row),
        image=resolve_image(images[0], row),
        question=question,
        chosen=chosen,
        rejected=rejected,
    )


def to_record(row: RawRow, *, resolve_image: ImageResolver) -> Pair | Question:
    """Converts a row with an answer column of a pair to a pair, any other row to a question.

    Raises:
        TitaError: a field is missing or invalid; names file and line.
    """
    values = row.parse()
    columns = (*JOB_SCHEMA.chosen, *JOB_SCHEMA.rejected)
    is_pair = "chosen" in values or _first(values, columns) is not None
    return (to_pair if is_pair else to_question)(row, resolve_image=resolve_image)


def image_in_row(row: RawRow) -> ImageValue | None:
    """The image of a row.

    Raises:
        TitaError: the image column is invalid.
    """
    images = _parse_images(row.parse(), schema=JOB_SCHEMA, where=row.where)
    return images[0] if images else None


def to_texts(value: Any, *, vqa: bool) -> tuple[str, ...]:
    """Converts one value or a list to texts; `vqa` is `RowSchema.vqa_references`."""
    parts = value if isinstance(value, list | tuple) else [value]
    if not vqa:
        return tuple(str(part) for part in parts if part is not None)
    if value is None or value == "":
        return ()
    return tuple(
        str(part.get("answer", part) if isinstance(part, dict) else part) for part in parts
    )


def _first(values: Mapping[str, Any], columns: tuple[str, ...]) -> Any:
    return next((values[name] for name in columns if values.get(name) is not None), None)


def _required(
    values: Mapping[str, Any], columns: tuple[str, ...], *, where: str
) -> tuple[str, Any]:
    """The first column that has a value, and the value."""
    for name in columns:
        if values.get(name) is not None:
            return name, values[name]
    raise _missing(columns, where=where)


def _missing(columns: tuple[str, ...], *, where: str) -> TitaError:
    return TitaError(f"no field {columns[0]!r}", where=where, remedy="add it")


def _check_string(value: Any, *, field: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TitaError(f"{field!r} is empty or not a string", where=where, remedy="fix the line")
    return value


def _check_text(value: Any, *, field: str, where: str) -> str:
    text = _check_string(value, field=field, where=where)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TitaError(
            f"{field!r} contains a lone surrogate (half a character)",
            where=where,
            remedy="fix the line",
        ) from None
    return text


def _parse_id(values: Mapping[str, Any], *, schema: RowSchema, row: RawRow) -> str:
    value = _first(values, schema.id)
    if value is None and schema.id_required:
        raise _missing(schema.id, where=row.where)
    if value is None:
        return row.id
    if not schema.strict_ids:
        return str(value)
    if not isinstance(value, str | int):
        raise TitaError(
            f"id {value!r} is neither a string nor an integer",
            where=row.where,
            remedy="fix the line",
        )
    return _check_text(str(value), field="id", where=row.where)


def _parse_text(
    values: Mapping[str, Any], *, schema: RowSchema, where: str
) -> tuple[str, str | None]:
    """The question, and its answer in a LLaVA conversation."""
    field, value = _required(values, schema.question, where=where)
    if not schema.messages:
        return _check_string(value, field=field, where=where), None
    if not _is_messages(value):
        text = _check_text(value, field=field, where=where)
        return _check_text(_strip_image_token(text), field=field, where=where), None
    messages = _parse_messages(value, field=field, where=where)
    answer = None
    if field == "conversations":
        # LLaVA stores several questions about an image in one row; the first is self-contained.
        if len(messages) > 1 and messages[1][0] == "assistant":
            answer = messages[1][1]
        messages = messages[:1]
    text = _strip_image_token(_single_question(messages, field=field, where=where))
    return _check_text(text, field=field, where=where), answer


def _parse_answer(
    values: Mapping[str, Any], columns: tuple[str, ...], *, where: str
) -> tuple[list[_Message], str]:
    """The prompt in front of an answer, if the column holds both, and the answer."""
    field, value = _required(values, columns, where=where)
    if not _is_messages(value):
        return [], _check_text(value, field=field, where=where)
    messages = _parse_messages(value, field=field, where=where)
    if not messages or messages[-1][0] != "assistant":
        raise TitaError(
            f"{field!r} does not end with an assistant message",
            where=where,
            remedy="end it with the answer",
        )
    return messages[:-1], _check_text(messages[-1][1], field=field, where=where)


def _is_messages(value: Any) -> bool:
    return isinstance(value[0] if isinstance(value, list) and value else value, Mapping)


def _parse_messages(value: Any, *, field: str, where: str) -> list[_Message]:
    return [
        _parse_message(message, field=field, where=where)
        for message in (value if isinstance(value, list) else [value])
    ]


def _parse_message(message: Any, *, field: str, where: str) -> _Message:
    if not isinstance(message, Mapping):
        raise TitaError(
            f"{field!r} contains an item that is not a message",
            where=where,
            remedy='write {"role": ..., "content": ...}',
        )
    name = message.get("role") or message.get("from")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise TitaError(
            f"{field!r} contains a message of role {name!r}",
            where=where,
            remedy="keep only user and assistant messages",
        )
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, Mapping)]
        texts = [str(part["text"]) for part in parts if part.get("text")]
        content = "\n".join(texts) if len(parts) == len(content) else None
    if not isinstance(content, str):
        raise TitaError(
            f"{field!r} contains a message without text", where=where, remedy="add its content"
        )
    return role, content


def _single_question(messages: list[_Message], *, field: str, where: str) -> str:
    if len(messages) != 1 or messages[0][0] != "user":
        raise TitaError(
            f"{field!r} contains {len(messages)} messages, not one question",
            where=where,
            remedy="keep only the user message",
        )
    return messages[0][1]


def _strip_image_token(text: str) -> str:
    """Removes `<image>` from both ends; each model's chat template inserts its own."""
    stripped = text.strip()
    while stripped.startswith(IMAGE_TOKEN) or stripped.endswith(IMAGE_TOKEN):
        stripped = stripped.removeprefix(IMAGE_TOKEN).removesuffix(IMAGE_TOKEN).strip()
    return stripped if IMAGE_TOKEN in text else text


def _parse_images(
    values: Mapping[str, Any], *, schema: RowSchema, where: str
) -> tuple[ImageValue, ...]:
    value = _first(values, schema.image)
    if isinstance(value, int) and not schema.integer_images:
        return ()
    cells = value if isinstance(value, list | tuple) else [value]
    if len(cells) > 1 and not schema.several_images:
        raise TitaError(f"{len(cells)} images", where=where, remedy="keep one: a row has one image")
    images: list[ImageValue] = []
    for cell in cells:
        if isinstance(cell, Mapping):  # the `datasets.Image` feature
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, bytes):
            images.append(cell)
        elif schema.strict_images and cell is not None:
            if isinstance(cell, bool) or not isinstance(cell, str | int):
                raise TitaError(
                    f"an image of type {type(cell).__name__}",
                    where=where,
                    remedy="write the path of the image",
                )
            images.append(_check_path(str(cell), strict=True, where=where))
        elif cell not in (None, ""):
            images.append(_check_path(str(cell), strict=False, where=where))
    return tuple(images)


def _check_path(path: str, *, strict: bool, where: str) -> str:
    """Returns an image path that stays inside the image folder.

    A path that leaves the folder could send any file of this machine to an endpoint.
    """
    if strict and path.startswith(_URL_SCHEMES):
        raise TitaError(
            f"image {path[:60]!r} is a URL, not a file",
            where=where,
            remedy="download it and write its path",
        )
    if not is_inside(path) or (strict and PureWindowsPath(path).drive):
        raise TitaError(
            f"image path {path[:60]!r} leaves its folder",
            where=where,
            remedy="write a relative path",
        )
    if strict and "\\" in path:
        raise TitaError(
            f"image path {path!r} has backslashes", where=where, remedy="write forward slashes"
        )
    if any(len(part.encode("utf-8", "replace")) > _MAX_NAME_BYTES for part in path.split("/")):
        raise TitaError(
            f"image path {path[:40]!r}... is longer than a file name can be",
            where=where,
            remedy="write the path of a file",
        )
    if strict and not path.isprintable():
        raise TitaError(
            f"image path {path!r} has control characters", where=where, remedy="rename the image"
        )
    return path
