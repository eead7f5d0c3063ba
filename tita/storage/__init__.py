"""The store: where data, checkpoints and results live, a directory or `s3://bucket/prefix`."""

from tita.storage.locate import open_store, resolve
from tita.storage.manifest import Manifest, ManifestFile
from tita.storage.results import is_done
from tita.storage.store import ObjectInfo, Store

__all__ = ["Manifest", "ManifestFile", "ObjectInfo", "Store", "is_done", "open_store", "resolve"]
