"""Manifests: the list of a tree's files. Written last, so a tree is complete or absent.

`manifest.json` lists the files of a tree of up to `PART_FILES`. Of a larger tree it lists parts:

    .tita-<id>/files.jsonl.gz    a part: one JSON object per line and file, sorted by path, gzip

A part is named by its content and read when its files are needed, so the memory that a manifest
takes does not grow with the tree.
"""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tita.errors import DamagedData, TitaError
from tita.terminal import progress

MANIFEST = "manifest.json"
_VERSION, _VERSION_IN_PARTS = 2, 3
"""Version 1 has no `push` and no `etag`."""
PART_FILES = 50_000
"""A manifest of more files is written in parts of this many."""
_READERS = 8
_WAITING = 1024
"""Files that are given to the readers at a time: one that waits takes 2 kB."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DIGEST = re.compile("[0-9a-f]{64}")


class InvalidManifest(DamagedData):
    """An object named `manifest.json` is not a valid manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFile:
    """One file of a tree; `path` is relative to the tree, with forward slashes."""

    path: str
    size_bytes: int
    sha256: str
    key: str | None = None
    """Key of the content, relative to the tree, if it is not `path`."""
    etag: str | None = None
    """ETag of the object in S3, which changes if the object is overwritten."""

    @property
    def stored_at(self) -> str:
        """Key of the content, relative to the tree."""
        return self.key or self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestPart:
    """An object that lists some files of a tree."""

    key: str
    """Relative to the tree."""
    sha256: str
    num_files: int
    first: str
    """Path of its first file."""
    last: str


