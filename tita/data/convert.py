"""Converts the rows of dataset files into `Question` and `Pair` records.

`JOB_SCHEMA` and `BENCHMARK_SCHEMA` list the columns that hold each field, and what is accepted in
them. Questions and answers are text or messages, in TRL's form (`prompt`, `chosen` and `rejected`
are lists of `{"role", "content"}`; without `prompt`, both answers start with the prompt;
https://huggingface.co/docs/trl/dataset_formats) or in LLaVA's (`conversations` is a list of
`{"from", "value"}`, with `<image>` in the text).

For an invalid row, all functions raise a `TitaError` that names file and line.
"""

import re
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
_SURROGATE = re.compile("[\ud800-\udfff]")
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
    messages: bool
    """Whether messages are accepted as questions, `<image>` around a question is removed, and lone
    surrogates are invalid; otherwise the text is used unchanged."""
    several_images: bool
    """Whether a row may have several images."""
    integer_images: bool
    """Whether an integer names an image file, as COCO's ids do; otherwise it is ignored."""
    strict: bool
    """Whether an id must be a number or a text that is not blank, and URLs, backslashes, drives,
    control characters and other types are invalid as images."""
    vqa_references: bool
    """Whether references may be objects `{"answer": ...}`, and an empty text is no reference."""


