"""The interface of a store, which jobs use regardless of its kind."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from tita.errors import TitaError
from tita.recipes import Recipe
from tita.storage.manifest import InvalidManifest, Manifest
from tita.storage.push_rules import JOB_FOLDERS, check_tree_name
from tita.terminal import say

_VISITORS = 16
"""Concurrent requests to find trees."""
_MAX_PULL_ATTEMPTS = 4
"""A pull is repeated if the tree was replaced and its old content was pruned meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One object of a listing."""

    key: str
    size_bytes: int
    etag: str = ""
    """Changes with the content; empty in a directory."""
    modified: datetime | None = None
    """Time of the last write, by the server's clock; None in a directory."""


class PruneState(StrEnum):
    """What became of unused content."""

    REMOVABLE = "removable"
    REMOVED = "removed"
    RECENT = "recent"
    """Too new: a push or a reader may need it."""
    CHANGED = "changed"
    """A push has changed the tree meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnusedContent:
    """Objects of one tree that no manifest names."""

    tree: str
    num_objects: int
    size_bytes: int
    state: PruneState


class Store(Protocol):
    """Objects by key, and trees of objects that are complete or absent.

    Keys are relative to the store, with forward slashes. All methods raise `StoreUnavailable` for
    transient failures, and `TitaError` for permanent ones.
    """

    @property
    def uri(self) -> str:
        """Location of the store, without secrets."""

    def get(self, key: str) -> bytes:
        """The content of an object."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write an object atomically; False if `if_absent` and it exists already."""

    def exists(self, key: str) -> bool:
        """Whether an object exists."""

    def list(self, prefix: str = "", *, start_at: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key begins with `prefix` and is not before `start_at`, sorted by key.

        `start_at` is for folders without folders: some servers sort these as if their names had no
        slash, and leave out keys below them.
        """

    def folders(self, prefix: str) -> Sequence[str]:
        """Keys of the folders that begin with `prefix` and have no further `/`, sorted."""

    def delete(self, key: str) -> None:
        """Delete an object, if it exists."""

    def delete_tree(self, prefix: str) -> None:
        """Delete everything below a prefix, manifests first: no tree is incomplete but visible."""

    def find_unused(self, prefix: str, *, older_than: timedelta) -> Sequence[UnusedContent]:
        """Content of trees that no manifest names; see `prune`."""

    def prune(self, prefix: str, *, older_than: timedelta) -> Sequence[UnusedContent]:
        """Remove content that no manifest names: of old versions, and of pushes that were killed.

        Args:
            prefix: beginning of the names of the trees.
            older_than: time for which content must have been there, or not been used.
        """

    def push_tree(
        self,
        folder: str | Path,
        prefix: str,
        *,
        meta: Mapping[str, Any] | None = None,
        max_removed: float = 1.0,
        verify: bool = False,
    ) -> Manifest:
        """Copy a folder to the store. Its manifest is written last and makes it visible.

        The content of the tree that is replaced stays until it is pruned.

        Args:
            max_removed: largest share of the files of the tree that the push may remove, 0 to 1.
            verify: read all content that is in the store already, to replace what is damaged.

        Raises:
            PushConflict: another process changed the tree during the push.
            TitaError: the folder or the name is refused, or the folder changed during the push.
        """

    def pull_tree(
        self,
        prefix: str,
        *,
        into: str | Path | None = None,
        folder: str = "",
        wanted: Callable[[str], bool] | None = None,
    ) -> Path:
        """A verified local copy of a tree: in `into`, else in the cache.

        A directory store returns the tree itself if `into` is not given.

        Args:
            folder: a folder of the tree, to copy only that; needs `into`.
            wanted: whether a file is copied, given its path; needs `into`; by default all are.

        Raises:
            DamagedData: the store does not have the content that the manifest names.
            TitaError: there is no complete tree.
        """

    def read_manifest(self, prefix: str) -> Manifest | None:
        """The manifest of a tree, or None if there is no complete tree."""


class PullingStore(ABC):
    """The pull of a tree, for stores that can copy the files of one manifest."""

    @property
    @abstractmethod
    def uri(self) -> str:
        """See `Store`."""

    @abstractmethod
    def read_manifest(self, prefix: str) -> Manifest | None:
        """See `Store`."""

    @abstractmethod
    def copy_files(self, prefix: str, manifest: Manifest, into: Path | None) -> Path:
        """A verified local copy of the files that a manifest of the tree `prefix` names."""

    def pull_tree(
        self,
        prefix: str,
        *,
        into: str | Path | None = None,
        folder: str = "",
        wanted: Callable[[str], bool] | None = None,
    ) -> Path:
        """See `Store`."""
        check_tree_name(prefix, uri=self.uri)
        into = None if into is None else Path(into)

        def copy(manifest: Manifest) -> Path:
            part = manifest.below(folder)
            return self.copy_files(prefix, part if wanted is None else part.where(wanted), into)

        manifest = require_manifest(self, prefix)
        for _ in range(_MAX_PULL_ATTEMPTS - 1):
            try:
                return copy(manifest)
            except TitaError:
                # Without a push in between, another attempt is useless.
                current = require_manifest(self, prefix)
                if current == manifest:
                    raise
                manifest = current
        return copy(manifest)


def require_manifest(store: Store | PullingStore, prefix: str) -> Manifest:
    """The manifest of a tree.

    Raises:
        TitaError: there is no complete tree.
    """
    manifest = store.read_manifest(prefix)
    if manifest is None:
        raise TitaError("no complete tree", where=f"{store.uri}/{prefix}", remedy="push it (again)")
    return manifest


def read_file(store: Store, tree: str, path: str, *, manifest: Manifest | None) -> bytes | None:
    """The content of one file of a tree; None if the tree does not have it.

    Args:
        manifest: the tree's; without one, the object that a job writes before the tree is complete.
    """
    if manifest is None:
        key = f"{tree}/{path}"
        return store.get(key) if store.exists(key) else None
    file = manifest.find(path)
    return None if file is None else store.get(f"{tree}/{file.stored_at}")


def list_trees(store: Store, prefix: str = "") -> Iterator[tuple[str, Manifest]]:
    """Name and manifest of every complete tree whose name begins with `prefix`, by name.

    Folders are visited level by level, and the files of a tree are not listed: the cost depends on
    the number of folders and trees. An object that has the name of a manifest and is none does not
    hide other trees: it is reported.
    """

    def visit(name: str) -> tuple[Manifest | InvalidManifest | None, Sequence[str]]:
        try:
            found = store.read_manifest(name)
        except InvalidManifest as error:
            return error, store.folders(f"{name}/")
        if found is None:
            return None, store.folders(f"{name}/")
        # Other trees cannot be in a tree.
        return found, [sub for job in JOB_FOLDERS for sub in store.folders(f"{name}/{job}/")]

    found: dict[str, Manifest] = {}
    level: Sequence[str] = store.folders(prefix)
    if prefix.endswith("/"):
        level = [prefix.rstrip("/"), *level]
    with ThreadPoolExecutor(_VISITORS) as pool:
        while level:
            below: dict[str, None] = {}
            for name, (manifest, folders) in zip(level, pool.map(visit, level), strict=True):
                if isinstance(manifest, InvalidManifest):
                    say(f"skipped {manifest}")
                elif manifest is not None:
                    found[name] = manifest
                below |= dict.fromkeys(folders)
            level = [name for name in below if name not in found]
    for name in sorted(found):
        yield name, found[name]


def is_done(out: str, *, recipe: Recipe, store: Store) -> bool:
    """Whether a job's output tree `out` exists and was made with this recipe, or an equivalent one.

    The job records its recipe in the manifest's `meta`.

    Raises:
        TitaError: the tree was made with another recipe.
    """
    manifest = store.read_manifest(out)
    if manifest is None:
        return False
    if not recipe.is_equivalent_to(manifest.meta.get("recipe")):
        raise TitaError(
            "this tree was made with another recipe", where=out, remedy="choose another run name"
        )
    return True
