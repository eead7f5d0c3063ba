"""From what people write, `data/ocrvqa` or `s3://bucket/x`, to a store or a local path."""

from pathlib import Path

from tita.errors import TitaError
from tita.storage.directory import DirectoryStore
from tita.storage.pointer import read_pointer
from tita.storage.store import Store


def open_store(uri: str | None = None) -> Store:
    """The store at `uri`, else the one that the settings name.

    Raises:
        TitaError: the URI has a scheme that no store knows.
    """
    if uri is None:
        from tita.settings import settings

        uri = settings().store
    if uri.startswith("s3://"):
        from tita.storage.s3 import S3Store

        return S3Store(uri)
    if "://" in uri:
        raise TitaError(f"no store for {uri!r}", remedy="write s3://bucket/prefix or a directory")
    return DirectoryStore(Path(uri))


def resolve(where: str, *, store: Store) -> Path:
    """A local file or folder for what a recipe names.

    An `s3://` URI is a tree in that store. A path that starts with `/`, `./`, `../` or `~` is just
    that. Anything else is a tree in `store`, or a file or folder within one, else a relative path.

    Raises:
        TitaError: nothing there; both places that were looked at are named.
    """
    if where.startswith("s3://"):
        bucket, _, key = where.removeprefix("s3://").partition("/")
        return resolve_in_store(open_store(f"s3://{bucket}"), key)
    if where.startswith(("/", "./", "../", "~")):
        path = Path(where).expanduser()
        if not path.exists():
            raise TitaError("no such file or folder", where=where, remedy="check the path")
        return path
    try:
        return resolve_in_store(store, where)
    except TitaError as error:
        if error.what != _NOT_IN_STORE:
            raise
    if Path(where).exists():
        return Path(where)
    raise TitaError(
        f"neither a complete tree in the store {store.uri} nor a path",
        where=where,
        remedy="push it with `tita data push`, or name a path",
    )


_NOT_IN_STORE = "not in the store"


def resolve_in_store(store: Store, key: str) -> Path:
    """The tree `key`, or a file or folder inside the nearest tree above it."""
    parts = key.strip("/").split("/")
    # `reward/current` and its like may be pointers: `tita promote` moves them.
    if parts[-1] == "current" and (pointer := read_pointer(store, "/".join(parts))):
        parts = pointer.target.split("/")
    for depth in range(len(parts), 0, -1):
        prefix = "/".join(parts[:depth])
        if store.read_manifest(prefix) is None:
            continue
        found = store.pull_tree(prefix) / "/".join(parts[depth:])
        if found.exists():
            return found
    raise TitaError(_NOT_IN_STORE, where=f"{store.uri}/{key}")
