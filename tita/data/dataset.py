"""Datasets in any supported format as `Pair` and `Question` records with a folder of images.

Also finds the image file of a row, and writes images that are stored in rows to files.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from tita.data.convert import ImageResolver, to_pair, to_question
from tita.data.layout_counts import LayoutCounts
from tita.data.layouts import Example, read_examples
from tita.data.row_cache import hold_images
from tita.data.row_values import ImageValue
from tita.data.rows import RawRow, may_store_images, read_rows
from tita.errors import TitaError
from tita.records import IMAGE_MARK, ContextTurn, Pair, Question, turns_of
from tita.storage.files import atomic_path
from tita.storage.image_shards import find_shards, read_image

_IMAGE_SUFFIXES = (
    ".jpg",
    ".png",
    ".jpeg",
    ".webp",
    ".JPG",
    ".PNG",
    ".JPEG",
    ".gif",
    ".bmp",
    ".tif",
)
# Image folders of TextVQA, OCR-VQA and Hugging Face, also below a common parent, and a common
# misspelling.
_IMAGE_FOLDERS = (
    *("train_images", "images"),
    *("textvqa/train_images", "texvqa/train_images", "ocrvqa/images"),
)
# File names of a COCO 2014 or 2017 image, which annotations refer to by its number.
_COCO_NAMES = ("COCO_train2014_{:012d}.jpg", "COCO_val2014_{:012d}.jpg", "{:012d}.jpg")
_SUFFIX_BY_MAGIC = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"RIFF": ".webp",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A dataset file or folder, and the folder that its records' image paths are relative to.

    Reading an invalid row raises a `TitaError` that names file and line.
    """

    path: Path
    rows: Iterable[RawRow]
    """The rows of `path`; they can be read once."""
    images: Path
    resolve_image: ImageResolver
    ignore: frozenset[str] = frozenset()
    """Columns that are treated as absent."""
    layouts: LayoutCounts = field(default_factory=LayoutCounts)
    """Counts what was read so far."""

    def pairs(self) -> Iterator[Pair]:
        """Yield preference pairs in the order of files and rows."""
        return (
            to_pair(example, row, resolve_image=self.resolve_image)
            for row, example in self.examples()
        )

    def questions(self) -> Iterator[Question]:
        """Yield questions in the order of files and rows; those of pairs are included."""
        return (
            to_question(example, row, resolve_image=self.resolve_image)
            for row, example in self.examples()
        )

    def examples(self) -> Iterator[tuple[RawRow, Example]]:
        """Yield the examples of all rows, with their images as the rows have them."""
        for row in self.rows:
            for example in read_examples(row, ignore=self.ignore):
                self.layouts.add(example)
                yield row, example


def open_dataset(
    path: str | Path, *, images: str | Path | None = None, ignore: Iterable[str] = ()
) -> Dataset:
    """Open a dataset in a format of `read_rows` and a layout of `tita.data.layouts`.

    If rows may store images, all images are written to the cache of this node when their rows are
    read. Their names are digests, so they are the same on every node.

    Args:
        path: a file or a folder.
        images: the folder that image paths are relative to; default: the dataset's folder.
        ignore: columns that are treated as absent.
    """
    path = Path(path)
    folder = default_folder(path, images)
    if may_store_images(path):
        cache = hold_images()
        resolve, folder = partial(extract_image, into=cache, images=folder), cache
    else:
        resolve = partial(resolve_file, images=folder)
    return Dataset(
        path=path,
        rows=read_rows(path),
        images=folder,
        resolve_image=resolve,
        ignore=frozenset(ignore),
    )


def default_folder(path: Path, images: str | Path | None) -> Path:
    """The folder of a dataset's images: `images` if it is given, else the dataset's own."""
    return Path(images) if images else path if path.is_dir() else path.parent


def read_pairs(path: str | Path) -> Iterator[Pair]:
    """Yield the preference pairs of a file or folder; see `open_dataset`."""
    return open_dataset(path).pairs()


def read_questions(path: str | Path) -> Iterator[Question]:
    """Yield the questions of a file or folder; see `open_dataset`."""
    return open_dataset(path).questions()