@dataclass(frozen=True, kw_only=True)
class FilesInParts(Collection[ManifestFile]):
    """The files of a large tree, sorted by path; every iteration reads the parts one by one."""

    parts: tuple[ManifestPart, ...]
    digest: str
    """See `Manifest.digest`."""
    size_bytes: int
    """Total size of the files."""
    read: Callable[[ManifestPart], bytes] = field(compare=False, repr=False)
    """The content of a part; raises `FileNotFoundError` if it is missing."""
    where: str = field(compare=False)
    """Where the manifest is, for errors."""

    def __len__(self) -> int:
        return sum(part.num_files for part in self.parts)

    def __iter__(self) -> Iterator[ManifestFile]:
        for part in self.parts:
            yield from self.files_of(part)

    def __contains__(self, file: object) -> bool:
        return isinstance(file, ManifestFile) and file in self.between(file.path, f"{file.path}\0")

    def between(self, start: str, end: str) -> Iterator[ManifestFile]:
        """The files whose path is at least `start` and less than `end`."""
        for part in self.parts:
            if part.first < end and part.last >= start:
                yield from (file for file in self.files_of(part) if start <= file.path < end)

    def files_of(self, part: ManifestPart) -> tuple[ManifestFile, ...]:
        """The files of a part.

        Raises:
            InvalidManifest: the part is missing or damaged.
            TitaError: a path is outside the tree.
        """
        try:
            data = self.read(part)
            if hashlib.sha256(data).hexdigest() != part.sha256:
                raise ValueError
            lines = gzip.decompress(data).rstrip(b"\n").replace(b"\n", b",")
            files = tuple(ManifestFile(**entry) for entry in json.loads(b"[%s]" % lines))
        except FileNotFoundError:
            what = f"the part {part.key!r} of the manifest is missing"
        except (ValueError, TypeError, EOFError, gzip.BadGzipFile, zlib.error):
            what = f"the part {part.key!r} of the manifest is not what it should be"
        else:
            _check_paths(files, where=self.where)
            return files
        raise InvalidManifest(what, where=self.where, remedy="push the tree again")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The files of one tree, sorted by path, and metadata of its writer."""

    files: tuple[ManifestFile, ...] | FilesInParts
    meta: Mapping[str, Any] = field(default_factory=dict)
    push: str = ""
    """Random id of the push, so that no two pushes write the same manifest."""

    @property
    def digest(self) -> str:
        """SHA-256 of the file list; it does not depend on `meta`."""
        if isinstance(self.files, FilesInParts):
            return self.files.digest
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.sha256} {file.size_bytes} {file.path}\n".encode())
        return digest.hexdigest()

    @property
    def size_bytes(self) -> int:
        if isinstance(self.files, FilesInParts):
            return self.files.size_bytes
        return sum(file.size_bytes for file in self.files)

    @property
    def parts(self) -> tuple[ManifestPart, ...]:
        """The objects that list the files; empty if `manifest.json` does."""
        return self.files.parts if isinstance(self.files, FilesInParts) else ()

    def batches(self) -> Iterator[tuple[ManifestFile, ...]]:
        """The files, part by part; all in one batch if the manifest has no parts."""
        if isinstance(self.files, FilesInParts):
            yield from map(self.files.files_of, self.files.parts)
        else:
            yield self.files

    def in_memory(self) -> "Manifest":
        """The manifest with all its files in memory, about 1 kB each.

        Raises:
            InvalidManifest: a part is missing or damaged.
        """
        return replace(self, files=tuple(self.files))

    def below(self, folder: str) -> "Manifest":
        """The files in one folder of the tree, with paths relative to it; all for an empty name."""
        if not folder:
            return self
        start = f"{folder}/"
        files = tuple(
            replace(file, path=file.path.removeprefix(start), key=file.stored_at)
            for file in self._in_folder(folder)
        )
        return replace(self, files=files)

    def where(self, wanted: Callable[[str], bool]) -> "Manifest":
        """The files whose path is wanted."""
        files = tuple(file for file in self.files if wanted(file.path))
        return self if len(files) == len(self.files) else replace(self, files=files)

    def find(self, path: str) -> ManifestFile | None:
        """The file of this path."""
        files: Iterable[ManifestFile] = self.files
        if isinstance(self.files, FilesInParts):
            files = self.files.between(path, f"{path}\0")
        return next((file for file in files if file.path == path), None)

    def has_folder(self, path: str) -> bool:
        """Whether there is a folder of this path."""
        return next(self._in_folder(path), None) is not None

    def _in_folder(self, folder: str) -> Iterator[ManifestFile]:
        start = f"{folder}/"
        if isinstance(self.files, FilesInParts):
            return self.files.between(start, f"{folder}{chr(ord('/') + 1)}")
        return (file for file in self.files if file.path.startswith(start))

    def in_parts(
        self,
        write: Callable[[str, bytes], object],
        *,
        read: Callable[[ManifestPart], bytes],
        where: str,
    ) -> "Manifest":
        """The manifest as it is stored: with its files in parts if there are many.

        Args:
            write: writes a part to a key relative to the tree.
            read: see `FilesInParts`.
            where: where the manifest is, for errors.
        """
        if isinstance(self.files, FilesInParts) or len(self.files) <= PART_FILES:
            return self
        parts = []
        for start in range(0, len(self.files), PART_FILES):
            some = self.files[start : start + PART_FILES]
            lines = "".join(f"{json.dumps(_entry(file))}\n" for file in some)
            data = gzip.compress(lines.encode(), compresslevel=1, mtime=0)
            sha256 = hashlib.sha256(data).hexdigest()
            part = ManifestPart(
                key=f".tita-{sha256[:16]}/files.jsonl.gz",
                sha256=sha256,
                num_files=len(some),
                first=some[0].path,
                last=some[-1].path,
            )
            write(part.key, data)
            parts.append(part)
        files = FilesInParts(
            parts=tuple(parts),
            digest=self.digest,
            size_bytes=self.size_bytes,
            read=read,
            where=where,
        )
        return replace(self, files=files)

    def to_json(self) -> bytes:
        """The content of `manifest.json`."""
        if isinstance(self.files, FilesInParts):
            body = {
                "version": _VERSION_IN_PARTS,
                "push": self.push,
                "digest": self.digest,
                "size_bytes": self.size_bytes,
                "parts": [asdict(part) for part in self.parts],
                "parts_digest": _digest_parts(self.files),
            }
        else:
            body = {
                "version": _VERSION,
                "push": self.push,
                "digest": self.digest,
                "files": [_entry(file) for file in self.files],
            }
        return json.dumps({**body, "meta": dict(self.meta)}, indent=1).encode()

    @classmethod
    def from_json(
        cls,
        data: bytes,
        *,
        where: str,
        read_part: Callable[[ManifestPart], bytes] | None = None,
    ) -> "Manifest":
        """Parse `manifest.json`.

        Args:
            where: its location, for errors.
            read_part: see `FilesInParts.read`; without it, parts cannot be read.

        Raises:
            InvalidManifest: it is not a manifest, or its digest does not match.
            TitaError: a path is outside the tree.
        """
        try:
            body = json.loads(data)
            if body["version"] > _VERSION_IN_PARTS:
                raise TitaError(
                    "written by a newer version of tita", where=where, remedy="upgrade tita"
                )
            files: tuple[ManifestFile, ...] | FilesInParts
            if "parts" in body:
                files = FilesInParts(
                    parts=tuple(ManifestPart(**entry) for entry in body["parts"]),
                    digest=body["digest"],
                    size_bytes=body["size_bytes"],
                    read=read_part or _no_part,
                    where=where,
                )
                valid = body["parts_digest"] == _digest_parts(files)
            else:
                files = tuple(ManifestFile(**entry) for entry in body["files"])
                valid = body["digest"] == cls(files=files).digest
            manifest = cls(files=files, meta=body.get("meta", {}), push=body.get("push", ""))
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise InvalidManifest("invalid manifest", where=where, remedy="push the tree again")
        if isinstance(manifest.files, tuple):
            _check_paths(manifest.files, where=where)
        for part in manifest.parts:
            _check_path(part.key, where=where)
            _check_digest(part.sha256, where=where)
        _check_digest(manifest.digest, where=where)
        return manifest


def _entry(file: ManifestFile) -> dict[str, object]:
    # `asdict` copies each value, which takes ten times as long.
    values = ((name, getattr(file, name)) for name in ManifestFile.__slots__)
    return {name: value for name, value in values if value is not None}


def _no_part(part: ManifestPart) -> bytes:
    raise FileNotFoundError(part.key)


def _digest_parts(files: FilesInParts) -> str:
    """SHA-256 over what a manifest in parts says of its files."""
    listing = [files.digest, str(files.size_bytes)]
    listing += (f"{p.sha256} {p.num_files} {p.key}\n{p.first}\n{p.last}" for p in files.parts)
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def _check_paths(files: Iterable[ManifestFile], *, where: str) -> None:
    for file in files:
        _check_path(file.path, where=where)
        if file.key is not None:
            _check_path(file.key, where=where)
        _check_digest(file.sha256, where=where)


def _check_path(path: str, *, where: str) -> None:
    if not is_inside(path):
        raise TitaError(f"path {path!r} leaves the tree", where=where)


def _check_digest(sha256: str, *, where: str) -> None:
    """Refuse what is no digest: the cache names its files and folders by them."""
    if not _DIGEST.fullmatch(str(sha256)):
        what = f"{sha256!r} is not a SHA-256"
        raise InvalidManifest(what, where=where, remedy="push the tree again")


def is_inside(path: str) -> bool:
    """Whether a relative path with forward slashes stays inside its folder."""
    return bool(path) and not path.startswith("/") and ".." not in path.split("/")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_complete(path: Path, file: ManifestFile) -> bool:
    """Whether a local file has the size and SHA-256 of a manifest's entry."""
    try:
        is_same_size = path.is_file() and path.stat().st_size == file.size_bytes
        return is_same_size and sha256_of(path) == file.sha256
    except FileNotFoundError:  # a prune removed it meanwhile
        return False


