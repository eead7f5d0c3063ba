"""The store of data, checkpoints and results: a directory or `s3://bucket/prefix`."""

from tita.storage.locate import open_store, resolve
from tita.storage.manifest import Manifest, ManifestFile
from tita.storage.store import ObjectInfo, Store, is_done

__all__ = ["Manifest", "ManifestFile", "ObjectInfo", "Store", "is_done", "open_store", "resolve"]
