"""Manifests: the list of a tree's files. Written last, so a tree is complete or absent."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tita.errors import DamagedData, TitaError
from tita.terminal import progress

MANIFEST = "manifest.json"
_VERSION = 2
"""Version 1 has no `push` and no `etag`."""
_READERS = 8
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


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
class Manifest:
    """The files of one tree, sorted by path, and metadata of its writer."""

    files: tuple[ManifestFile, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    push: str = ""
    """Random id of the push, so that no two pushes write the same manifest."""

    @property
    def digest(self) -> str:
        """SHA-256 of the file list; it does not depend on `meta`."""
        listing = "".join(f"{f.sha256} {f.size_bytes} {f.path}\n" for f in self.files)
        return hashlib.sha256(listing.encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def below(self, folder: str) -> "Manifest":
        """The files in one folder of the tree, with paths relative to it; all for an empty name."""
        if not folder:
            return self
        start = f"{folder}/"
        files = tuple(
            replace(file, path=file.path.removeprefix(start), key=file.stored_at)
            for file in self.files
            if file.path.startswith(start)
        )
        return replace(self, files=files)

    def where(self, wanted: Callable[[str], bool]) -> "Manifest":
        """The files whose path is wanted."""
        files = tuple(file for file in self.files if wanted(file.path))
        return self if len(files) == len(self.files) else replace(self, files=files)

    def to_json(self) -> bytes:
        """The content of `manifest.json`."""
        files = [
            {name: value for name, value in asdict(file).items() if value is not None}
            for file in self.files
        ]
        body = {
            "version": _VERSION,
            "push": self.push,
            "digest": self.digest,
            "files": files,
            "meta": dict(self.meta),
        }
        return json.dumps(body, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, *, where: str) -> "Manifest":
        """Parse `manifest.json`.

        Raises:
            InvalidManifest: it is not a manifest, or its digest does not match.
            TitaError: a path is outside the tree.
        """
        try:
            body = json.loads(data)
            if body["version"] > _VERSION:
                raise TitaError(
                    "written by a newer version of tita", where=where, remedy="upgrade tita"
                )
            files = tuple(ManifestFile(**entry) for entry in body["files"])
            manifest = cls(files=files, meta=body.get("meta", {}), push=body.get("push", ""))
            valid = body["digest"] == manifest.digest
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise InvalidManifest("invalid manifest", where=where, remedy="push the tree again")
        for file in manifest.files:
            for path in (file.path, file.stored_at):
                if not is_inside(path):
                    raise TitaError(f"path {path!r} leaves the tree", where=where)
        return manifest


def is_inside(path: str) -> bool:
    """Whether a relative path with forward slashes stays inside its folder."""
    parts = PurePosixPath(path)
    return bool(path) and not parts.is_absolute() and ".." not in parts.parts


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_complete(path: Path, file: ManifestFile) -> bool:
    """Whether a local file has the size and SHA-256 of a manifest's entry."""
    return (
        path.is_file() and path.stat().st_size == file.size_bytes and sha256_of(path) == file.sha256
    )


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
    files = []
    try:
        sizes = [(folder / path).stat().st_size for path in paths]
        with (
            progress("check", total=sum(sizes), unit="bytes") as advance,
            ThreadPoolExecutor(_READERS) as pool,
        ):
            digests = pool.map(sha256_of, (folder / path for path in paths))
            for path, size_bytes, sha256 in zip(paths, sizes, digests, strict=True):
                files.append(ManifestFile(path=path, size_bytes=size_bytes, sha256=sha256))
                advance(size_bytes)
    except FileNotFoundError as error:
        raise TitaError(
            "the file was removed while the folder was read",
            where=str(error.filename),
            remedy="try again when nothing writes to the folder",
        ) from None
    return Manifest(files=tuple(files), meta=dict(meta or {}))
