"""The images of a dataset by name: where each is, without a copy of it.

Images are files below a folder, or stand in rows, from which they are read when they are needed.
The table is a few files that are mapped into memory, so that it takes no memory of its own.
"""

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped]
from PIL.Image import Image

from tita.data.cells import parse_structure
from tita.data.dataset import find_image, image_name, write_image
from tita.data.digest_set import DigestSet, text_digest
from tita.data.embedded_images import decode_base64, embedded_content
from tita.data.row_cache import hold_images
from tita.data.row_values import ImageValue
from tita.data.rows import RawRow, RowFinder
from tita.errors import TitaError
from tita.storage.image_shards import find_shards, image_digest, read_image
from tita.vlm.images import open_image, read_size

_SCHEMA = pyarrow.schema(
    [
        ("name", pyarrow.string()),
        ("file", pyarrow.int32()),
        ("position", pyarrow.int64()),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
    ]
)
_IN_FOLDER, _EXTRACTED, _MISSING = -1, -2, -3
"""Values of `file` for images that are not read from rows."""
_IMAGES = "images"
"""Folder, beside the table, of images of rows that cannot be read one by one."""
_BATCH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEntry:
    """One image of a table."""

    name: str
    file: int
    """Number of the dataset's file whose row has the image; negative for a file of its own."""
    position: int
    """Of the row, for `RowFinder`."""
    width: int
    height: int
    """Size of an image that stands in a row; 0 if it is unknown."""

    @property
    def is_stored(self) -> bool:
        """Whether it stands in a row. Its name then contains its digest."""
        return self.file not in (_IN_FOLDER, _MISSING)

    @property
    def sha256(self) -> str:
        """Digest of an image that stands in a row."""
        return Path(self.name).stem


class ImageTable:
    """The distinct images of one dataset, numbered in the order of their first rows."""

    def __init__(self, path: Path) -> None:
        """Open what an `ImageTableWriter` has written to a folder."""
        self._path = path
        facts = json.loads((path / "images.json").read_text())
        self.folder = Path(facts["folder"])
        """Of the images that are files."""
        self.missing: str | None = facts["missing"]
        """The first image that is neither stored nor a file."""
        self.has_files: bool = facts["has_files"]
        self.is_stored: bool = facts["is_stored"]
        """Whether images stand in rows."""
        self._finder = RowFinder()
        self._files = [Path(file) for file in facts["files"]]
        self._table = open_table(path / "images.arrow")
        self._digests = np.load(path / "digests.npy", mmap_mode="r")
        self._order = np.load(path / "order.npy", mmap_mode="r")

    def __reduce__(self) -> Any:
        return type(self), (self._path,)

    def __len__(self) -> int:
        return len(self._order)

    def names(self) -> Iterator[str]:
        """The names in order."""
        for batch in self._table.column("name").chunks:
            yield from batch.to_pylist()

    def __getitem__(self, number: int) -> ImageEntry:
        (row,) = self._table.slice(number, 1).to_pylist()
        return ImageEntry(**row)

    def entries(self, start: int, stop: int) -> list[ImageEntry]:
        """Those from number `start` to before `stop`."""
        rows = self._table.slice(start, max(0, stop - start)).to_pylist()
        return [ImageEntry(**row) for row in rows]

    def number(self, name: str) -> int | None:
        """The number of an image; None if it is not one of this dataset."""
        digest = np.uint64(text_digest(name))
        place = int(np.searchsorted(self._digests, digest))
        while place < len(self._digests) and self._digests[place] == digest:
            number = int(self._order[place])
            if self._table.column("name")[number].as_py() == name:
                return number
            place += 1
        return None

    def read(self, entry: ImageEntry) -> bytes:
        """The content of an image that stands in a row.

        Raises:
            TitaError: the row has changed since.
        """
        if entry.file == _EXTRACTED:
            return (self._path / _IMAGES / entry.name).read_bytes()
        file = self._files[entry.file]
        for content in _contents(self._finder.read(file, entry.position)):
            if image_name(content) == entry.name:
                return content
        raise TitaError(
            "the dataset has changed since it was read",
            where=str(file),
            remedy="start again",
        )


