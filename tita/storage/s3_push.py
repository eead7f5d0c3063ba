"""A push to S3: objects are never overwritten, and one conditional write makes the tree visible.

    <tree>/<path>                  content of the first push
    <tree>/.tita-<id>/<path>       new content of a later push
    <tree>/.tita-<id>/files.jsonl.gz    a part of the manifest of a large tree
    <tree>/.tita-first.json        which content the first push is writing, until it is complete
    <tree>/manifest.json           where the content of each file is

Protocol:
    A push reads the manifest and its ETag, uploads what the manifest does not name, and replaces
    the manifest on the condition that its ETag is still the same. So of several pushes one wins.

    An object that a manifest may name is written by pushes of one content only: its key is either
    below a folder named after that content, or below the tree of the first push, which claims it
    with `.tita-first.json`. So a manifest never names an object that changes.

    A push deletes no content. `tita.storage.s3_prune` does.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

from tita.errors import DamagedData, TitaError
from tita.storage.cache import TreeCache
from tita.storage.download import has_content
from tita.storage.manifest import (
    MANIFEST,
    InvalidManifest,
    Manifest,
    ManifestFile,
    ManifestPart,
    build_manifest,
    tree_paths,
)
from tita.storage.push_rules import (
    HIDDEN,
    check_key_length,
    check_removals,
    check_tree_name,
    has_same_content,
    push_conflict,
    refuse_nesting,
    version_folder,
)
from tita.storage.s3_bucket import Bucket
from tita.storage.store import ObjectInfo
from tita.storage.transfers import for_each_file, transfer_pool
from tita.storage.upload import FileState, UnfinishedUploads, Upload, file_state

CLAIM = ".tita-first.json"


def read_manifest(bucket: Bucket, prefix: str) -> tuple[Manifest | None, str | None]:
    """The manifest of a tree and its ETag, or None and None if there is no complete tree.

    Raises:
        InvalidManifest: the object is not a manifest.
    """
    key = f"{prefix}/{MANIFEST}"
    try:
        data, etag = bucket.get_with_etag(key)
    except FileNotFoundError:
        return None, None
    except DamagedData as error:
        raise InvalidManifest(error.what, where=error.where, remedy="push the tree again") from None
    return parse_manifest(data, bucket, key), etag


def parse_manifest(data: bytes, bucket: Bucket, key: str) -> Manifest:
    """The manifest of a tree from the content of the object `key`, which is in the tree.

    Its parts are read once on this node, and kept in the cache.

    Raises:
        InvalidManifest: the object is not a manifest.
    """
    read = partial(_read_part, bucket, key.rpartition("/")[0])
    return Manifest.from_json(data, where=f"{bucket.uri}/{key}", read_part=read)


def _read_part(bucket: Bucket, prefix: str, part: ManifestPart) -> bytes:
    fetch = partial(bucket.get, f"{prefix}/{part.key}")
    return TreeCache.from_settings().content(part.sha256, fetch=fetch)


@dataclass(kw_only=True)
class S3Push:
    """One push of a folder to the tree `prefix`."""

    bucket: Bucket
    folder: Path
    prefix: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    max_removed: float = 1.0
    verify: bool = False
    """Read all content that is not sent, instead of comparing sizes and ETags."""

    _previous: Manifest | None = None
    _etag: str | None = None
    """ETag of the manifest that is replaced; None if there is none."""
    _listed: dict[str, ObjectInfo] = field(default_factory=dict)
    """Objects below the tree by their key relative to it."""
    _claim_parts: tuple[ManifestPart, ...] = ()
    _unfinished: UnfinishedUploads = field(default_factory=UnfinishedUploads)

    @property
    def _where(self) -> str:
        return f"{self.bucket.uri}/{self.prefix}"

    def run(self) -> Manifest:
        """Push, and return the manifest.

        Raises:
            PushConflict: another process changed the tree.
            TitaError: the folder or the name is refused, or the folder changed.
        """
        check_tree_name(self.prefix, uri=self.bucket.uri)
        states = {path: file_state(self.folder / path) for path in tree_paths(self.folder)}
        for path in states:
            check_key_length(f"{self.bucket.prefix}{self.prefix}/{version_folder('', '')}/{path}")
        self._read_tree()
        check_removals(self._previous, states, max_removed=self.max_removed, where=self._where)
        manifest = build_manifest(self.folder, paths=states, meta=self.meta)
        self.bucket.require_conditions(self._etag is not None)
        plain = self._etag is None and self._claim(manifest)
        if plain and self.bucket.head(f"{self.prefix}/{MANIFEST}") is not None:
            # Another push has completed the tree and deleted its claim.
            self._delete_claim(kept=self._claim_parts)
            return self._completed_by_another(manifest)
        files = self._send(manifest, states, plain=plain)
        self._list()
        manifest = replace(manifest, files=tuple(map(self._stored, files)), push=uuid4().hex)
        return self._commit(manifest)

    def _read_tree(self) -> None:
        try:
            previous, self._etag = read_manifest(self.bucket, self.prefix)
            self._previous = None if previous is None else previous.in_memory()
        except InvalidManifest:
            # This push replaces it, wherever the damage is.
            self._list()
            self._etag = self._listed[MANIFEST].etag
        if self.bucket.head(self.prefix) is not None:
            raise TitaError(
                "there is an object of this name, such as a pointer",
                where=self._where,
                remedy="choose another name for the tree",
            )
        self._list()
        own = {file.stored_at for file in self._previous.files} if self._previous else set()
        below = (key for key in self._listed if key.endswith(f"/{MANIFEST}") and key not in own)
        refuse_nesting(
            self.prefix,
            uri=self.bucket.uri,
            is_tree=self._is_tree,
            below=[f"{self.prefix}/{key.removesuffix(f'/{MANIFEST}')}" for key in below],
        )

    def _is_tree(self, name: str) -> bool:
        try:
            return read_manifest(self.bucket, name)[0] is not None
        except InvalidManifest:
            return False  # a user's file of this name

    def _list(self) -> None:
        start = f"{self.prefix}/"
        self._listed = {
            entry.key.removeprefix(start): entry for entry in self.bucket.list_objects(start)
        }

    def _claim(self, manifest: Manifest) -> bool:
        """Whether this push may write below the tree itself.

        Another push has claimed that if it began first, perhaps with other content. It may be
        alive, so its claim is not taken over.
        """
        key = f"{self.prefix}/{CLAIM}"
        claim = self._in_parts(manifest)
        self._claim_parts = claim.parts
        if self.bucket.put_if_unchanged(key, claim.to_json(), etag=None):
            return True
        try:
            claimed = parse_manifest(self.bucket.get(key), self.bucket, key)
        except (FileNotFoundError, DamagedData):
            return False
        return claimed.digest == manifest.digest

    def _send(
        self, manifest: Manifest, states: Mapping[str, FileState], *, plain: bool
    ) -> list[ManifestFile]:
        """Upload what the store does not have; the files with the keys of their content."""
        beside = version_folder(self._etag or "", manifest.digest)
        previous = self._previous.files if self._previous else ()
        by_path = {file.path: file for file in previous}
        by_content = {file.sha256: file for file in previous}
        unused = self._unused_by_path()
        files: dict[str, ManifestFile] = {}
        missing: list[ManifestFile] = []
        copied: list[tuple[str, ManifestFile]] = []

        def look_up(file: ManifestFile) -> None:
            same = by_path.get(file.path)
            if same is None or same.sha256 != file.sha256:
                same = by_content.get(file.sha256)
            if same is not None and self._has(same.stored_at, file, etag=same.etag):
                files[file.path] = _at(file, same.stored_at)
                return
            own = f"{beside}/{file.path}"
            # `a/manifest.json` would make the folder `a` a tree.
            is_plain = self._etag is None and file.path.rpartition("/")[2] != MANIFEST
            for key in (file.path, own) if is_plain else (own,):
                if self._has(key, file):
                    files[file.path] = _at(file, key)
                    return
            # A name that is taken by other content stays as it is.
            is_free = is_plain and plain and file.path not in self._listed
            files[file.path] = _at(file, file.path if is_free else own)
            for key in unused.get(file.path, ()):
                if key != own and self._has(key, file):
                    copied.append((key, files[file.path]))
                    return
            missing.append(files[file.path])

        for_each_file("look up", manifest.files, look_up)
        missing += self._copy(copied)
        self._upload(missing, states)
        return [files[file.path] for file in manifest.files]

    def _unused_by_path(self) -> dict[str, list[str]]:
        """Keys of content that no manifest names, by the path for which it was sent.

        An interrupted push has left it. It may be removed at any time, so it is only copied.
        """
        named = {file.stored_at for file in self._previous.files} if self._previous else set()
        found: dict[str, list[str]] = {}
        for key in self._listed.keys() - named:
            folder, _, path = key.partition("/")
            if folder.startswith(HIDDEN) and path:
                found.setdefault(path, []).append(key)
        return found

    def _copy(self, copied: Sequence[tuple[str, ManifestFile]]) -> list[ManifestFile]:
        """Copy objects on the server; the files whose object was removed meanwhile."""
        sources = {file: key for key, file in copied}
        removed: list[ManifestFile] = []

        def copy(file: ManifestFile) -> None:
            target = f"{self.prefix}/{file.stored_at}"
            try:
                self.bucket.copy(f"{self.prefix}/{sources[file]}", target, sha256=file.sha256)
            except FileNotFoundError:
                removed.append(file)

        if sources:
            for_each_file("copy", sources, copy)
        return removed

    def _has(self, key: str, file: ManifestFile, *, etag: str | None = None) -> bool:
        """Whether the object at `key` has the content of `file`."""
        found = self._listed.get(key)
        if found is None or found.size_bytes != file.size_bytes:
            return False
        at = f"{self.prefix}/{key}"
        if self.verify:
            return has_content(self.bucket, at, file)
        return (etag is not None and etag == found.etag) or self.bucket.has_content(
            at, sha256=file.sha256
        )

    def _upload(self, missing: list[ManifestFile], states: Mapping[str, FileState]) -> None:
        self._unfinished = UnfinishedUploads.find(self.bucket, f"{self.prefix}/")
        total_bytes = sum(file.size_bytes for file in missing)
        with transfer_pool(f"push {self.prefix}", total_bytes=total_bytes) as pool:
            uploads: Iterator[Upload] = (
                Upload(
                    bucket=self.bucket,
                    pool=pool,
                    path=self.folder / file.path,
                    key=f"{self.prefix}/{file.stored_at}",
                    file=file,
                    state=states[file.path],
                    resume_id=self._unfinished.newest(f"{self.prefix}/{file.stored_at}"),
                )
                for file in sorted(missing, key=lambda file: file.path)
            )
            pool.run(chain.from_iterable(upload.tasks() for upload in uploads))

    def _stored(self, file: ManifestFile) -> ManifestFile:
        """The file with the ETag of its object."""
        found = self._listed.get(file.stored_at)
        if found is None or found.size_bytes != file.size_bytes:
            raise push_conflict(self._where)
        return replace(file, etag=found.etag or None)

    def _commit(self, manifest: Manifest) -> Manifest:
        previous = self._previous
        if previous is not None and (
            previous.files, dict(previous.meta), bool(previous.push)
        ) == (manifest.files, dict(manifest.meta), True):  # fmt: skip
            return previous
        key, stored = f"{self.prefix}/{MANIFEST}", self._in_parts(manifest)
        if not self.bucket.put_if_unchanged(key, stored.to_json(), etag=self._etag):
            return self._completed_by_another(manifest)
        self._clean_up(stored, paths={file.path for file in manifest.files})
        return stored

    def _in_parts(self, manifest: Manifest) -> Manifest:
        """The manifest as it is stored; its parts are sent, whether they are there or not.

        A prune that began earlier may remove one that is there, but not complete with this one.
        """
        return manifest.in_parts(
            lambda key, data: self.bucket.put(f"{self.prefix}/{key}", data),
            read=partial(_read_part, self.bucket, self.prefix),
            where=f"{self._where}/{MANIFEST}",
        )

    def _completed_by_another(self, manifest: Manifest) -> Manifest:
        """The manifest of another push if it has the same content."""
        try:
            current, _ = read_manifest(self.bucket, self.prefix)
        except InvalidManifest:
            current = None
        if current is None or not has_same_content(current, manifest):
            raise push_conflict(self._where)
        return current

    def _delete_claim(self, *, kept: Collection[ManifestPart] = ()) -> None:
        """Delete the claim and its parts, except those that the manifest has, too."""
        # Credentials without the right to delete are enough for a push.
        with suppress(TitaError):
            self.bucket.delete(f"{self.prefix}/{CLAIM}")
            for part in self._claim_parts:
                if part not in kept:
                    self.bucket.delete(f"{self.prefix}/{part.key}")

    def _clean_up(self, manifest: Manifest, *, paths: Collection[str]) -> None:
        """Delete the claim, and parts of pushes that can only fail now; both are no content."""
        if self._etag is None:
            self._delete_claim(kept=manifest.parts)
        with suppress(TitaError):
            self._unfinished.abort(
                lambda key: _path_of(key.removeprefix(f"{self.prefix}/")) in paths
            )


def _path_of(key: str) -> str:
    """The path for which an object of the tree was sent."""
    folder, _, path = key.partition("/")
    return path if folder.startswith(HIDDEN) else key


def _at(file: ManifestFile, key: str) -> ManifestFile:
    return replace(file, key=None if key == file.path else key)
