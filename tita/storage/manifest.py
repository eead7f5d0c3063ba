"""Manifests: what a tree in the store consists of; written last, so a tree is whole or absent."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tita.errors import TitaError
from tita.terminal import progress

MANIFEST = "manifest.json"
_READERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFile:
    """One file of a tree; `path` is relative to the tree, with forward slashes."""

    path: str
    size_bytes: int
    sha256: str
    key: str | None = None
    """Where the content lies below the tree, if not at `path`: a push is about to put it there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The files of one tree, sorted by path, and what its writer wants known about it."""

    files: tuple[ManifestFile, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the listing: the same for the same files, whatever `meta` says."""
        listing = "".join(f"{f.sha256} {f.size_bytes} {f.path}\n" for f in self.files)
        return hashlib.sha256(listing.encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def to_json(self) -> bytes:
        """The content of `manifest.json`."""
        files = [
            {name: value for name, value in asdict(file).items() if value is not None}
            for file in self.files
        ]
        body = {"version": 1, "digest": self.digest, "files": files, "meta": dict(self.meta)}
        return json.dumps(body, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, *, where: str) -> "Manifest":
        """Read `manifest.json`.

        Raises:
            TitaError: it is no manifest, its digest does not fit, or a path leaves the tree.
        """
        try:
            body = json.loads(data)
            files = tuple(ManifestFile(**entry) for entry in body["files"])
            manifest = cls(files=files, meta=body.get("meta", {}))
            whole = body["digest"] == manifest.digest
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise TitaError("not a whole manifest", where=where, remedy="push the tree again")
        for file in manifest.files:
            for path in (file.path, file.key or file.path):
                if not is_inside(path):
                    raise TitaError(f"path {path!r} leaves the tree", where=where)
        return manifest


def is_inside(path: str) -> bool:
    """Whether a relative path with forward slashes stays below its folder."""
    parts = PurePosixPath(path)
    return bool(path) and not parts.is_absolute() and ".." not in parts.parts


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(path: Path, file: ManifestFile) -> bool:
    """Whether a local file has the size and the SHA-256 that a manifest says."""
    return (
        path.is_file() and path.stat().st_size == file.size_bytes and sha256_of(path) == file.sha256
    )


def files_below(folder: Path) -> list[str]:
    """Relative paths of all files of a tree, sorted; a manifest at its root is not one of them.

    Raises:
        TitaError: a link leads out of the folder or to a folder, something is no file, or a name
            is not UTF-8.
    """
    found = []
    for root, folders, names in os.walk(folder):
        for name in folders:
            if Path(root, name).is_symlink():
                raise _refused(
                    Path(root, name), "a link to a folder", "put the folder itself there"
                )
        folders[:] = sorted(name for name in folders if not name.startswith(".tita-"))
        for name in names:
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
                raise _refused(path, "a link that leaves the folder", "copy the file instead")
            if relative != MANIFEST and not name.startswith(".tita-"):
                if not path.is_file():
                    raise _refused(path, "neither a file nor a folder", "remove it")
                if not _is_utf8(relative):
                    raise _refused(path, "a name that is not UTF-8", "rename it")
                found.append(relative)
    return sorted(found)


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _refused(path: Path, what: str, remedy: str) -> TitaError:
    # A name that is not UTF-8 could not be printed.
    where = os.fsencode(path).decode(errors="backslashreplace")
    return TitaError(what, where=where, remedy=remedy)


def describe(
    folder: Path, *, paths: Iterable[str] | None = None, meta: Mapping[str, Any] | None = None
) -> Manifest:
    """The manifest of a local folder as it is now; files are read side by side."""
    wanted = files_below(folder) if paths is None else sorted(paths)
    sizes = [(folder / path).stat().st_size for path in wanted]
    files = []
    with (
        progress("check", total=sum(sizes), unit="bytes") as advance,
        ThreadPoolExecutor(_READERS) as pool,
    ):
        digests = pool.map(sha256_of, (folder / path for path in wanted))
        for path, size_bytes, sha256 in zip(wanted, sizes, digests, strict=True):
            files.append(ManifestFile(path=path, size_bytes=size_bytes, sha256=sha256))
            advance(size_bytes)
    return Manifest(files=tuple(files), meta=dict(meta or {}))