JOB_SCHEMA = RowSchema(
    id=("id", "question_id"),
    question=("question", "prompt", "text", "conversations"),
    image=("image", "image_id", "images", "file_name"),
    references=("references", "answers", "answer", "label"),
    id_required=False,
    messages=True,
    several_images=False,
    integer_images=True,
    strict=True,
    vqa_references=False,
)
"""Rows of `build-pairs`, `train-dpo`, `tita infer` and `tita data validate`."""
BENCHMARK_SCHEMA = RowSchema(
    id=("question_id", "id", "qid"),
    question=("text", "question", "prompt", "query"),
    image=("images", "image", "image_id"),
    references=("references", "reference", "answers", "answer", "label"),
    id_required=True,
    messages=False,
    several_images=True,
    integer_images=False,
    strict=False,
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
    """Read the fields of a question from a row."""
    reader = _RowReader(row, schema)
    text, answer = reader.question()
    images = reader.images()
    _, references = reader.first(schema.references)
    return QuestionFields(
        id=reader.id(),
        raw_id=reader.first(schema.id)[1],
        text=text,
        images=images,
        references=to_texts(
            answer if references is None else references, vqa=schema.vqa_references
        ),
        values=reader.values,
    )


def to_question(row: RawRow, *, resolve_image: ImageResolver) -> Question:
    """Convert a row to a question."""
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
    """Convert a row to a preference pair."""
    schema = JOB_SCHEMA
    reader = _RowReader(row, schema)
    prompt, chosen = reader.answer(schema.chosen)
    other_prompt, rejected = reader.answer(schema.rejected)
    if reader.first(schema.question)[1] is not None:
        question, _ = reader.question()
    elif not (prompt or other_prompt):
        raise reader.missing(schema.question)
    elif prompt == other_prompt:
        question = reader.single_question(prompt, "chosen")
    else:
        raise reader.error("chosen and rejected answer different prompts", "delete the line")
    if chosen.split() == rejected.split():
        raise reader.error("chosen and rejected are the same", "fix or delete the line")
    images = reader.images()
    if not images:
        raise reader.error("no field 'image_id'", "add the path of the image")
    return Pair(
        id=reader.id(),
        image=resolve_image(images[0], row),
        question=question,
        chosen=chosen,
        rejected=rejected,
    )


def to_record(row: RawRow, *, resolve_image: ImageResolver) -> Pair | Question:
    """Convert a row with an answer column of a pair to a pair, any other row to a question."""
    values = row.parse()
    is_pair = "chosen" in values or any(
        values.get(name) is not None for name in JOB_SCHEMA.rejected
    )
    return (to_pair if is_pair else to_question)(row, resolve_image=resolve_image)


def image_in_row(row: RawRow) -> ImageValue | None:
    """Return the image of a row."""
    return next(iter(_RowReader(row, JOB_SCHEMA).images()), None)


def to_texts(value: Any, *, vqa: bool) -> tuple[str, ...]:
    """Convert one value or a list to texts; `vqa` is `RowSchema.vqa_references`."""
    parts = value if isinstance(value, list | tuple) else [value]
    if not vqa:
        return tuple(str(part) for part in parts if part is not None)
    if value is None or value == "":
        return ()
    answers = (part.get("answer", part) if isinstance(part, dict) else part for part in parts)
    return tuple(str(answer) for answer in answers)


class _RowReader:
    """Reads the fields of one row by a schema; errors name the row."""

    def __init__(self, row: RawRow, schema: RowSchema) -> None:
        self.row = row
        self.schema = schema
        self.values = row.parse()

    def error(self, what: str, remedy: str) -> TitaError:
        return TitaError(what, where=self.row.where, remedy=remedy)

    def missing(self, columns: tuple[str, ...]) -> TitaError:
        return self.error(f"no field {columns[0]!r}", "add it")

    def first(self, columns: tuple[str, ...]) -> tuple[str, Any]:
        """The first column that has a value, and the value; None without one."""
        found = ((c, self.values[c]) for c in columns if self.values.get(c) is not None)
        return next(found, (columns[0], None))

    def id(self) -> str:
        _, value = self.first(self.schema.id)
        if value is None and self.schema.id_required:
            raise self.missing(self.schema.id)
        if value is None:
            return self.row.id
        if not self.schema.strict:
            return str(value)
        if not isinstance(value, str | int):
            raise self.error(f"id {value!r} is neither a string nor an integer", "fix the line")
        return self.text(str(value), "id")

    def question(self) -> tuple[str, str | None]:
        """The question, and its answer in a LLaVA conversation."""
        field, value = self.first(self.schema.question)
        if value is None:
            raise self.missing(self.schema.question)
        if not self.schema.messages:
            return self.text(value, field, check_encoding=False), None
        if not _is_messages(value):
            return self.text(_strip_image_token(self.text(value, field)), field), None
        messages = self.messages(value, field)
        answer = None
        if field == "conversations":
            # LLaVA stores several questions about an image in one row; the first is self-contained.
            if len(messages) > 1 and messages[1][0] == "assistant":
                answer = messages[1][1]
            messages = messages[:1]
        return self.single_question(messages, field), answer

    def answer(self, columns: tuple[str, ...]) -> tuple[list[_Message], str]:
        """The prompt in front of an answer, if the column holds both, and the answer."""
        field, value = self.first(columns)
        if value is None:
            raise self.missing(columns)
        if not _is_messages(value):
            return [], self.text(value, field)
        messages = self.messages(value, field)
        if not messages or messages[-1][0] != "assistant":
            what = f"{field!r} does not end with an assistant message"
            raise self.error(what, "end it with the answer")
        return messages[:-1], self.text(messages[-1][1], field)

    def text(self, value: Any, field: str, *, check_encoding: bool = True) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{field!r} is empty or not a string", "fix the line")
        if check_encoding and _SURROGATE.search(value):
            what = f"{field!r} contains a lone surrogate (half a character)"
            raise self.error(what, "fix the line")
        return value

    def single_question(self, messages: list[_Message], field: str) -> str:
        if len(messages) != 1 or messages[0][0] != "user":
            what = f"{field!r} contains {len(messages)} messages, not one question"
            raise self.error(what, "keep only the user message")
        return self.text(_strip_image_token(messages[0][1]), field)

    def messages(self, value: Any, field: str) -> list[_Message]:
        return [self.message(m, field) for m in (value if isinstance(value, list) else [value])]

    def message(self, message: Any, field: str) -> _Message:
        if not isinstance(message, Mapping):
            what = f"{field!r} contains an item that is not a message"
            raise self.error(what, 'write {"role": ..., "content": ...}')
        name = message.get("role") or message.get("from")
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            what = f"{field!r} contains a message of role {name!r}"
            raise self.error(what, "keep only user and assistant messages")
        content = message.get("content")
        if content is None:
            content = message.get("value")
        if isinstance(content, list):
            parts = [part for part in content if isinstance(part, Mapping)]
            texts = [str(part["text"]) for part in parts if part.get("text")]
            content = "\n".join(texts) if len(parts) == len(content) else None
        if not isinstance(content, str):
            raise self.error(f"{field!r} contains a message without text", "add its content")
        return role, content

    def images(self) -> tuple[ImageValue, ...]:
        _, value = self.first(self.schema.image)
        if isinstance(value, int) and not self.schema.integer_images:
            return ()
        cells = value if isinstance(value, list | tuple) else [value]
        if len(cells) > 1 and not self.schema.several_images:
            raise self.error(f"{len(cells)} images", "keep one: a row has one image")
        images: list[ImageValue] = []
        for cell in cells:
            if isinstance(cell, Mapping):  # the `datasets.Image` feature
                cell = cell.get("bytes") or cell.get("path")
            if isinstance(cell, bytes):
                images.append(cell)
            elif self.schema.strict and cell is not None:
                if isinstance(cell, bool) or not isinstance(cell, str | int):
                    what = f"an image of type {type(cell).__name__}"
                    raise self.error(what, "write the path of the image")
                images.append(self.image_path(str(cell)))
            elif cell not in (None, ""):
                images.append(self.image_path(str(cell)))
        return tuple(images)

    def image_path(self, path: str) -> str:
        """Check a path; one that leaves the folder could send any local file to an endpoint."""
        strict = self.schema.strict
        if strict and path.startswith(_URL_SCHEMES):
            what = f"image {path[:60]!r} is a URL, not a file"
            raise self.error(what, "download it and write its path")
        if not is_inside(path) or (strict and PureWindowsPath(path).drive):
            raise self.error(f"image path {path[:60]!r} leaves its folder", "write a relative path")
        if strict and "\\" in path:
            raise self.error(f"image path {path!r} has backslashes", "write forward slashes")
        if any(len(part.encode("utf-8", "replace")) > _MAX_NAME_BYTES for part in path.split("/")):
            what = f"image path {path[:40]!r}... is longer than a file name can be"
            raise self.error(what, "write the path of a file")
        if strict and not path.isprintable():
            raise self.error(f"image path {path!r} has control characters", "rename the image")
        return path


def _is_messages(value: Any) -> bool:
    return isinstance(value[0] if isinstance(value, list) and value else value, Mapping)


def _strip_image_token(text: str) -> str:
    """Remove `<image>` from both ends; each model's chat template inserts its own."""
    stripped = text.strip()
    while stripped.startswith(IMAGE_TOKEN) or stripped.endswith(IMAGE_TOKEN):
        stripped = stripped.removeprefix(IMAGE_TOKEN).removesuffix(IMAGE_TOKEN).strip()
    return stripped if IMAGE_TOKEN in text else text
