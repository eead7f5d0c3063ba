"""Images in shards: tar files in the format of WebDataset, and an index that finds each image.

    shards/00000.tar       images, under their paths relative to the folder that has `shards`
    shards/index.sqlite    of every image: its shard, position and size in it, and SHA-256

A path below that folder names an image whether it is a file or in a shard: `read_image` and
`is_image` take either. Images are read from their shards, which are not unpacked.
"""

import hashlib
import os
import sqlite3
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from tita.errors import DamagedData, TitaError
from tita.storage.manifest import Manifest, sha256_of
from tita.terminal import progress

SHARDS = "shards"
INDEX = f"{SHARDS}/index.sqlite"
PACKED_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
"""Files with these suffixes, in any case, are packed."""
_META = "image_shards"
"""Key in the metadata of a tree."""
_APPLICATION_ID = 0x74697461
_VERSION = 1
_SCHEMA = f"""
PRAGMA journal_mode = OFF;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
CREATE TABLE shards (number INTEGER PRIMARY KEY, name TEXT, size_bytes INTEGER, sha256 TEXT);
CREATE TABLE images (
    path TEXT PRIMARY KEY, shard INTEGER, position INTEGER, size_bytes INTEGER, sha256 TEXT
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedImage:
    """Where an image is in its shard."""

    shard: str
    """Name of the file in `shards`."""
    position: int
    size_bytes: int
    sha256: str


class ImageShards:
    """The images in the shards of one folder; threads and forked processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = folder / INDEX
        self._local = threading.local()
        (application,) = self._one("PRAGMA application_id") or (0,)
        (version,) = self._one("PRAGMA user_version") or (0,)
        self.is_valid = application == _APPLICATION_ID
        """False if the file is not an index of tita."""
        if self.is_valid and version > _VERSION:
            raise TitaError(
                "written by a newer version of tita", where=str(self.index), remedy="upgrade tita"
            )

    def find(self, path: Path) -> PackedImage | None:
        """The image of a path, or None."""
        row = self._one(
            "SELECT name, position, images.size_bytes, images.sha256 FROM images "
            "JOIN shards ON shard = number WHERE path = ?",
            self._name(path),
        )
        if row is None:
            return None
        return PackedImage(shard=row[0], position=row[1], size_bytes=row[2], sha256=row[3])

    def has_folder(self, path: Path) -> bool:
        """Whether there are images below a path."""
        name = self._name(path)
        question = "SELECT 1 FROM images WHERE path >= ? AND path < ? LIMIT 1"
        end = f"{name}{chr(ord('/') + 1)}"
        return name == "." or self._one(question, f"{name}/", end) is not None

    def in_other_case(self, path: Path) -> str | None:
        """The name of an image whose path differs only in the case of ASCII letters."""
        question = "SELECT path FROM images WHERE path = ? COLLATE NOCASE LIMIT 1"
        row = self._one(question, self._name(path))
        return None if row is None else str(row[0]).rpartition("/")[2]

    def paths(self) -> Iterator[str]:
        """The paths of all images."""
        return (str(path) for (path,) in self._rows("SELECT path FROM images"))

    def _name(self, path: Path) -> str:
        """The name that an image of this path has in the index, in which no name has `..`."""
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def read(self, image: PackedImage) -> bytes:
        """The content of an image.

        Raises:
            DamagedData: the shard is missing, or does not have the image that the index names.
        """
        # A name, not a path out of the folder, whatever the index says.
        shard = self.folder / SHARDS / Path(image.shard).name
        try:
            with shard.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), image.size_bytes, image.position)
        except FileNotFoundError:
            raise self._damaged(image, "missing") from None
        found = hashlib.sha256(data).hexdigest()
        if found != image.sha256:
            what = f"damaged: the SHA-256 of an image at {image.position} is {found[:16]}..., "
            raise self._damaged(image, f"{what}not {image.sha256[:16]}...")
        return data

    def _damaged(self, image: PackedImage, what: str) -> DamagedData:
        (sha256,) = self._one("SELECT sha256 FROM shards WHERE name = ?", image.shard) or ("?",)
        return DamagedData(
            f"the shard {image.shard!r} with SHA-256 {sha256} is {what}",
            where=str(self.folder / SHARDS / image.shard),
            remedy="pull the tree again, or push it again",
        )

    def _one(self, question: str, *values: str) -> tuple[Any, ...] | None:
        return next(self._rows(question, *values), None)

    def _rows(self, question: str, *values: str) -> Iterator[tuple[Any, ...]]:
        local = self._local
        if getattr(local, "process", None) != os.getpid():
            # A connection may not be used by another thread, nor by a forked process.
            uri = f"{self.index.as_uri()}?mode=ro&immutable=1"
            local.process, local.connection = os.getpid(), sqlite3.connect(uri, uri=True)
        try:
            yield from local.connection.execute(question, values)
        except UnicodeEncodeError:  # an unpaired surrogate, which no name of an image has
            return
        except sqlite3.DatabaseError as error:
            raise DamagedData(
                f"the index of the shards cannot be read ({error})",
                where=str(self.index),
                remedy="pull the tree again, or push it again",
            ) from None


