"""The interface of a store, which jobs use regardless of its kind."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tita.errors import TitaError
from tita.storage.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One object of a listing."""

    key: str
    size_bytes: int


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

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key begins with `prefix`, sorted by key."""

    def delete(self, key: str) -> None:
        """Delete an object, if it exists."""

    def push_tree(
        self, folder: str | Path, prefix: str, *, meta: Mapping[str, Any] | None = None
    ) -> Manifest:
        """Copy a folder to the store. Its manifest is written last and makes it visible."""

    def pull_tree(self, prefix: str, *, into: str | Path | None = None) -> Path:
        """A verified local copy of a tree: in `into`, else in the cache.

        A directory store returns the tree itself if `into` is not given.
        """

    def read_manifest(self, prefix: str) -> Manifest | None:
        """The manifest of a tree, or None if there is no complete tree."""


def require_manifest(store: Store, prefix: str) -> Manifest:
    """The manifest of a tree.

    Raises:
        TitaError: there is no complete tree.
    """
    manifest = store.read_manifest(prefix)
    if manifest is None:
        raise TitaError("no complete tree", where=f"{store.uri}/{prefix}", remedy="push it (again)")
    return manifest


def is_done(out: str, *, recipe: Mapping[str, Any], store: Store) -> bool:
    """Whether a job's output tree `out` exists and was made with this recipe.

    The job records its recipe in the manifest's `meta`.

    Raises:
        TitaError: the tree was made with another recipe.
    """
    manifest = store.read_manifest(out)
    if manifest is None:
        return False
    if manifest.meta.get("recipe") != recipe:
        raise TitaError(
            "this tree was made with another recipe", where=out, remedy="choose another run name"
        )
    return True
