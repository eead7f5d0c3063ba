"""Software versions that models, pairs and reports record as their provenance."""

import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tita import __version__
from tita.settings import settings


def software(packages: Sequence[str]) -> dict[str, Any]:
    """Versions of tita, of the image or git checkout that it runs from, and of `packages`.

    Returns:
        `tita`; `git`, the image's revision or the output of `git describe`, None in a package that
        was installed elsewhere; `packages`.
    """
    return {
        "tita": __version__,
        "git": _git_version(),
        "packages": {name: metadata.version(name) for name in packages},
    }


def _git_version() -> str | None:
    if (revision := settings().revision) not in (None, "", "unknown"):
        return revision
    root = Path(__file__).resolve().parents[1]
    try:
        # A virtual environment inside another checkout must not report that one's version.
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return _git(root, "describe", "--always", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