_opened: dict[Path, tuple[tuple[int, ...], ImageShards]] = {}
"""By folder: what identifies the file of the index, and the shards."""


def find_shards(folder: Path) -> ImageShards | None:
    """The shards whose images a folder may have: those of the folder itself or of one above it."""
    folder = Path(os.path.abspath(folder))  # without `..`
    for at in (folder, *folder.parents):
        try:
            found = (at / INDEX).stat()
        except OSError:
            continue
        identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        known = _opened.get(at)
        if known is None or known[0] != identity:
            known = _opened[at] = identity, ImageShards(at)
        if known[1].is_valid:
            return known[1]
    return None


def is_image(path: Path, *, shards: ImageShards | None = None) -> bool:
    """Whether there is a file of this path, or an image in a shard.

    Args:
        shards: those of a folder above `path`, if they are known; else they are looked for.
    """
    try:
        if path.is_file():
            return True
    except OSError:  # a name longer than the file system allows
        return False
    shards = shards or find_shards(path.parent)
    return shards is not None and shards.find(path) is not None


def is_image_folder(path: Path) -> bool:
    """Whether there is a folder of this path, or a shard has images below it."""
    if path.is_dir():
        return True
    shards = find_shards(path)
    return shards is not None and shards.has_folder(path)


def read_image(path: Path) -> bytes:
    """The content of a file, or of an image in a shard.

    Raises:
        OSError: there is neither, or the file cannot be read.
        DamagedData: the shard is damaged.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        shards = find_shards(path.parent)
        image = shards and shards.find(path)
        if not shards or not image:
            raise
    return shards.read(image)


def image_digest(path: Path) -> str:
    """SHA-256 of a file, or of an image in a shard, which the index has.

    Raises:
        OSError: there is neither, or the file cannot be read.
    """
    if path.is_file():
        return sha256_of(path)
    shards = find_shards(path.parent)
    image = shards and shards.find(path)
    return image.sha256 if image else sha256_of(path)


def images_digest(paths: Iterable[Path]) -> str | None:
    """SHA-256 over several images in order; None without images, or if one cannot be read."""
    try:
        digests = [image_digest(path) for path in paths]
    except OSError:
        return None
    return hashlib.sha256("\n".join(digests).encode()).hexdigest() if digests else None


def image_version(path: Path) -> str:
    """What changes with an image: size and time of its file, or its digest in a shard.

    Raises:
        OSError: there is neither.
    """
    try:
        found = path.stat()
    except OSError:
        shards = find_shards(path.parent)
        image = shards and shards.find(path)
        if not image:
            raise
        return image.sha256
    return f"{found.st_size} {found.st_mtime_ns}"


def name_in_other_case(path: Path) -> str | None:
    """Name of a file or image whose name differs from that of `path` only in its case."""
    names = (file.name for file in path.parent.glob("*"))
    similar = next((name for name in names if name.casefold() == path.name.casefold()), None)
    shards = find_shards(path.parent)
    return similar or (shards.in_other_case(path) if shards else None)


def is_packed(path: str) -> bool:
    """Whether a file of this path is packed into a shard."""
    return os.path.splitext(path)[1].lower() in PACKED_SUFFIXES


def pack_images(folder: Path, paths: Sequence[str], *, into: Path, shard_bytes: int) -> None:
    """Write images to `into/shards`. The same images give the same shards.

    A shard ends where the name of an image says so, between half of `shard_bytes` and all of it. So
    a new image changes one shard, and not all those behind it.

    Args:
        folder: the folder of the images.
        paths: their paths in it, sorted.
        shard_bytes: size of the largest shard; a larger image has a shard of its own.
    """
    (into / SHARDS).mkdir()
    try:
        sizes = {path: (folder / path).stat().st_size for path in paths}
        with (
            closing(sqlite3.connect(into / INDEX)) as index,
            progress("pack", total=sum(sizes.values()), unit="bytes") as advance,
        ):
            index.executescript(_SCHEMA)
            for number, some in enumerate(_split(sizes, shard_bytes=shard_bytes)):
                name = f"{number:05}.tar"
                shard = into / SHARDS / name
                with shard.open("wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
                    for path in some:
                        data = (folder / path).read_bytes()
                        # Without owner and times, which differ between machines.
                        entry = tarfile.TarInfo(path)
                        entry.size = len(data)
                        archive.addfile(entry, BytesIO(data))
                        position = file.tell() - _padded(len(data))
                        digest = hashlib.sha256(data).hexdigest()
                        index.execute(
                            "INSERT INTO images VALUES (?, ?, ?, ?, ?)",
                            (path, number, position, len(data), digest),
                        )
                        advance(len(data))
                index.execute(
                    "INSERT INTO shards VALUES (?, ?, ?, ?)",
                    (number, name, shard.stat().st_size, sha256_of(shard)),
                )
            index.commit()
    except FileNotFoundError as error:
        raise TitaError(
            "removed during the push", where=str(error.filename), remedy="push again"
        ) from None


def _split(sizes: Mapping[str, int], *, shard_bytes: int) -> Iterator[list[str]]:
    """The paths of the images of each shard."""
    some: list[str] = []
    filled = 0
    for path, size_bytes in sizes.items():
        size = tarfile.BLOCKSIZE + _padded(size_bytes)
        if some and filled + size > shard_bytes:
            yield some
            some, filled = [], 0
        some.append(path)
        filled += size
        # The name decides, and after half a shard another quarter is expected to follow.
        drawn = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8]) / 2**64
        if filled >= shard_bytes / 2 and drawn < 4 * size / shard_bytes:
            yield some
            some, filled = [], 0
    if some:
        yield some


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def describe(paths: Iterable[str]) -> dict[str, Any]:
    """Metadata of a tree with these images in shards: their number, and the folders they are in."""
    counts = Counter(path.rpartition("/")[0] for path in paths)
    folders = {"/".join(folder.split("/")[:depth]) for folder in counts for depth in (1, 2)}
    return {_META: {"num_images": counts.total(), "folders": sorted(folders - {""})}}


def describe_folder(folder: Path) -> dict[str, Any]:
    """Metadata of a tree of this folder's files: of the images in its shards, if it has any."""
    shards = find_shards(folder)
    is_own = shards is not None and shards.folder == Path(os.path.abspath(folder))
    return describe(shards.paths()) if shards and is_own else {}


def num_packed(manifest: Manifest) -> int:
    """Number of images that a tree has in shards."""
    number: int = manifest.meta.get(_META, {}).get("num_images", 0)
    return number


def is_packed_folder(manifest: Manifest, path: str) -> bool:
    """Whether a tree has images in a folder in its shards; below the second level it may have.

    So it may where nothing is known of its shards, which somebody pushed as files.
    """
    if _META not in manifest.meta:
        return manifest.find(INDEX) is not None
    return "/".join(path.split("/")[:2]) in manifest.meta[_META]["folders"]
