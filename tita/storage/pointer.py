"""Pointers: an object whose content names a tree, so that a name can move in one write."""

import json
from dataclasses import asdict, dataclass

from tita.errors import TitaError
from tita.storage.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """Where a name leads, since when, and what it led to before."""

    target: str
    """Key of a tree, or of a folder within one."""
    moved: str
    """When, as UTC in ISO 8601."""
    previous: str | None = None
    """Key of the object that keeps the pointer as it was before."""


def read_pointer(store: Store, key: str) -> Pointer | None:
    """The pointer at `key`, or None if there is none.

    Raises:
        TitaError: the object there is no pointer.
    """
    if not store.exists(key):
        return None
    try:
        return Pointer(**json.loads(store.get(key)))
    except (ValueError, TypeError):
        raise TitaError("not a pointer", where=f"{store.uri}/{key}") from None


def write_pointer(store: Store, key: str, pointer: Pointer) -> None:
    """Let `key` lead to another tree, in one write."""
    store.put(key, json.dumps(asdict(pointer), indent=1).encode())
