"""Benchmark questions with images, reference answers and a metric; one row per question.

The model is asked `text` after the turns in `context`; marks of images are removed. The readers of
published suites (`tita.bench.suites`) include the prompt of their protocol in the text.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita.bench.scoring import METRICS, GroupRule, check_metric, normalise_references
from tita.data.dataset import find_image, to_messages
from tita.data.layout_counts import LayoutCounts
from tita.data.layouts import Example, read_examples
from tita.data.row_values import ImageURL, ImageValue
from tita.data.rows import RawRow, read_rows
from tita.errors import TitaError
from tita.records import ContextTurn
from tita.storage import open_store, resolve
from tita.storage.files import atomic_path

ImageWriter = Callable[[bytes], str]
"""Writes an image that is embedded in a row; returns its path below the folder of images."""

QUESTION_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_TABLE_SUFFIXES = (".parquet", ".pq", ".csv", ".tsv")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkItem:
    """One question of a benchmark."""

    id: str
    text: str
    images: tuple[str, ...] = ()
    """Paths relative to the folder of images."""
    references: tuple[str, ...] = ()
    """In the form that the metric compares with (`tita.bench.references`)."""
    choices: tuple[str, ...] = ()
    """Options of a multiple-choice question, in the order of their letters."""
    metric: str = ""
    """Name of a metric in `tita.bench.scoring`; empty: the answer is not scored."""
    suite: str = ""
    """Name of the question set; scores of different suites are never combined."""
    category: str = ""
    group: str = ""
    """Questions scored together: those of one image in MME, the rotations of one in MMBench."""
    context: tuple[ContextTurn, ...] = ()
    """System prompt and earlier turns."""

    def record(self) -> dict[str, Any]:
        """The item as an object of a question file; empty fields are omitted."""
        images = {"image": self.images[0]} if len(self.images) == 1 else {"images": self.images}
        question = (
            {"messages": to_messages(self.context, self.text, num_images=len(self.images))}
            if self.context
            else {"text": self.text}
        )
        fields: dict[str, Any] = {
            "question_id": self.id,
            **question,
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
    path: Path,
    *,
    images: Path | None = None,
    limit: int | None = None,
    default_metric: str = "",
    ignore: Iterable[str] = (),
    write_image: ImageWriter | None = None,
    urls: bool = False,
    layouts: LayoutCounts | None = None,
) -> Iterator[BenchmarkItem]:
    """Read the questions of a file in a format of `read_rows` and a layout of `tita.data.layouts`.

    Args:
        path: the file; with `write_image` also a folder of JSONL and Parquet files.
        images: the folder of images; by default that of the file.
        limit: maximum number of questions.
        default_metric: metric of the questions that name none.
        ignore: columns that are treated as absent.
        write_image: writes embedded images to files; without it such rows are an error.
        urls: leave http(s) URLs of images as they are, for `tita.bench.fetched_images`; without it
            such rows are an error.
        layouts: counts what is read.

    Raises:
        TitaError: the file does not exist, a row is not a question, or an id is not unique.
    """
    if not (path.is_file() or (write_image is not None and path.is_dir())):
        raise TitaError(
            "no such question file", where=str(path), remedy="create one with `tita-bench sample`"
        )
    folder = images or (path if path.is_dir() else path.parent)
    hidden = frozenset(ignore)
    examples = (
        (row, each)
        for row in read_rows(path)
        for each in read_examples(row, ignore=hidden, urls=True)
    )
    seen: set[str] = set()
    for row, example in examples:
        if limit is not None and len(seen) >= limit:
            return
        item = _to_item(
            example, row, images=folder, default_metric=default_metric, write_image=write_image,
            urls=urls,
        )  # fmt: skip
        if item.id in seen:
            raise TitaError(
                f"duplicate question id {item.id!r}",
                where=row.where,
                remedy="give every question its own id",
            )
        seen.add(item.id)
        if layouts is not None:
            layouts.add(example)
        yield item
    if not seen:
        raise TitaError("the file has no questions", where=str(path))


def _to_item(
    example: Example,
    row: RawRow,
    *,
    images: Path,
    default_metric: str,
    write_image: ImageWriter | None,
    urls: bool,
) -> BenchmarkItem:
    # POPE's own files name no metric.
    label = row.parse().get("label")
    is_yes_no = isinstance(label, str) and label.strip().lower() in ("yes", "no")
    metric = example.metric or default_metric or ("yes-no" if is_yes_no else "")
    check_metric(metric, where=row.where)
    if metric in METRICS and METRICS[metric].group is not GroupRule.MEAN and not example.group:
        raise TitaError(
            f"the metric {metric} scores groups of questions, and the question has no `group`",
            where=row.where,
            remedy="give the questions of one image (mme) or one question (circular) one `group`",
        )
    return BenchmarkItem(
        id=example.id,
        text=example.question,
        images=tuple(
            _image_path(image, row, images=images, write_image=write_image, urls=urls)
            for image in example.images
        ),
        references=normalise_references(
            metric, example.references, choices=example.choices, where=row.where
        ),
        choices=example.choices,
        metric=metric,
        suite=example.suite or "",
        category=example.category or "",
        group=example.group or "",
        context=example.context,
    )


def _image_path(
    image: ImageValue, row: RawRow, *, images: Path, write_image: ImageWriter | None, urls: bool
) -> str:
    if isinstance(image, ImageURL):
        if not urls:
            raise TitaError(
                f"the image {image[:60]!r} is a URL, not a file",
                where=row.where,
                remedy="give --fetch-images, or download it and write its path",
            )
        return image
    if isinstance(image, str):
        return find_image(image, images=images, beside=row.file.parent) or image
    if write_image is None:
        raise TitaError(
            "the image is embedded in the row",
            where=row.where,
            remedy="convert the file with "
            "`tita-bench prepare unpack --source FILE --out FOLDER/questions.jsonl`",
        )
    return write_image(image)


def write_items(path: Path, items: Iterable[BenchmarkItem]) -> int:
    """Write a question file atomically; returns the number of questions.

    Raises:
        TitaError: the file name does not end in `.jsonl`, but as a table's does.
    """
    check_target(path)
    num_items = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(item.record(), ensure_ascii=False) + "\n")
            num_items += 1
    return num_items


def check_target(path: Path) -> None:
    """Check that a question file can be written to a path, before its images are.

    Raises:
        TitaError: it is a folder, or has the suffix of a table, as which it would be read.
    """
    if path.is_dir():
        raise TitaError(
            "a folder; questions are written to a file",
            where=str(path),
            remedy=f"name one, such as {path / 'questions.jsonl'}",
        )
    if path.suffix.lower() in _TABLE_SUFFIXES:
        raise TitaError(
            f"question files are written as JSON Lines, not as {path.suffix}",
            where=str(path),
            remedy=f"name it {path.with_suffix('.jsonl').name}",
        )


def local_path(where: str) -> Path:
    """A path as it is; a tree or file in the store is downloaded and verified first.

    Raises:
        TitaError: it is neither in the store nor a path.
    """
    # Such a path is never a tree in the store, so that no store is needed.
    if where.startswith(("/", "./", "../", "~")):
        return Path(where).expanduser()
    return resolve(where, store=open_store())


def question_file(where: str) -> Path:
    """The question file at `where`: a file, or the only JSONL file of a folder.

    Raises:
        TitaError: the folder has no JSONL file, or several.
    """
    path = local_path(where)
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.jsonl"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found) or "none"
    raise TitaError(
        f"expected exactly one .jsonl file in the folder, found {names}",
        where=where,
        remedy="name the question file",
    )


def image_folder(images: str | None, *, questions: Path) -> Path:
    """The folder of images: `images`, by default the folder of the question file."""
    return questions.parent if images is None else local_path(images)
