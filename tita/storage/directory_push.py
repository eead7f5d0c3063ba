"""A push to a plain directory: a complete copy is staged, and one rename makes it visible.

    <tree>/<path>                       content of the first push
    <tree>/.tita-<id>/<path>            a later push: all its files; unchanged ones are hard links
    <tree>/.tita-stage-<id>/<number>    copies that are being made
    <tree>/.tita-stage-<id>.lock        locked by the process that makes them
    <tree>/.tita-first.json             what the first push writes, until it is complete
    <tree>/.tita-<id>/files.jsonl.gz    a part of the manifest of a large tree
    <tree>/.tita-commit                 locked while the manifest is replaced
    <tree>/.tita-past-<id>.json         a manifest that was replaced; `prune` removes its files

So a reader of a tree, which uses the files in place, is not disturbed by a push. The next push
removes the staging folders of processes that were killed.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.storage.files import atomic_path, lock, locked, try_lock
from tita.storage.manifest import (
    MANIFEST,
    InvalidManifest,
    Manifest,
    ManifestFile,
    ManifestPart,
    build_manifest,
    is_complete,
    sha256_of,
    tree_paths,
)
from tita.storage.push_rules import (
    HIDDEN,
    check_removals,
    check_tree_name,
    has_same_content,
    push_conflict,
    refuse_nesting,
    refuse_store_in_folder,
)
from tita.terminal import progress

PAST = f"{HIDDEN}past-"
CLAIM = f"{HIDDEN}first.json"
STAGE = f"{HIDDEN}stage-"
_LOCK, _COMMIT = ".lock", f"{HIDDEN}commit"
_MANY_FILES = 64
"""From this number on, one `sync` of all disks is faster than one `fsync` per file."""
_NO_LINKS = frozenset(
    (errno.EMLINK, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EXDEV, errno.ENOSYS)
)


def read_manifest(tree: Path) -> tuple[Manifest | None, bytes]:
    """The manifest in a folder and its bytes, or None and b"" without one.

    Raises:
        InvalidManifest: the file is not a manifest.
    """
    try:
        data = (tree / MANIFEST).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None, b""
    return parse_manifest(data, tree), data


def parse_manifest(data: bytes, tree: Path) -> Manifest:
    """The manifest of a tree in a folder, from the content of a file that has it.

    Raises:
        InvalidManifest: it is not a manifest.
    """
    where, read = str(tree / MANIFEST), partial(_read_part, tree)
    return Manifest.from_json(data, where=where, read_part=read)


def _read_part(tree: Path, part: ManifestPart) -> bytes:
    return (tree / part.key).read_bytes()


def _store_in_parts(manifest: Manifest, tree: Path) -> Manifest:
    def write(key: str, data: bytes) -> None:
        (tree / key).parent.mkdir(exist_ok=True)
        with atomic_path(tree / key) as temporary:
            _write_to_disk(temporary, data)

    return manifest.in_parts(write, read=partial(_read_part, tree), where=str(tree / MANIFEST))


@contextmanager
def committing(tree: Path) -> Iterator[None]:
    """Hold the lock that protects the manifest of a tree and the folders of its versions."""
    with locked(tree / _COMMIT):
        try:
            yield
        finally:
            (tree / _COMMIT).unlink(missing_ok=True)


@dataclass(kw_only=True)
class DirectoryPush:
    """One push of a folder to the tree `prefix` of the store in `root`."""

    root: Path
    folder: Path
    prefix: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    max_removed: float = 1.0

    _previous: Manifest | None = None
    _replaced: bytes = b""
    """The manifest that is replaced; empty if there is none."""

    @property
    def _target(self) -> Path:
        return self.root / self.prefix

    def run(self) -> Manifest:
        """Push, and return the manifest; see `Store.push_tree`."""
        check_tree_name(self.prefix, uri=str(self.root))
        target = self._target
        is_in_place = target.resolve() == self.folder.resolve()
        if not is_in_place:
            refuse_store_in_folder(str(self.root), self.folder)
        paths = tree_paths(self.folder)
        self._read_tree()
        check_removals(self._previous, paths, max_removed=self.max_removed, where=str(target))
        manifest = build_manifest(self.folder, paths=paths, meta=self.meta)
        manifest = replace(manifest, push=uuid.uuid4().hex)
        if is_in_place and not _has_version(self._previous) and _may_be_plain(manifest):
            return self._commit(manifest)
        if kept := self._keep_content(manifest):
            return self._commit(kept)
        with staged(target) as stage:
            self._stage(manifest, stage)
            return self._commit(manifest, stage)

    def _read_tree(self) -> None:
        target = self._target
        if target.is_file():
            raise TitaError(
                "there is an object of this name, such as a pointer",
                where=str(target),
                remedy="choose another name for the tree",
            )
        try:
            previous, self._replaced = read_manifest(target)
            self._previous = None if previous is None else previous.in_memory()
        except InvalidManifest:
            self._replaced = (target / MANIFEST).read_bytes()
        own = {file.path for file in self._previous.files} if self._previous else set()
        below = []
        for at, folders, names in os.walk(target):
            folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
            path = Path(at).relative_to(target).as_posix()
            if MANIFEST in names and path != "." and f"{path}/{MANIFEST}" not in own:
                below.append(f"{self.prefix}/{path}")
        refuse_nesting(self.prefix, uri=str(self.root), is_tree=self._is_tree, below=below)

    def _is_tree(self, name: str) -> bool:
        try:
            return read_manifest(self.root / name)[0] is not None
        except InvalidManifest:
            return False  # a user's file of this name

    def _stored(self) -> dict[str, ManifestFile]:
        return {file.path: file for file in self._previous.files} if self._previous else {}

    def _keep_content(self, manifest: Manifest) -> Manifest | None:
        """The manifest with the content of the previous one if all of it is the same and intact."""
        stored = self._stored()
        if self._previous is None or self._previous.digest != manifest.digest:
            return None
        files = tuple(replace(file, key=stored[file.path].key) for file in manifest.files)
        intact = all(is_complete(self._target / file.stored_at, file) for file in files)
        return replace(manifest, files=files) if intact else None

    def _stage(self, manifest: Manifest, stage: "Stage") -> None:
        """Complete copies of all files, verified and on disk."""
        stored = self._stored()
        by_content = {file.sha256: file for file in stored.values()}
        with progress(f"push {self.prefix}", total=manifest.size_bytes, unit="bytes") as advance:
            for file in manifest.files:
                same = stored.get(file.path)
                if same is None or same.sha256 != file.sha256:
                    same = by_content.get(file.sha256)
                existing = self._target / (same.stored_at if same else file.path)
                # A prune may remove what was there.
                if not (is_complete(existing, file) and stage.link(file.path, existing)):
                    source = self.folder / file.path
                    if not stage.copy(file, source):
                        raise TitaError(
                            "changed during the push", where=str(source), remedy="push again"
                        )
                advance(file.size_bytes)
        stage.sync()

    def _commit(self, manifest: Manifest, stage: "Stage | None" = None) -> Manifest:
        """Make the tree visible, if nothing changed it since it was read."""
        target = self._target
        target.mkdir(parents=True, exist_ok=True)
        with committing(target):
            try:
                current, data = read_manifest(target)
            except InvalidManifest:
                current, data = None, (target / MANIFEST).read_bytes()
            if data != self._replaced:
                if current is not None and has_same_content(current, manifest):
                    return current
                raise push_conflict(str(target))
            with suppress(FileNotFoundError):
                # A first push was killed after its claim: `prune` still has to find its files.
                (target / CLAIM).rename(target / f"{PAST}{uuid.uuid4().hex}.json")
            if stage is not None:
                if not data and _may_be_plain(manifest) and _is_free(target, manifest):
                    # If this process is killed, `prune` can tell its files from others.
                    manifest = _store_in_parts(manifest, target)
                    (target / CLAIM).write_bytes(manifest.to_json())
                    stage.rename_all(target)
                else:
                    folder = f"{HIDDEN}{uuid.uuid4().hex[:16]}"
                    stage.rename_all(target / folder)
                    manifest = in_folder(manifest, folder)
            if self._previous is not None and stage is not None:
                # Its modification time is the time since when its files are not used.
                (target / f"{PAST}{uuid.uuid4().hex}.json").write_bytes(data)
            manifest = _store_in_parts(manifest, target)
            with atomic_path(target / MANIFEST) as temporary:
                _write_to_disk(temporary, manifest.to_json())
            (target / CLAIM).unlink(missing_ok=True)
        return manifest


def in_folder(manifest: Manifest, folder: str) -> Manifest:
    """The manifest of a tree whose files are in a folder of the tree's."""
    files = (replace(file, key=f"{folder}/{file.path}") for file in manifest.files)
    return replace(manifest, files=tuple(files))