class ImageTableWriter:
    """Writes the table of the images that it resolves."""

    def __init__(self, path: Path, *, folder: Path) -> None:
        """Write to `path`; `folder` has the images that are files."""
        self._path, self._folder = path, folder
        self._files: dict[Path, int] = {}
        self._known, self._digests = DigestSet(), array("Q")
        self._entries: list[ImageEntry] = []
        self._missing: str | None = None
        self._kinds: set[bool] = set()
        self.searched: dict[str, int] = {}
        """Modification times of folders in which images were found, and of an index of shards."""
        if (shards := find_shards(folder)) is not None:
            self._note(shards.index)
        self._sink = pyarrow.ipc.new_file(str(path / "images.arrow"), _SCHEMA)

    def resolve(self, image: ImageValue, row: RawRow) -> str:
        """An image's name, of which a new one is added: `ImageResolver` for a dataset."""
        if isinstance(image, bytes):
            name = image_name(image)
            if self._known.add(name):
                self._add(self._of_row(name, image, row))
            return name
        found = find_image(image, images=self._folder, beside=row.file.parent)
        name = found or image
        if self._known.add(name):
            if found is None:
                self._missing = self._missing or name
            self._note((self._folder / name).parent)
            file = _IN_FOLDER if found else _MISSING
            self._add(ImageEntry(name=name, file=file, position=0, width=0, height=0))
        return name

    def _of_row(self, name: str, content: bytes, row: RawRow) -> ImageEntry:
        try:
            width, height = read_size(content, where=row.where)
        except TitaError:
            width = height = 0  # it is reported when it is opened
        file, position = _EXTRACTED, 0
        if row.position is not None and content in _contents(row.parse()):
            file = self._files.setdefault(row.file.absolute(), len(self._files))
            position = row.position
        else:
            write_image(content, into=self._path / _IMAGES)
        return ImageEntry(name=name, file=file, position=position, width=width, height=height)

    def _note(self, path: Path) -> None:
        name = str(path.absolute())
        if name not in self.searched:
            self.searched[name] = modified_ns(path)

    def _add(self, entry: ImageEntry) -> None:
        self._digests.append(text_digest(entry.name))
        self._kinds.add(entry.is_stored)
        self._entries.append(entry)
        if len(self._entries) == _BATCH:
            self._write_batch()

    def _write_batch(self) -> None:
        rows = [asdict(entry) for entry in self._entries]
        self._sink.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=_SCHEMA))
        self._entries.clear()

    def close(self) -> None:
        """Write what is left."""
        if self._entries:
            self._write_batch()
        self._sink.close()
        digests = np.frombuffer(self._digests, dtype=np.uint64)
        order = np.argsort(digests, kind="stable").astype(np.int32)
        np.save(self._path / "digests.npy", digests[order])
        np.save(self._path / "order.npy", order)
        facts = {
            "folder": str(self._folder.absolute()),
            "missing": self._missing,
            "has_files": False in self._kinds,
            "is_stored": True in self._kinds,
            "files": [str(file) for file in self._files],
        }
        (self._path / "images.json").write_text(json.dumps(facts))


def modified_ns(path: Path) -> int:
    """A modification time; 0 without such a path."""
    try:
        return path.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return 0


def open_table(path: Path) -> Any:
    """An Arrow file as a table whose columns are mapped into memory."""
    return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()


def _contents(value: Any) -> Iterator[bytes]:
    """The images in a row, whatever its layout is; other bytes and texts in base64, too."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, str):
        embedded = embedded_content(value)
        if embedded is not None:
            content = decode_base64(embedded)
            if content is not None:
                yield content
        elif (parsed := parse_structure(value)) is not value:
            yield from _contents(parsed)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _contents(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _contents(part)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource:
    """The images of one or more datasets, by name."""

    tables: tuple[ImageTable, ...]
    folder: Path
    """Of the images that are files."""

    @property
    def has_files(self) -> bool:
        """Whether an image is a file."""
        return any(table.has_files for table in self.tables)

    def find(self, name: str) -> tuple[ImageTable, ImageEntry] | None:
        """An image that stands in a row, and its table; None for a file."""
        for table in self.tables:
            number = table.number(name) if table.is_stored else None
            if number is not None and (entry := table[number]).is_stored:
                return table, entry
        return None


Images = Path | ImageSource
"""Where images are: below a folder, or in rows, too."""


def image_content(images: Images, name: str) -> bytes:
    """The content of an image's file, or of a row.

    Raises:
        TitaError: it is not there.
    """
    found = images.find(name) if isinstance(images, ImageSource) else None
    if found is not None:
        table, entry = found
        return table.read(entry)
    return read_file(image_folder(images) / name)


def read_file(path: Path) -> bytes:
    """The content of an image's file, which may be in a shard.

    Raises:
        TitaError: there is none.
    """
    try:
        return read_image(path)
    except OSError:
        open_image(path)
        raise


def open_picture(images: Images, name: str) -> Image:
    """The decoded image of a file or a row; see `open_image`."""
    found = images.find(name) if isinstance(images, ImageSource) else None
    if found is None:
        return open_image(image_folder(images) / name)
    table, entry = found
    return open_image(table.read(entry), where=name)


def image_file(images: Images, name: str) -> Path:
    """A file with the image; one that stands in a row is written to the node's cache."""
    found = images.find(name) if isinstance(images, ImageSource) else None
    if found is None:
        return image_folder(images) / name
    table, entry = found
    cache = hold_images()
    return cache / write_image(table.read(entry), into=cache)


def image_sha256(images: Images, name: str) -> str:
    """The digest of an image's content."""
    found = images.find(name) if isinstance(images, ImageSource) else None
    if found is not None:
        return found[1].sha256
    return image_digest(image_folder(images) / name)


def image_folder(images: Images) -> Path:
    """The folder of the images that are files."""
    return images.folder if isinstance(images, ImageSource) else images
