"""Removes objects of trees in S3 that no manifest names: old content, and what killed pushes left.

Before it deletes anything, it replaces the manifest by an equal one. So a push that began earlier,
and may rely on these objects, cannot complete, and a push that begins later does not rely on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import uuid4

from tita.errors import DamagedData, StoreUnavailable, TitaError
from tita.storage.manifest import MANIFEST, Manifest
from tita.storage.push_rules import JOB_FOLDERS, ancestors, is_hidden
from tita.storage.s3_bucket import Bucket
from tita.storage.s3_push import CLAIM, parse_manifest, read_manifest
from tita.storage.store import ObjectInfo, PruneState, UnusedContent
from tita.storage.transfers import TransferPool
from tita.storage.upload import UnfinishedUploads
from tita.terminal import say


@dataclass(kw_only=True)
class _Tree:
    name: str
    manifest: Manifest
    etag: str | None
    """ETag of the manifest; None for the claim of a push that is not complete."""
    unused: list[ObjectInfo] = field(default_factory=list)
    claimed: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file of a push that is not complete."""

    def as_result(self, state: PruneState) -> UnusedContent:
        return UnusedContent(
            tree=self.name,
            num_objects=len(self.unused),
            size_bytes=sum(entry.size_bytes for entry in self.unused),
            state=state,
        )


def find_unused(bucket: Bucket, prefix: str, *, older_than: timedelta) -> list[UnusedContent]:
    """Content that `prune` would remove, or is not old enough to be removed."""
    oldest = datetime.now(UTC) - older_than
    found = _with_unused(_find(bucket, prefix))
    return [tree.as_result(_state(tree, oldest)) for tree in found]


def prune(bucket: Bucket, prefix: str, *, older_than: timedelta) -> list[UnusedContent]:
    """Remove unused content of the trees whose names begin with `prefix`.

    A tree with unused objects that are newer is left alone, because a push is probably in progress.

    Raises:
        TitaError: an object cannot be deleted. All trees stay complete.
    """
    oldest = datetime.now(UTC) - older_than
    results = []
    trees = _find(bucket, prefix)
    for tree in _with_unused(trees):
        state = _state(tree, oldest)
        if state is PruneState.REMOVABLE:
            state = _remove(bucket, tree)
        results.append(tree.as_result(state))
    uploads = UnfinishedUploads.find(bucket, prefix)
    # Others in the bucket belong to other tools.
    own = (one for one in uploads.found if not trees.keys().isdisjoint(ancestors(one.key)))
    replace(uploads, found=tuple(own)).abort(lambda _: False, created_before=oldest)
    return results


def _with_unused(trees: Mapping[str, _Tree]) -> list[_Tree]:
    return [trees[name] for name in sorted(trees) if trees[name].unused]


def _state(tree: _Tree, oldest: datetime) -> PruneState:
    is_recent = any(entry.modified and entry.modified > oldest for entry in tree.unused)
    return PruneState.RECENT if is_recent else PruneState.REMOVABLE


def _find(bucket: Bucket, prefix: str) -> dict[str, _Tree]:
    """Trees and unfinished first pushes by name, with their unused objects.

    What is below a tree with a damaged manifest is left alone: some of it may be the tree's.
    """
    entries = bucket.list_objects(prefix)
    trees: dict[str, _Tree] = {}
    named: set[str] = set()
    damaged: set[str] = set()

    def read(name: str, ending: str) -> _Tree | None:
        try:
            return _read(bucket, name, ending, named=named)
        except DamagedData as error:
            say(f"skipped {error}")
            damaged.add(name)
            return None

    # After the listing: an object that a push has sent meanwhile is not in it.
    for ending in (MANIFEST, CLAIM):
        for entry in entries:
            name, _, last = entry.key.rpartition("/")
            if (
                last == ending
                and name
                and not is_hidden(name)
                and name not in trees
                and name not in damaged
                and (tree := read(name, ending)) is not None
            ):
                trees[name] = tree
    named |= {f"{name}/{MANIFEST}" for name in trees}
    for outer in {above for name in trees for above in ancestors(name)} - trees.keys() - damaged:
        # Earlier versions allowed a tree inside a tree.
        read(outer, MANIFEST)
    doubtful: list[tuple[_Tree, ObjectInfo]] = []
    for entry in entries:
        outside = ancestors(entry.key)
        above = [name for name in outside if name in trees]
        if entry.key in named or not above or not damaged.isdisjoint(outside):
            continue
        tree = trees[above[-1]]
        key = entry.key.removeprefix(f"{tree.name}/")
        if is_hidden(key):
            tree.unused.append(entry)
        elif key.split("/")[0] not in JOB_FOLDERS:
            doubtful.append((tree, entry))
    TransferPool().run(partial(_add_if_written_by_tita, bucket, *one) for one in doubtful)
    return trees


def _read(bucket: Bucket, name: str, ending: str, *, named: set[str]) -> _Tree | None:
    """A tree, or an unfinished first push; None if there is none.

    Adds the keys of all objects that a tree needs to `named`.

    Raises:
        DamagedData: its manifest or claim, or a part of it, is damaged.
    """
    key = f"{name}/{ending}"
    try:
        if ending == MANIFEST:
            manifest, etag = read_manifest(bucket, name)
        else:
            manifest, etag = parse_manifest(bucket.get(key), bucket, key), None
        if manifest is None:
            return None
    except FileNotFoundError:
        return None
    if etag is None:
        # Before anything is removed, so also before the parts of a claim are.
        claimed = {file.path: file.sha256 for file in manifest.files}
        return _Tree(name=name, manifest=manifest, etag=None, claimed=claimed)
    named.update(f"{name}/{part.key}" for part in manifest.parts)
    named.update(f"{name}/{file.stored_at}" for file in manifest.files)
    return _Tree(name=name, manifest=manifest, etag=etag)


def _add_if_written_by_tita(bucket: Bucket, tree: _Tree, entry: ObjectInfo) -> None:
    found = bucket.head(entry.key)
    if found is None or found.sha256 is None:
        return
    if tree.etag is None:
        # The push that began is the only reason to remove anything there.
        key = entry.key.removeprefix(f"{tree.name}/")
        if tree.claimed.get(key) != found.sha256:
            return
    tree.unused.append(entry)


def _remove(bucket: Bucket, tree: _Tree) -> PruneState:
    if tree.etag is not None:
        same = replace(tree.manifest, push=uuid4().hex).to_json()
        if not bucket.put_if_unchanged(f"{tree.name}/{MANIFEST}", same, etag=tree.etag):
            return PruneState.CHANGED
    claim = f"{tree.name}/{CLAIM}"
    keys = [entry.key for entry in tree.unused if entry.key != claim]
    delete = partial(_delete, bucket)
    TransferPool().run(partial(delete, key) for key in keys)
    delete(claim)
    return PruneState.REMOVED


def _delete(bucket: Bucket, key: str) -> None:
    try:
        bucket.delete(key)
    except StoreUnavailable:
        raise
    except TitaError as error:
        raise TitaError(
            f"cannot delete unused content ({error.what}); all trees are complete",
            where=error.where,
            remedy=error.remedy,
        ) from None
