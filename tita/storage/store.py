"""The one interface that jobs see, whatever lies below."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tita.errors import TitaError
from tita.storage.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One object, as a listing knows it."""

    key: str
    size_bytes: int


class Store(Protocol):
    """Objects by key, and trees of them that are whole or absent.

    Keys are relative to the store, with forward slashes. All methods raise `StoreUnavailable` where
    trying again later may help, and `TitaError` where it will not.
    """

    @property
    def uri(self) -> str:
        """Where this is, without secrets."""
        ...

    def get(self, key: str) -> bytes:
        """The object's content."""
        ...

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write one object, whole or not at all; False if `if_absent` and there is one already."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key begins with `prefix`, sorted by key."""
        ...

    def delete(self, key: str) -> None:
        """Remove one object; one that is not there is no error."""
        ...

    def push_tree(
        self, folder: Path, prefix: str, *, meta: Mapping[str, Any] | None = None
    ) -> Manifest:
        """Copy a folder in; readers see it once its manifest is there, which comes last."""
        ...

    def pull_tree(self, prefix: str, *, into: Path | None = None) -> Path:
        """A local copy of a tree, every byte checked; from a directory store, the tree in place."""
        ...

    def read_manifest(self, prefix: str) -> Manifest | None:
        """The tree's manifest, or None if no whole tree is there."""
        ...


def whole_tree(store: Store, prefix: str) -> Manifest:
    """What a tree holds.

    Raises:
        TitaError: there is none, or none that is complete.
    """
    manifest = store.read_manifest(prefix)
    if manifest is None:
        raise TitaError("no complete tree", where=f"{store.uri}/{prefix}", remedy="push it (again)")
    return manifest
