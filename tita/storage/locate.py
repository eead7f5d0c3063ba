"""From what users write, `data/ocrvqa` or `s3://bucket/x`, to a store, a tree or a local path."""

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tita.errors import TitaError
from tita.settings import settings
from tita.storage.cache import read_cached_manifest
from tita.storage.directory import DirectoryStore
from tita.storage.directory_push import read_manifest
from tita.storage.image_shards import is_image_folder, is_packed_folder
from tita.storage.manifest import MANIFEST, InvalidManifest, Manifest, build_manifest
from tita.storage.push_rules import check_tree_name
from tita.storage.store import Store


def open_store(uri: str | Path | None = None) -> Store:
    """The store at `uri`, by default the one in the settings; a path is a directory.

    Raises:
        TitaError: the URI is empty, its scheme is not supported, or it is a file.
    """
    uri = settings().store if uri is None else str(uri)
    if uri.startswith("s3://"):
        # boto3 takes 0.2 s to import, which commands on a directory store need not wait for.
        from tita.storage.s3_store import S3Store

        return S3Store(uri)
    if not uri:
        raise TitaError("the store has no name", remedy="write s3://bucket/prefix or a directory")
    if "://" in uri or uri.startswith("s3:"):
        raise TitaError(f"no store for {uri!r}", remedy="write s3://bucket/prefix or a directory")
    if Path(uri).expanduser().is_file():
        raise TitaError("a file, not a store", where=uri, remedy="name a directory")
    return DirectoryStore(Path(uri))


def store_command(command: str, *arguments: str, store: str) -> str:
    """`tita COMMAND ARGUMENTS` for this store, quoted for a shell.

    A message may be read where other settings hold, as that of a pod is, so a store in S3 is always
    named.
    """
    is_default = not store.startswith("s3://") and Path(store).absolute() == (
        Path(settings().store).absolute()
    )
    options = [] if is_default else ["--store", store]
    return shlex.join(["tita", *command.split(), *arguments, *options])


def split_name(text: str, *, store: str | None = None) -> tuple[Store, str]:
    """Store and name of a tree that a user names: `data/ocrvqa`, or `s3://bucket/data/ocrvqa`.

    Args:
        store: URI of the store, by default the one in the settings; not for an `s3://` name.

    Raises:
        TitaError: it is not the name of a tree.
    """
    if text.startswith("s3://"):
        bucket, _, name = text.removeprefix("s3://").partition("/")
        if store is not None:
            raise TitaError(
                f"the name {text!r} has a store of its own",
                where="--store",
                remedy=f"leave out --store, or name the tree {name!r}",
            )
        # Settings may name a store inside this bucket; the keys are the same.
        opened = open_store(f"s3://{bucket}")
    else:
        name, opened = text, open_store(store)
        if text.startswith(("/", "./", "~")) and text.strip("/"):
            raise TitaError(
                "a path is not the name of a tree",
                where=text,
                remedy="write a name such as data/ocrvqa",
            )
    name = name.strip("/")
    if not name:
        raise TitaError("the name of the tree is empty", remedy="write one, such as data/ocrvqa")
    check_tree_name(name, uri=opened.uri)
    return opened, name


def find_tree(store: Store, name: str) -> tuple[str, str]:
    """The tree that a name stands for, and the folder in it; the folder is often empty.

    A pointer such as `reward/current` is followed.

    Raises:
        TitaError: there is no complete tree of this name, nor one that has such a folder.
    """
    for tree, folder, manifest in _trees_above(store, name):
        if not folder or manifest.has_folder(folder):
            return tree, folder
        if is_packed_folder(manifest, folder):
            raise TitaError(
                "the images of this folder are in shards of their tree",
                where=f"{store.uri}/{name}",
                remedy=f"pull {tree!r}",
            )
    raise TitaError("no complete tree", where=f"{store.uri}/{name}", remedy="push it (again)")


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
        if not path.exists() and not is_image_folder(path):
            raise TitaError("no such file or folder", where=where, remedy="check the path")
        return path
    if (found := _resolve_in_store(store, where)) is not None:
        return found
    if Path(where).exists():
        return Path(where)
    raise _not_found(where, store)


def known_digest(folder: Path) -> str | None:
    """The digest of a local folder that `resolve` returned, as the manifest of its tree has it.

    None if it is in no tree. Its files are not read.
    """
    return _digest_in_tree(folder, _read_local_manifest)


def tree_version(path: Path) -> str | None:
    """The digest of the whole tree that a local path which `resolve` returned is in.

    None if it is in no tree. The files are neither read nor listed.
    """
    return _digest_in_tree(path, _read_local_manifest, whole=True)


def digest_folder(folder: Path) -> str:
    """The digest of the files in a folder.

    Of a tree in the cache, whose files never change, it is that of its manifest: the files of a
    model of 7B have 14 GB.
    """
    return _digest_in_tree(folder, read_cached_manifest) or build_manifest(folder).digest


