"""Removes files of trees in a directory that no manifest names: old versions, and leftovers."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from tita.errors import TitaError
from tita.storage.directory_push import (
    CLAIM,
    PAST,
    committing,
    parse_manifest,
    read_manifest,
    remove_abandoned_stages,
)
from tita.storage.manifest import MANIFEST, Manifest, ManifestFile, is_complete
from tita.storage.push_rules import HIDDEN
from tita.storage.store import PruneState, UnusedContent
from tita.terminal import say

_TEMPORARY = re.compile(re.escape(HIDDEN) + "[0-9a-f]{32}")
_VERSION = re.compile(re.escape(HIDDEN) + "[0-9a-f]{16}")


@dataclass(kw_only=True)
class _Unused:
    """What one tree has that its manifest does not name."""

    files: list[Path] = field(default_factory=list)
    size_bytes: int = 0
    records: list[Path] = field(default_factory=list)
    """Manifests that were replaced, and claims, which can go with their files."""
    is_recent: bool = False
    """There is more, which is not old enough."""


def find_unused(root: Path, prefix: str, *, older_than: timedelta) -> list[UnusedContent]:
    """Content that `prune` would remove, or is not old enough to be removed."""
    return [
        _result(root, tree, unused, PruneState.REMOVABLE)
        for tree in _trees(root, prefix)
        if (unused := _find(tree, older_than)).files or unused.is_recent
    ]


def prune(root: Path, prefix: str, *, older_than: timedelta) -> list[UnusedContent]:
    """Remove unused content of the trees whose names begin with `prefix`."""
    results = []
    for tree in _trees(root, prefix):
        remove_abandoned_stages(tree)
        # No push is between its renames and its manifest.
        with committing(tree):
            unused = _find(tree, older_than)
            for path in unused.files:
                path.unlink(missing_ok=True)
                _remove_empty(path.parent, tree)
            for path in unused.records:
                path.unlink(missing_ok=True)
        if unused.files or unused.is_recent:
            results.append(_result(root, tree, unused, PruneState.REMOVED))
    return results


def _result(root: Path, tree: Path, unused: _Unused, state: PruneState) -> UnusedContent:
    return UnusedContent(
        tree=tree.relative_to(root).as_posix(),
        num_objects=len(unused.files),
        size_bytes=unused.size_bytes,
        state=state if unused.files else PruneState.RECENT,
    )


def _trees(root: Path, prefix: str) -> Iterator[Path]:
    start = root / prefix.rpartition("/")[0]
    for at, folders, names in os.walk(start):
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
        tree = Path(at)
        if tree == root or not tree.relative_to(root).as_posix().startswith(prefix):
            continue
        if MANIFEST in names or CLAIM in names:
            yield tree


def _find(tree: Path, older_than: timedelta) -> _Unused:
    unused = _Unused()
    try:
        current, _ = read_manifest(tree)
        named = _named(current) if current else set()
    except TitaError as error:
        say(f"skipped {error}")
        return unused
    latest = time.time() - older_than.total_seconds()
    used_until = _add_plain_files(unused, tree, named=named, latest=latest)
    folders = {key.split("/")[0] for key in named}
    _add_temporary_files(unused, tree, latest=latest)
    for folder in tree.iterdir():
        if _VERSION.fullmatch(folder.name) and folder.name not in folders:
            if used_until.get(folder.name, folder.stat().st_mtime) > latest:
                unused.is_recent = True
                continue
            for path in folder.rglob("*"):
                if path.is_file():
                    _add(unused, path)
    return unused


def _add_temporary_files(unused: _Unused, tree: Path, *, latest: float) -> None:
    """Add what processes have left that were killed while they wrote a manifest or an object."""
    for path in tree.iterdir():
        # Another process may be about to rename it.
        with suppress(FileNotFoundError):
            if _TEMPORARY.fullmatch(path.name) and path.is_file():
                if path.stat().st_mtime > latest:
                    unused.is_recent = True
                else:
                    _add(unused, path)


def _add_plain_files(
    unused: _Unused, tree: Path, *, named: set[str], latest: float
) -> dict[str, float]:
    """Add files of the first version, which are not in a folder of their own.

    Returns:
        The time until when the folders of other versions were used.
    """
    used_until: dict[str, float] = {}
    for record in sorted((*tree.glob(f"{PAST}*.json"), *tree.glob(CLAIM))):
        read, modified = _read(record), record.stat().st_mtime
        if read is None:
            continue
        files, keys = read
        for key in keys:
            folder = key.split("/")[0]
            used_until[folder] = max(modified, used_until.get(folder, 0.0))
        if modified > latest:
            unused.is_recent = True
            continue
        unused.records.append(record)
        for file in files:
            path = tree / file.path
            # A file of this name with other content is not the tree's.
            if (
                file.key is None
                and file.path not in named
                and path not in unused.files
                and is_complete(path, file)
            ):
                _add(unused, path)
    return used_until


def _add(unused: _Unused, path: Path) -> None:
    found = path.stat()
    unused.files.append(path)
    # The content of a hard link stays if the tree uses it.
    unused.size_bytes += found.st_size if found.st_nlink == 1 else 0


def _read(path: Path) -> tuple[tuple[ManifestFile, ...], set[str]] | None:
    """Files of a replaced manifest or a claim, and all that it needs; None if it is none."""
    with suppress(OSError, TitaError):
        manifest = parse_manifest(path.read_bytes(), path.parent)
        return tuple(manifest.files), _named(manifest)
    return None


def _named(manifest: Manifest) -> set[str]:
    """What a manifest needs: content and its own parts."""
    return {file.stored_at for file in manifest.files} | {part.key for part in manifest.parts}


def _remove_empty(folder: Path, tree: Path) -> None:
    with suppress(OSError):
        while folder != tree:
            folder.rmdir()
            folder = folder.parent
