"""Question and pair files: JSON Lines in the spellings that are about, one record inside."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.records import Pair, Question
from tita.storage.manifest import is_inside

# Every field by the names it goes by: LLaVA's question files, POPE's, SeVa's pair files, TRL's.
_ID = ("id", "question_id")
_IMAGE = ("image", "image_id")
_TEXT = ("text", "question", "prompt")
_REFERENCES = ("references", "answers", "answer", "label")
_REJECTED = ("rejected", "reject")


def read_questions(path: Path) -> Iterator[Question]:
    """Questions of a JSONL file, or of all JSONL files below a folder, in the order of their names.

    One object a line: `question_id` (or `id`), `text` (or `question`, `prompt`), `image` (or
    `image_id`), and optionally `answer` (or `answers`, `references`, `label`) and `category`.

    Raises:
        TitaError: names file and line.
    """
    for where, row in _rows(path):
        yield question_of(row, where=where)


def question_of(row: Mapping[str, Any], *, where: str) -> Question:
    """One line's object as a question; `where` names the line in errors."""
    references = _first(row, _REFERENCES)
    many = references if isinstance(references, list) else [references]
    return Question(
        id=str(_needed(row, _ID, where=where)),
        text=_text(row, _TEXT, where=where),
        image=_image(row, where=where),
        references=tuple(str(one) for one in many if one is not None),
        category=row.get("category"),
    )


def read_pairs(path: Path) -> Iterator[Pair]:
    """Preference pairs of a JSONL file, or of all JSONL files below a folder.

    One object a line: `image_id` (or `image`), `question` (or `prompt`, `text`), `chosen`, and
    `reject` (or `rejected`); an `id` is optional.

    Raises:
        TitaError: names file and line.
    """
    for where, row in _rows(path):
        yield pair_of(row, where=where)


def pair_of(row: Mapping[str, Any], *, where: str) -> Pair:
    """One line's object as a pair; `where` names the line in errors."""
    chosen = _text(row, ("chosen",), where=where)
    rejected = _text(row, _REJECTED, where=where)
    if chosen == rejected:
        raise TitaError(
            "chosen and rejected are the same", where=where, remedy="drop or mend the line"
        )
    image = _image(row, where=where)
    if image is None:
        raise TitaError(f"no field {_IMAGE[1]!r}", where=where, remedy="name the image")
    return Pair(
        id=str(_first(row, _ID) or where.rpartition("/")[2]),
        image=image,
        question=_text(row, ("question", "prompt", "text"), where=where),
        chosen=chosen,
        rejected=rejected,
    )


def write_pairs(pairs: Iterable[Pair]) -> bytes:
    """Pairs as JSON Lines, in the spelling that existing scripts read."""
    lines = (
        json.dumps(
            {
                "id": pair.id,
                "image_id": pair.image,
                "question": pair.question,
                "chosen": pair.chosen,
                "reject": pair.rejected,
            },
            ensure_ascii=False,
        )
        for pair in pairs
    )
    return "".join(f"{line}\n" for line in lines).encode()


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file:line, object) of every line that is not blank."""
    for where, line in lines_of(path):
        yield where, parse_line(line, where=where)


def lines_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """(file:line, content) of every line that is not blank, of a file or all below a folder.

    Raises:
        TitaError: the folder holds no JSONL file.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise TitaError("no .jsonl file in it", where=str(path), remedy="name a file or its folder")
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}:{number}", line


def parse_line(line: bytes, *, where: str) -> Mapping[str, Any]:
    """One line's JSON object; `where` names the line in errors."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise TitaError("not UTF-8", where=where, remedy="save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise TitaError(
            f"not JSON ({error.msg} at column {error.colno})", where=where, remedy="mend the line"
        ) from None
    if not isinstance(row, dict):
        raise TitaError("not a JSON object", where=where, remedy="write one object a line")
    return row


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _needed(row: Mapping[str, Any], names: tuple[str, ...], *, where: str) -> Any:
    value = _first(row, names)
    if value is None:
        raise TitaError(f"no field {names[0]!r}", where=where, remedy="add it")
    return value


def _text(row: Mapping[str, Any], names: tuple[str, ...], *, where: str) -> str:
    value = _needed(row, names, where=where)
    if not isinstance(value, str) or not value.strip():
        raise TitaError(f"{names[0]!r} is empty or no text", where=where, remedy="mend the line")
    return value


def _image(row: Mapping[str, Any], *, where: str) -> str | None:
    value = _first(row, _IMAGE)
    if value is None:
        return None
    if not isinstance(value, str) or not is_inside(value):
        raise TitaError(
            f"image path {value!r} leaves its folder", where=where, remedy="write a relative path"
        )
    return value
