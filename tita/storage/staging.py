"""Checked copies of files on their way into a folder, which nobody else sees or takes for theirs.

    <folder>/.tita-stage-<id>/<number>    the copies, on the same file system as where they go
    <folder>/.tita-stage-<id>.lock        held by the process that makes them until it ends

Whoever stages next removes what processes left that were killed.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tita.errors import TitaError
from tita.storage.locks import lock, try_lock
from tita.storage.manifest import Manifest, is_whole, sha256_of
from tita.terminal import progress

_LOCK = ".lock"
_PREFIX = ".tita-stage-"
_MANY_FILES = 64
"""From here on one flush of all disks costs less than one a file."""


@dataclass(kw_only=True)
class Stage:
    """Files that wait for their place in `target`."""

    target: Path
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    """Where they wait, by path below the target."""

    def copy(self, source: Path, manifest: Manifest, *, differs: str) -> None:
        """Copy what the target lacks.

        Args:
            differs: what to say of a file that is not what the manifest says.

        Raises:
            TitaError: there is one.
        """
        with progress("copy", total=manifest.size_bytes, unit="bytes") as advance:
            for file in manifest.files:
                if not is_whole(self.target / file.path, file):
                    copied = self._next(file.path)
                    shutil.copyfile(source / file.path, copied)
                    if sha256_of(copied) != file.sha256:
                        where = str(source / file.path)
                        raise TitaError(differs, where=where, remedy="push it again")
                advance(file.size_bytes)

    def write(self, path: str, data: bytes) -> None:
        """Stage a file of this content."""
        self._next(path).write_bytes(data)

    def flush(self) -> None:
        """Have all files on the disk, before a manifest says that they are there."""
        if len(self.files) > _MANY_FILES:
            os.sync()
            return
        for path in self.files.values():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def move_in(self) -> None:
        """Put all files where they belong, each in one step, in the order they were staged."""
        for path, waiting in self.files.items():
            (self.target / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                waiting.replace(self.target / path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # A folder of the target may be a link to another disk.
                shutil.copyfile(waiting, self.target / path)

    def _next(self, path: str) -> Path:
        # Numbers have no ending by which readers of the folder would take them for data.
        self.files[path] = self.folder / str(len(self.files))
        return self.files[path]


@contextmanager
def stage(target: Path) -> Iterator[Stage]:
    """A stage in `target`, gone with all that was not moved in."""
    target.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    folder = target / f"{_PREFIX}{uuid.uuid4().hex}"
    # The lock is there before the folder and goes after it: what is not locked is nobody's.
    held = lock(_lock_of(folder))
    try:
        folder.mkdir()
        yield Stage(target=target, folder=folder)
    finally:
        _end(folder, held)


def _sweep(target: Path) -> None:
    names = {path.name.removesuffix(_LOCK) for path in target.glob(f"{_PREFIX}*")}
    for name in sorted(names):
        # What cannot be removed is in nobody's way.
        with suppress(OSError):
            held = try_lock(_lock_of(target / name))
            if held is not None:
                _end(target / name, held)


def _end(folder: Path, held: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _lock_of(folder).unlink(missing_ok=True)
    os.close(held)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)
