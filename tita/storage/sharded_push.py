"""A push of a folder with its images in shards; other files stay files."""

import os
import shutil
from pathlib import Path

from tita.errors import TitaError
from tita.storage.cache import TreeCache
from tita.storage.directory_push import staged
from tita.storage.image_shards import SHARDS, describe, is_packed, num_packed, pack_images
from tita.storage.manifest import Manifest, tree_paths
from tita.storage.push_rules import check_removals, refuse_removals, refuse_store_in_folder
from tita.storage.store import Store


def push_in_shards(
    store: Store,
    folder: Path,
    prefix: str,
    *,
    shard_bytes: int,
    max_removed: float = 1.0,
    verify: bool = False,
) -> Manifest:
    """Push a folder with its images in shards; see `Store.push_tree` and `pack_images`.

    The shards are written to the cache folder of this node first. A repeated push writes the same
    ones, so it continues an interrupted one.

    Raises:
        TitaError: the folder has the store, no images, or shards already, or the disk has too
            little space.
    """
    refuse_store_in_folder(store.uri, folder)
    paths = tree_paths(folder)
    images = [path for path in paths if is_packed(path)]
    if not images:
        raise TitaError(
            "no images to pack into shards",
            where=str(folder),
            remedy="check the folder, or push it without --shard",
        )
    if any(path.split("/")[0] == SHARDS for path in paths):
        raise TitaError(
            f"there is a folder {SHARDS!r} already",
            where=str(folder),
            remedy="push it without --shard if it has shards, or else rename it",
        )
    _check_removals(store, prefix, paths, max_removed=max_removed)
    cache = TreeCache.from_settings().packing
    with staged(cache) as stage:
        _check_space(folder, images, cache=cache)
        pack_images(folder, images, into=stage.folder, shard_bytes=shard_bytes)
        for path in paths:
            if not is_packed(path):
                _link(folder / path, stage.folder / path)
        return store.push_tree(stage.folder, prefix, meta=describe(images), verify=verify)


def _check_removals(store: Store, prefix: str, paths: list[str], *, max_removed: float) -> None:
    """As in a push of the same files without shards, as far as the numbers of images tell."""
    previous, where = store.read_manifest(prefix), f"{store.uri}/{prefix}"
    if previous is None:
        return
    if not num_packed(previous):
        check_removals(previous, paths, max_removed=max_removed, where=where)
        return
    others = sum(not file.path.startswith(f"{SHARDS}/") for file in previous.files)
    before = num_packed(previous) + others
    if before - len(paths) > max_removed * before:
        raise refuse_removals(before - len(paths), before, where=where)


def _check_space(folder: Path, images: list[str], *, cache: Path) -> None:
    need_bytes = sum((folder / path).stat().st_size for path in images)
    free_bytes = shutil.disk_usage(cache).free
    if need_bytes > free_bytes:
        raise TitaError(
            f"the shards need {need_bytes / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} are free",
            where=str(cache),
            remedy="free some space or set TITA_CACHE_DIR to another folder",
        )


def _link(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), path)
    except OSError:
        shutil.copyfile(source, path)
