"""Rules that a push to either kind of store obeys: names, nesting, removed files, conflicts."""

import hashlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from tita.errors import PushConflict, TitaError
from tita.storage.manifest import Manifest, is_inside

HIDDEN = ".tita-"
"""Beginning of the names of the store's own files and folders, which listings and pushes skip."""
JOB_FOLDERS = ("checkpoints", "warm-up")
"""Folders of a run's tree in which a job keeps trees of its own."""
_MAX_KEY_BYTES = 1024
"""Limit of S3."""


def is_hidden(key: str) -> bool:
    """Whether a key belongs to the store itself."""
    return any(part.startswith(HIDDEN) for part in key.split("/"))


def check_tree_name(name: str, *, uri: str) -> None:
    """Refuse a name that is not the name of a tree, such as `data/ocrvqa`."""
    if "://" in name:
        what, remedy = "a URI is not the name of a tree", "name the store with --store"
    elif not is_inside(name):
        what, remedy = "leaves the store", "write a name such as data/ocrvqa"
    elif name.startswith("~") or any(part in ("", ".") for part in name.split("/")):
        what, remedy = "not the name of a tree", "write a name such as data/ocrvqa"
    elif is_hidden(name) or not name.isprintable():
        what, remedy = "not the name of a tree", f"without control characters and {HIDDEN}"
    else:
        return
    raise TitaError(f"key {name!r}: {what}", where=uri, remedy=remedy)


def check_key_length(key: str) -> None:
    """Refuse a key, prefix included, at which S3 cannot store an object."""
    if (size := len(key.encode())) > _MAX_KEY_BYTES:
        shown = f"{key[:60]}...{key[-60:]}"
        raise TitaError(
            f"the key has {size} bytes, and S3 allows {_MAX_KEY_BYTES}",
            where=shown,
            remedy="shorten the names of its folders",
        )


def refuse_store_in_folder(uri: str, folder: Path) -> None:
    """Refuse to push a folder with the store in it: the store would grow by itself."""
    if not uri.startswith("s3://") and Path(uri).resolve().is_relative_to(folder.resolve()):
        raise TitaError(
            "the store is inside the folder",
            where=str(folder),
            remedy="push a folder without the store, or set --store to another place",
        )


def ancestors(name: str) -> list[str]:
    """Names above a tree: `a` and `a/b` of `a/b/c`."""
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _is_of_a_job(inner: str, outer: str) -> bool:
    return inner.removeprefix(f"{outer}/").split("/")[0] in JOB_FOLDERS


def refuse_nesting(
    name: str, *, uri: str, is_tree: Callable[[str], bool], below: Iterable[str]
) -> None:
    """Refuse a push into or over another tree: files of one would belong to the other.

    Trees of a job in the run's own tree are allowed.

    Args:
        is_tree: whether there is a complete tree of this name.
        below: names below `name` that may be trees.
    """
    above = [outer for outer in ancestors(name) if not _is_of_a_job(name, outer)]
    inside = [inner for inner in below if not _is_of_a_job(inner, name)]
    for other in (*above, *inside):
        if is_tree(other):
            where = "above" if other in above else "below"
            raise TitaError(
                f"there is a tree {other!r} {where} it",
                where=f"{uri}/{name}",
                remedy="choose a name that is neither above nor below another tree",
            )


def check_removals(
    previous: Manifest | None, paths: Collection[str], *, max_removed: float, where: str
) -> None:
    """Refuse a push that removes a larger share of the tree's files than `max_removed`.

    A folder may be incomplete or empty because a disk is not mounted.
    """
    if previous is None or not previous.files:
        return
    removed = {file.path for file in previous.files} - set(paths)
    if len(removed) > max_removed * len(previous.files):
        raise refuse_removals(
            len(removed), len(previous.files), where=where, example=f", such as {min(removed)!r}"
        )


def refuse_removals(number: int, of: int, *, where: str, example: str = "") -> TitaError:
    """The error of a push that would remove too many files."""
    return TitaError(
        f"the push would remove {number} of {of} files{example}",
        where=where,
        remedy="check the folder, or add --delete",
    )


def has_same_content(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests have the same files and metadata, wherever the files are stored."""
    return one.digest == other.digest and dict(one.meta) == dict(other.meta)


def push_conflict(where: str) -> PushConflict:
    """The error of a push that another process overtook."""
    return PushConflict(
        "another process changed this tree during the push, which changed nothing",
        where=where,
        remedy="look at the tree, then push again",
    )


def version_folder(base: str, digest: str) -> str:
    """Folder, in a tree, of the new content of one push.

    It depends on the manifest that the push replaces and on the tree's content. So a repeated push
    finds what an interrupted one has sent, pushes that share a folder write the same content, and
    no folder is used again after its tree has changed.

    Args:
        base: version of the manifest that is replaced; empty without one.
        digest: digest of the new tree.
    """
    return f"{HIDDEN}{hashlib.sha256(f'{base} {digest}'.encode()).hexdigest()[:16]}"
