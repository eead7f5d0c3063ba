"""Datasets of people, in whatever form, as records and a folder of images."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tita.data.convert import Picture, Place, pair_of, picture_in, question_of
from tita.data.rows import Row, rows_of
from tita.errors import TitaError
from tita.records import Pair, Question
from tita.storage.files import atomic_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Records in a file or folder, and the folder that their images' names start from."""

    path: Path
    images: Path
    place: Place

    def pairs(self) -> Iterator[Pair]:
        """Preference pairs, in the order of files and rows.

        Raises:
            TitaError: names file and line, or row.
        """
        return (pair_of(row, place=self.place) for row in rows_of(self.path))

    def questions(self) -> Iterator[Question]:
        """Questions, in the order of files and rows.

        Raises:
            TitaError: names file and line, or row.
        """
        return (question_of(row, place=self.place) for row in rows_of(self.path))


def open_dataset(path: Path, *, images: Path | None = None) -> Dataset:
    """A dataset in any of these forms, told by names and content.

    - JSON Lines, or a JSON array in a file `.json`; CSV or TSV; Parquet; a folder with any number
      of JSONL and Parquet files below it; a folder that `datasets.save_to_disk` wrote.
    - Pairs: `image_id` (or `image`, `file_name`), `question` (or `prompt`, `text`), `chosen`,
      `reject` (or `rejected`); or TRL's conversational columns with `images`, the prompt in a
      column of its own or implied; an `id` is optional.
    - Questions: `text` (or `question`, `prompt`), `image` (or `image_id`), and optionally
      `question_id` (or `id`), `answer` (or `answers`, `references`, `label`) and `category`; or
      LLaVA's `conversations`, of which the first question counts.

    Images that stand inside the rows are written, as they are read, to a folder in the cache of
    this node, under their digests: every node calls them the same.

    Args:
        path: a file or a folder.
        images: what image paths start from; the folder if not given.
    """
    folder = images or (path if path.is_dir() else path.parent)
    if not _images_inside(path):
        return Dataset(path=path, images=folder, place=Beside(images=folder))
    from tita.settings import settings

    into = settings().cache_dir.expanduser() / "images"
    return Dataset(path=path, images=into, place=Unpacked(into=into, images=folder))


def read_pairs(path: Path) -> Iterator[Pair]:
    """Preference pairs of a file or folder whose images lie beside it; see `open_dataset`."""
    return open_dataset(path).pairs()


def read_questions(path: Path) -> Iterator[Question]:
    """Questions of a file or folder whose images lie beside it; see `open_dataset`."""
    return open_dataset(path).questions()


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


def _images_inside(path: Path) -> bool:
    """Whether the first row that has an image has it inside."""
    for row in rows_of(path):
        try:
            picture = picture_in(row)
        except TitaError:
            return False
        if picture is not None:
            return isinstance(picture, bytes)
    return False


_ENDINGS = (".jpg", ".png", ".jpeg", ".webp", ".JPG", ".PNG", ".JPEG", ".gif", ".bmp")
# Where TextVQA, OCR-VQA and Hugging Face's image folders keep theirs, and these folders as people
# lay them side by side, the common misspelling of one of them included.
_SUBFOLDERS = (
    *("train_images", "images"),
    *("textvqa/train_images", "texvqa/train_images", "ocrvqa/images"),
)
# COCO 2014 and 2017 name image 42 so; annotations and questions say 42.
_COCO = ("COCO_train2014_{:012d}.jpg", "COCO_val2014_{:012d}.jpg", "{:012d}.jpg")
_MAGIC = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp"}


def find_image(name: str, *, images: Path, beside: Path | None = None) -> str | None:
    """The path below `images` of the file that a row calls `name`; None if there is none.

    A name as it stands comes first; then with an ending it lacks, with the ids of COCO filled up,
    in `train_images`, `images` or those of TextVQA and OCR-VQA, and without the folder's own name
    before it (`data/x/1.jpg` in a folder `data`); all that from `images`, then from the folder of
    the row's file.

    Args:
        name: relative, with forward slashes.
        images: the folder that names start from.
        beside: the folder of the row's file.
    """
    if _is_file(images / name):
        return name
    starts = [""]
    if beside is not None and beside != images and beside.is_relative_to(images):
        starts.append(beside.relative_to(images).as_posix())
    for start in starts:
        for spelling in _spellings(name, folder=images.name):
            path = (PurePosixPath(start) / spelling).as_posix()
            if _is_file(images / path):
                return path
    return None


def _spellings(name: str, *, folder: str) -> Iterator[str]:
    bare = name.removeprefix(f"{folder}/")
    names = [bare]
    if PurePosixPath(bare).suffix not in _ENDINGS:
        names += [bare + ending for ending in _ENDINGS]
    if bare.isdecimal() and len(bare) <= 12:
        names += [pattern.format(int(bare)) for pattern in _COCO]
    yield from names
    if "/" not in bare:
        for subfolder in _SUBFOLDERS:
            yield from (f"{subfolder}/{one}" for one in names)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the file system allows
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Images that are files below a folder."""

    images: Path

    def __call__(self, picture: Picture, row: Row) -> str:
        """The name of the image's file; as the row has it, if there is no such file."""
        if isinstance(picture, bytes):
            raise TitaError(
                "an image inside, where the rows before name files",
                where=row.where,
                remedy="keep both kinds in files of their own",
            )
        return find_image(picture, images=self.images, beside=row.file.parent) or picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """Images that stand inside the rows, written to a folder under their digests."""

    into: Path
    images: Path
    """Where the images of rows are that name a file after all."""

    def __call__(self, picture: Picture, row: Row) -> str:
        """Write the image unless it is there; its name below `into`."""
        if isinstance(picture, str):
            found = find_image(picture, images=self.images, beside=row.file.parent)
            if found is None:
                return picture
            picture = (self.images / found).read_bytes()
        return write_picture(picture, into=self.into)


def write_picture(picture: bytes, *, into: Path) -> str:
    """Write an image to a folder unless it is there; its name below `into`."""
    name = unpacked_name(picture)
    path = into / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may unpack the same image.
        with atomic_path(path) as temporary:
            temporary.write_bytes(picture)
    return name


def unpacked_name(picture: bytes) -> str:
    """The name of an image by its content."""
    digest = hashlib.sha256(picture).hexdigest()
    ending = next((end for magic, end in _MAGIC.items() if picture.startswith(magic)), ".img")
    return f"{digest[:2]}/{digest}{ending}"