def _read_local_manifest(tree: Path) -> Manifest | None:
    return read_cached_manifest(tree) or read_manifest(tree)[0]


def _digest_in_tree(
    path: Path, read: Callable[[Path], Manifest | None], *, whole: bool = False
) -> str | None:
    """The digest of the innermost tree that has a local path, or of that path in it."""
    for tree in (path, *path.parents):
        rest = path.relative_to(tree).as_posix()
        try:
            if (manifest := read(tree)) is not None:
                return manifest.below("" if whole or rest == "." else rest).digest
        except (OSError, TitaError):
            # A user's own file of this name.
            continue
    return None


def check_exists(where: str | Path, *, store: Store) -> None:
    """Check that `resolve` would find this, without a download.

    Raises:
        TitaError: it is neither in the store nor a local path.
    """
    where = explicit_path(where)
    if where.startswith(("/", "./", "../", "~")):
        resolve(where, store=store)
        return
    if where.startswith("s3://"):
        bucket, _, key = where.removeprefix("s3://").partition("/")
        remote = open_store(f"s3://{bucket}")
        if not _is_in_store(remote, key):
            raise TitaError("not in the store", where=f"{remote.uri}/{key}")
    elif not _is_in_store(store, where) and not Path(where).exists():
        raise _not_found(where, store)


def _not_found(where: str, store: Store) -> TitaError:
    push = store_command("data push", "FOLDER", where, store=store.uri)
    # A tree is a folder; `-1.5` at the end of its name is no suffix of a file.
    is_file = Path(where).suffix[1:].isalpha()
    return TitaError(
        f"neither a complete tree in the store {store.uri} nor a path",
        where=where,
        remedy="check the path" if is_file else f"push it with `{push}`, or name a path",
    )


def _is_in_store(store: Store, key: str) -> bool:
    return any(
        _may_have(manifest, path) for _, path, manifest in _trees_above(store, key.strip("/"))
    )


def _may_have(manifest: Manifest, path: str) -> bool:
    """Whether a tree has a file or folder, as far as its manifest says; images may be in shards."""
    return (
        not path
        or manifest.find(path) is not None
        or manifest.has_folder(path)
        or is_packed_folder(manifest, path)
    )


def explicit_path(where: str | Path) -> str:
    """A `Path` as text that `resolve` takes for a local path; text as it is."""
    if isinstance(where, str) or where.is_absolute() or where.parts[:1] in (("..",), ("~",)):
        return str(where)
    return f"./{where}"


def _resolve_in_store(store: Store, key: str) -> Path | None:
    """A local copy of the tree `key`, or the file or folder in the innermost tree that has it."""
    for tree, path, manifest in _trees_above(store, key.strip("/")):
        if not _may_have(manifest, path):
            continue  # the tree, which may be large, is not pulled for nothing
        found = store.pull_tree(tree) / path
        if found.exists() or is_image_folder(found):
            return found
    return None


def _trees_above(store: Store, name: str) -> Iterator[tuple[str, str, Manifest]]:
    """Trees that have this name or may contain it, the innermost first; follows a pointer.

    Yields:
        The tree, the rest of the name, and the tree's manifest.

    Raises:
        InvalidManifest: after the last one, if a manifest is damaged.
    """
    # `tita promote` moves pointers such as `reward/current`.
    if name.rpartition("/")[2] == "current" and (pointer := read_pointer(store, name)):
        name = pointer.target
    parts = [part for part in name.split("/") if part]
    damaged: InvalidManifest | None = None
    for depth in range(len(parts), 0, -1):
        tree = "/".join(parts[:depth])
        try:
            manifest = store.read_manifest(tree)
        except InvalidManifest as error:
            # It may also be a user's own file in a tree above.
            damaged = damaged or error
            continue
        if manifest is not None:
            yield tree, "/".join(parts[depth:]), manifest
    if damaged is not None:
        raise damaged


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """An object that names a tree, so that one write changes what its key stands for."""

    target: str
    """Key of a tree, or of a folder in one."""
    moved: str
    """Time of the write, as UTC in ISO 8601."""
    previous: str | None = None
    """Key of the object that keeps the previous pointer."""


def trackers_key(out: str) -> str:
    """Key of the links to a run's tracked runs; `out` is the run's folder in the store."""
    return f"trackers/{out}.json"


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
    """Write a pointer.

    Raises:
        TitaError: there is a tree of this name.
    """
    if store.exists(f"{key}/{MANIFEST}"):
        raise TitaError(
            "there is a tree of this name, so it cannot be a pointer",
            where=f"{store.uri}/{key}",
            remedy="remove the tree, or push it under another name",
        )
    store.put(key, json.dumps(asdict(pointer), indent=1).encode())