def tree_paths(folder: Path) -> list[str]:
    """Relative paths of all files of a tree, sorted, without a manifest of tita at its root.

    Raises:
        TitaError: there is no such folder, a folder in it cannot be read, a link leads to a folder
            or out of the tree, an entry is neither a file nor a folder, or a name is not UTF-8 or
            has a control character.
    """

    def refuse(error: OSError) -> None:
        # Without its files the push would remove them from the tree.
        what = f"cannot be read ({(error.strerror or str(error)).lower()})"
        raise _rejected(Path(error.filename), what, "check the permissions") from None

    if not folder.is_dir():
        raise TitaError("no such folder", where=str(folder), remedy="check the path")
    found = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        for name in folders:
            if Path(root, name).is_symlink():
                raise _rejected(Path(root, name), "a link to a folder", "use the folder itself")
        folders[:] = sorted(name for name in folders if not name.startswith(".tita-"))
        for name in names:
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
                raise _rejected(path, "a link out of the folder", "copy the file instead")
            if not name.startswith(".tita-") and not (relative == MANIFEST and _is_manifest(path)):
                if not path.is_file():
                    raise _rejected(path, "neither a file nor a folder", "remove it")
                try:
                    relative.encode()
                except UnicodeEncodeError:
                    raise _rejected(path, "the name is not UTF-8", "rename it") from None
                if _CONTROL.search(relative):
                    raise _rejected(path, "the name has a control character", "rename it")
                found.append(relative)
    return sorted(found)


def _is_manifest(path: Path) -> bool:
    """Whether a file is a manifest of tita, and not a user's own `manifest.json`."""
    try:
        Manifest.from_json(path.read_bytes(), where=str(path))
    except (OSError, TitaError):
        return False
    return True


def _rejected(path: Path, what: str, remedy: str) -> TitaError:
    # A name that is not UTF-8 cannot be printed, and one with a line break not in one line.
    text = os.fsencode(path).decode(errors="backslashreplace")
    where = _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
    return TitaError(what, where=where, remedy=remedy)


def build_manifest(
    folder: Path, *, paths: Iterable[str] | None = None, meta: Mapping[str, Any] | None = None
) -> Manifest:
    """The manifest of a local folder; files are hashed concurrently."""
    paths = tree_paths(folder) if paths is None else sorted(paths)
    files: list[ManifestFile] = []
    try:
        sizes = [(folder / path).stat().st_size for path in paths]
        with (
            progress("check", total=sum(sizes), unit="bytes") as advance,
            ThreadPoolExecutor(_READERS) as pool,
        ):
            for start in range(0, len(paths), _WAITING):
                some = paths[start : start + _WAITING]
                digests = pool.map(sha256_of, (folder / path for path in some))
                for path, sha256 in zip(some, digests, strict=True):
                    size_bytes = sizes[len(files)]
                    files.append(ManifestFile(path=path, size_bytes=size_bytes, sha256=sha256))
                    advance(size_bytes)
    except FileNotFoundError as error:
        raise TitaError(
            "the file was removed while the folder was read",
            where=str(error.filename),
            remedy="try again when nothing writes to the folder",
        ) from None
    return Manifest(files=tuple(files), meta=dict(meta or {}))