def _has_version(manifest: Manifest | None) -> bool:
    return manifest is not None and any(file.key is not None for file in manifest.files)


def _may_be_plain(manifest: Manifest) -> bool:
    """Whether no file would make its folder a tree."""
    return not any(file.path.rpartition("/")[2] == MANIFEST for file in manifest.files)


def _is_free(target: Path, manifest: Manifest) -> bool:
    """Whether no file of the tree replaces other content, such as an object."""
    for file in manifest.files:
        path = target / file.path
        if path.exists() and not is_complete(path, file):
            return False
        for parent in path.relative_to(target).parents:
            if (target / parent).is_file():
                return False
    return True


def _write_to_disk(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@dataclass(kw_only=True)
class Stage:
    """Copies of files that will be renamed, in a folder of their own."""

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    """Each copy, by its path in the tree."""

    def copy(self, file: ManifestFile, source: Path) -> bool:
        """Copy a file; whether it has the content that the manifest names."""
        copied = self._add(file.path)
        try:
            shutil.copyfile(source, copied)
            return sha256_of(copied) == file.sha256
        except FileNotFoundError:
            return False

    def link(self, path: str, existing: Path) -> bool:
        """Add a file that the store has; whether it still has it."""
        linked = self._add(path)
        try:
            try:
                # Of a link in a tree that was pushed in place, the file that it leads to.
                os.link(existing.resolve(), linked)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                shutil.copyfile(existing, linked)
        except FileNotFoundError:
            del self.files[path]
            return False
        return True

    def sync(self) -> None:
        """Flush all copies to disk."""
        if len(self.files) > _MANY_FILES:
            os.sync()
            return
        for path in self.files.values():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def rename_all(self, target: Path) -> None:
        """Rename each copy to its path in `target`."""
        target.mkdir(exist_ok=True)
        for path, copied in self.files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                copied.replace(target / path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # A folder in the target may be a link to another disk.
                shutil.copyfile(copied, target / path)

    def _add(self, path: str) -> Path:
        # A copy is named by a number, so that readers of the folder do not take it for data.
        self.files[path] = self.folder / str(len(self.files))
        return self.files[path]


@contextmanager
def staged(target: Path) -> Iterator[Stage]:
    """A staging folder in `target`; what was not renamed is removed at the end."""
    target.mkdir(parents=True, exist_ok=True)
    remove_abandoned_stages(target)
    folder = target / f"{STAGE}{uuid.uuid4().hex}"
    # The lock is created before the folder and removed after it, so a folder without a locked file
    # is abandoned.
    descriptor = lock(_lock_path(folder))
    try:
        folder.mkdir()
        yield Stage(folder=folder)
    finally:
        _remove_stage(folder, descriptor)


def remove_abandoned_stages(target: Path) -> None:
    """Remove the staging folders of processes that were killed."""
    names = {path.name.removesuffix(_LOCK) for path in target.glob(f"{STAGE}*")}
    for name in sorted(names):
        # A folder that cannot be removed does no harm.
        with suppress(OSError):
            descriptor = try_lock(_lock_path(target / name))
            if descriptor is not None:
                _remove_stage(target / name, descriptor)


def _remove_stage(folder: Path, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _lock_path(folder).unlink(missing_ok=True)
    os.close(descriptor)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)
