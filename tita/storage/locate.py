"""From what users write, `data/ocrvqa` or `s3://bucket/x`, to a store, a tree or a local path."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tita.errors import TitaError
from tita.settings import settings
from tita.storage.directory import DirectoryStore
from tita.storage.store import Store


def open_store(uri: str | Path | None = None) -> Store:
    """The store at `uri`, by default the one in the settings; a path is a directory.

    Raises:
        TitaError: the URI's scheme is not supported.
    """
    uri = settings().store if uri is None else str(uri)
    if uri.startswith("s3://"):
        # boto3 takes 0.2 s to import, which commands on a directory store need not wait for.
        from tita.storage.s3_store import S3Store

        return S3Store(uri)
    if "://" in uri:
        raise TitaError(f"no store for {uri!r}", remedy="write s3://bucket/prefix or a directory")
    return DirectoryStore(Path(uri))


def resolve(where: str | Path, *, store: Store) -> Path:
    """The local file or folder that a recipe names.

    An `s3://` URI is a tree in that bucket. A path that starts with `/`, `./`, `../` or `~` is a
    local path, and so is a `Path`. Anything else is a tree in `store`, or a file or folder in one,
    else a local path.

    Raises:
        TitaError: it is neither in the store nor a local path.
    """
    where = explicit_path(where)
    if where.startswith("s3://"):
        bucket, _, key = where.removeprefix("s3://").partition("/")
        remote = open_store(f"s3://{bucket}")
        if (found := _resolve_in_store(remote, key)) is None:
            raise TitaError("not in the store", where=f"{remote.uri}/{key}")
        return found
    if where.startswith(("/", "./", "../", "~")):
        path = Path(where).expanduser()
        if not path.exists():
            raise TitaError("no such file or folder", where=where, remedy="check the path")
        return path
    if (found := _resolve_in_store(store, where)) is not None:
        return found
    if Path(where).exists():
        return Path(where)
    raise TitaError(
        f"neither a complete tree in the store {store.uri} nor a path",
        where=where,
        remedy="push it with `tita data push`, or name a path",
    )


def explicit_path(where: str | Path) -> str:
    """A `Path` as text that `resolve` takes for a local path; text as it is."""
    if isinstance(where, str) or where.is_absolute() or where.parts[:1] in (("..",), ("~",)):
        return str(where)
    return f"./{where}"


def _resolve_in_store(store: Store, key: str) -> Path | None:
    """A local copy of the tree `key`, or the file or folder in the innermost tree that has it."""
    parts = key.strip("/").split("/")
    # `tita promote` moves pointers such as `reward/current`.
    if parts[-1] == "current" and (pointer := read_pointer(store, "/".join(parts))):
        parts = pointer.target.split("/")
    for depth in range(len(parts), 0, -1):
        prefix = "/".join(parts[:depth])
        if store.read_manifest(prefix) is None:
            continue
        found = store.pull_tree(prefix) / "/".join(parts[depth:])
        if found.exists():
            return found
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """An object that names a tree, so that one write changes what its key stands for."""

    target: str
    """Key of a tree, or of a folder in one."""
    moved: str
    """Time of the write, as UTC in ISO 8601."""
    previous: str | None = None
    """Key of the object that keeps the previous pointer."""


def read_pointer(store: Store, key: str) -> Pointer | None:
    """The pointer at `key`, or None if it does not exist.

    Raises:
        TitaError: the object is not a pointer.
    """
    if not store.exists(key):
        return None
    try:
        return Pointer(**json.loads(store.get(key)))
    except (ValueError, TypeError):
        raise TitaError("not a pointer", where=f"{store.uri}/{key}") from None


def write_pointer(store: Store, key: str, pointer: Pointer) -> None:
    """Write a pointer."""
    store.put(key, json.dumps(asdict(pointer), indent=1).encode())