def write_pairs(pairs: Iterable[Pair]) -> bytes:
    """Return pairs as JSON Lines, with the column names that existing scripts read."""
    lines = (json.dumps(_pair_row(pair), ensure_ascii=False) for pair in pairs)
    return "".join(f"{line}\n" for line in lines).encode()


def _pair_row(pair: Pair) -> dict[str, Any]:
    """A row with a text as question, or with messages if there are earlier turns."""
    start = {"id": pair.id, "image_id": pair.image}
    if pair.rejected_image is not None:
        start["rejected_image"] = pair.rejected_image
    if not pair.context:
        question = {"question": pair.question}
        return {**start, **question, "chosen": pair.chosen, "reject": pair.rejected}
    prompt = to_messages(pair.context, pair.question, num_images=1)
    answers = {
        name: [{"role": "assistant", "content": text}]
        for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
    return {**start, "prompt": prompt, **answers}


def to_messages(
    context: Sequence[ContextTurn], question: str, *, num_images: int
) -> list[dict[str, str]]:
    """A question with its context as messages that are read back to the same."""
    return [
        {"role": turn.role, "content": f"{IMAGE_MARK}\n" * turn.num_leading_images + turn.text}
        for turn in turns_of(context, question, num_images=num_images)
    ]


def find_image(name: str, *, images: Path, beside: Path | None = None) -> str | None:
    """Return the path below `images` of the image file that a row calls `name`, or None.

    Tries the name itself, then the name with a missing suffix or as a COCO number, in the image
    folders of common datasets, and without the folder's own name in front (`data/x/1.jpg` in a
    folder `data`). Each is tried below `images`, then below the folder of the row's file, as a file
    and in shards.

    Args:
        name: a relative path with forward slashes.
        images: the image folder.
        beside: the folder of the row's file.
    """
    if _is_file(images / name):
        return name
    shards = find_shards(images)

    def exists(path: str) -> bool:
        at = images / path
        return _is_file(at) or (shards is not None and shards.find(at) is not None)

    if shards is not None and exists(name):
        return name
    starts = [""]
    if beside is not None:
        # One of them may have been named from the working directory.
        own, root = beside.absolute(), images.absolute()
        if own != root and own.is_relative_to(root):
            starts.append(own.relative_to(root).as_posix())
    for start in starts:
        for candidate in _candidate_names(name, folder=images.name):
            path = (PurePosixPath(start) / candidate).as_posix()
            if exists(path):
                return path
    return None


def _candidate_names(name: str, *, folder: str) -> Iterator[str]:
    bare = name.removeprefix(f"{folder}/")
    names = [bare]
    if PurePosixPath(bare).suffix not in _IMAGE_SUFFIXES:
        names += [bare + suffix for suffix in _IMAGE_SUFFIXES]
    if bare.isdecimal() and len(bare) <= 12:
        names += [pattern.format(int(bare)) for pattern in _COCO_NAMES]
    yield from names
    if "/" not in bare:
        for subfolder in _IMAGE_FOLDERS:
            yield from (f"{subfolder}/{one}" for one in names)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the file system allows
        return False


def resolve_file(image: ImageValue, row: RawRow, *, images: Path) -> str:
    """Return the path of the image file below `images`, or the row's value if there is none."""
    if isinstance(image, bytes):
        raise TitaError(
            "an image in the row, and none in the first rows of the file",
            where=row.where,
            remedy="write all images in the rows, or all as paths",
        )
    return find_image(image, images=images, beside=row.file.parent) or image


def extract_image(image: ImageValue, row: RawRow, *, into: Path, images: Path) -> str:
    """Write an image that the row stores, or names below `images`, to `into`; return its path."""
    if isinstance(image, str):
        found = find_image(image, images=images, beside=row.file.parent)
        if found is None:
            return image
        image = read_image(images / found)
    return write_image(image, into=into)


def write_image(content: bytes, *, into: Path) -> str:
    """Write an image to a folder unless its file exists; return its path below `into`."""
    name = image_name(content)
    path = into / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return name


def image_name(content: bytes) -> str:
    """Return the file name of an image, from the digest of its content."""
    digest = hashlib.sha256(content).hexdigest()
    suffixes = (s for magic, s in _SUFFIX_BY_MAGIC.items() if content.startswith(magic))
    return f"{digest[:2]}/{digest}{next(suffixes, '.img')}"
