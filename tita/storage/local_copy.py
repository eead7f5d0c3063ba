"""The record that a pull keeps in its destination: which files it wrote, and which are outdated.

`.tita-pulled.json` lists the files of the tree that was pulled last, and files of earlier pulls
that this tree does not have. Other files in the folder are the user's own.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tita.errors import TitaError
from tita.storage.files import atomic_path
from tita.storage.manifest import MANIFEST, Manifest, ManifestFile, is_complete, is_inside

_RECORD = ".tita-pulled.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledFolder:
    """What pulls have written to one folder."""

    digest: str
    """Digest of the tree that was pulled last."""
    files: tuple[ManifestFile, ...]
    """Its files."""
    outdated: tuple[ManifestFile, ...]
    """Files of earlier pulls that are still there."""


def read_record(folder: Path) -> PulledFolder | None:
    """The record of the pulls into a folder, or None without any."""
    try:
        body = json.loads((folder / _RECORD).read_bytes())
        return PulledFolder(
            digest=body["digest"],
            files=_parse(body["files"]),
            outdated=_parse(body["outdated"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return _read_former_record(folder)


def _read_former_record(folder: Path) -> PulledFolder | None:
    """Earlier versions kept a copy of the manifest."""
    try:
        manifest = Manifest.from_json((folder / MANIFEST).read_bytes(), where=str(folder))
        files = tuple(manifest.files)
    except (OSError, TitaError):
        return None
    return PulledFolder(digest=manifest.digest, files=files, outdated=())


def write_record(folder: Path, manifest: Manifest) -> None:
    """Record a pull that is complete."""
    before = read_record(folder)
    current = {file.path for file in manifest.files}
    former = before.files + before.outdated if before else ()
    outdated = [f for f in former if f.path not in current and (folder / f.path).is_file()]
    body = {
        "digest": manifest.digest,
        "files": [_entry(file) for file in manifest.files],
        "outdated": [_entry(file) for file in outdated],
    }
    with atomic_path(folder / _RECORD) as temporary:
        temporary.write_text(json.dumps(body))


def remove_outdated(folder: Path) -> tuple[list[str], list[str]]:
    """Remove files of earlier pulls that the current tree does not have.

    Returns:
        The paths that were removed, and those that stay because they were changed.
    """
    record = read_record(folder)
    removed, changed = [], []
    for file in record.outdated if record else ():
        path = folder / file.path
        if is_complete(path, file):
            path.unlink()
            removed.append(file.path)
            for parent in list(path.relative_to(folder).parents)[:-1]:
                if any((folder / parent).iterdir()):
                    break
                (folder / parent).rmdir()
        elif path.is_file():
            changed.append(file.path)
    return removed, changed


def _entry(file: ManifestFile) -> dict[str, object]:
    entry = asdict(file)
    return {name: entry[name] for name in ("path", "size_bytes", "sha256")}


def _parse(entries: list[Mapping[str, object]]) -> tuple[ManifestFile, ...]:
    files = tuple(ManifestFile(**entry) for entry in entries)  # type: ignore[arg-type]
    if not all(is_inside(file.path) for file in files):
        raise ValueError("a path leaves the folder")
    return files
