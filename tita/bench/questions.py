"""What is asked: questions with their images, references and the metric that scores them.

One record a question, in any form that `tita.bench.questions` reads. `text` is sent exactly as
it stands there; readers of published sets (`tita.bench.suites`) write the prompt of their protocol
into it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita.data.rows import read_rows
from tita.errors import TitaError
from tita.storage.manifest import is_inside

Unpack = Callable[[bytes], str]
"""Takes an image that stands inside a row; gives its path below the folder of images."""

_LONGEST_NAME = 255
_LOCAL = ("/", "./", "../", "~")
_TABLES = (".parquet", ".pq", ".csv", ".tsv")
_ID_KEYS = ("question_id", "id", "qid")
_TEXT_KEYS = ("text", "question", "prompt", "query")
_REFERENCE_KEYS = ("references", "reference", "answers", "answer", "label")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkItem:
    """One question of a benchmark."""

    id: str
    text: str
    images: tuple[str, ...] = ()
    """Paths relative to the folder of images."""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    """The options of a multiple-choice question, in the order of their letters."""
    metric: str = ""
    """A name of `tita.bench.scoring`; empty: not scored."""
    suite: str = ""
    """The question set; scores of unlike sets are never put together."""
    category: str = ""
    group: str = ""
    """Questions that count together: MME's of one image, MMBench's rotations."""

    def record(self) -> dict[str, Any]:
        """The item as it stands in a question file; empty fields are left out."""
        images = {"image": self.images[0]} if len(self.images) == 1 else {"images": self.images}
        fields: dict[str, Any] = {
            "question_id": self.id,
            "text": self.text,
            **images,
            "references": self.references,
            "choices": self.choices,
            "metric": self.metric,
            "suite": self.suite,
            "category": self.category,
            "group": self.group,
        }
        return {key: value for key, value in fields.items() if value}


def read_items(
    path: Path, *, limit: int | None = None, unpack: Unpack | None = None
) -> Iterator[BenchmarkItem]:
    """The questions of a file, ours or one in LLaVA's or a similar spelling.

    JSONL, a JSON array, CSV, TSV or Parquet, by the file's ending.

    Args:
        path: the file; with `unpack` also a folder of JSONL and Parquet files.
        limit: only the first so many.
        unpack: puts images inside the rows into files; without it such rows are refused.

    Raises:
        TitaError: the file is not there, a line is no question, or an id comes twice.
    """
    if not (path.is_file() or (unpack is not None and path.is_dir())):
        raise TitaError(
            "no question file", where=str(path), remedy="write one with `tita-bench sample`"
        )
    seen: set[str] = set()
    for where, record in read_records(path):
        if limit is not None and len(seen) >= limit:
            return
        item = _item(record, where=where, unpack=unpack)
        if item.id in seen:
            raise TitaError(f"question id {item.id!r} comes twice", where=where)
        seen.add(item.id)
        yield item
    if not seen:
        raise TitaError("no questions in it", where=str(path))


def write_items(path: Path, items: Iterable[BenchmarkItem]) -> int:
    """Write a question file, whole or not at all; returns the number of questions.

    Raises:
        TitaError: the file's name says that it is no JSON Lines.
    """
    check_ending(path)
    temporary = path.with_name(f".{path.name}.part")
    num_items = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for item in items:
                file.write(json.dumps(item.record(), ensure_ascii=False) + "\n")
                num_items += 1
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return num_items


def check_ending(path: Path) -> None:
    """Refuse a name by which the JSON Lines that we write would be read as a table.

    Raises:
        TitaError: it is such a name.
    """
    if path.suffix.lower() in _TABLES:
        raise TitaError(
            f"question files are written as JSON Lines, not as {path.suffix}",
            where=str(path),
            remedy=f"name it {path.with_suffix('.jsonl').name}",
        )


def digest_of(path: Path) -> str:
    """SHA-256 of a file, which names the question set in every score's protocol."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _item(record: dict[str, Any], *, where: str, unpack: Unpack | None) -> BenchmarkItem:
    identity, text = _first(record, _ID_KEYS), _first(record, _TEXT_KEYS)
    if identity is None or not isinstance(text, str) or not text.strip():
        raise TitaError(
            "a question needs an id and a text",
            where=where,
            remedy=f"name them {_ID_KEYS[0]} and {_TEXT_KEYS[0]}",
        )
    references = _strings(_first(record, _REFERENCE_KEYS))
    label = "label" in record and set(references) <= {"yes", "no"}
    default = "yes-no" if references and label else "exact" if references else ""
    return BenchmarkItem(
        id=str(identity),
        text=text,
        images=_images(record, where=where, unpack=unpack),
        references=references,
        choices=_strings(record.get("choices")),
        metric=str(record.get("metric", default)),
        suite=str(record.get("suite", "")),
        category=str(record.get("category", "")),
        group=str(record.get("group", "")),
    )


def _first(record: dict[str, Any], keys: Iterable[str]) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _images(record: dict[str, Any], *, where: str, unpack: Unpack | None) -> tuple[str, ...]:
    named = _first(record, ("images", "image", "image_id"))
    # VQA's `image_id` is a number and no path.
    if isinstance(named, int):
        return ()
    images = []
    for value in named if isinstance(named, list | tuple) else [named]:
        if isinstance(value, dict):  # the `datasets.Image` feature: {"bytes", "path"}
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            images.append(_unpacked(value, where=where, unpack=unpack))
        elif value not in (None, ""):
            images.append(_path(str(value), where=where))
    return tuple(images)


def _unpacked(picture: bytes, *, where: str, unpack: Unpack | None) -> str:
    if unpack is None:
        raise TitaError(
            "an image inside the row, not the path of one",
            where=where,
            remedy="write questions and images side by side with "
            "`tita-bench prepare unpack --source FILE --out FOLDER/questions.jsonl`",
        )
    return unpack(picture)


def _path(image: str, *, where: str) -> str:
    """An image's path; one that leaves its folder could send any file from here to an endpoint."""
    if not is_inside(image):
        raise TitaError(
            f"image path {image[:60]!r} leaves its folder",
            where=where,
            remedy="write a relative path",
        )
    if any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME for part in image.split("/")):
        raise TitaError(
            f"image path {image[:40]!r}... is longer than a file's name can be",
            where=where,
            remedy="write the path of a file",
        )
    return image


def _strings(value: Any) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, list | tuple):
        return tuple(
            str(part.get("answer", part) if isinstance(part, dict) else part) for part in value
        )
    return (str(value),)


ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file, each with where it stands; fields without a value are left out.

    Raises:
        TitaError: a line or row does not fit.
    """
    for row in read_rows(path):
        yield row.where, {name: value for name, value in row.parse().items() if value is not None}


def local_path(where: str) -> Path:
    """A local path for `where`; what lies in the store is fetched and verified first.

    Raises:
        TitaError: it is neither here nor in the store.
    """
    if where.startswith(_LOCAL):
        return Path(where).expanduser()
    from tita.storage import open_store, resolve

    return resolve(where, store=open_store())


def question_file(where: str) -> Path:
    """The question file that `where` names: a file, or a folder that holds just one.

    Raises:
        TitaError: there is none, or several.
    """
    path = local_path(where)
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.jsonl"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found) or "none"
    raise TitaError(
        f"a folder with not just one .jsonl file ({names})",
        where=where,
        remedy="name the question file",
    )


def image_folder(images: str | None, *, questions: Path) -> Path:
    """The folder of images: where `images` says, else beside the question file."""
    return questions.parent if images is None else local_path(images)
