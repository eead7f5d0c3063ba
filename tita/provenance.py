"""Software versions that models, pairs and reports record as their provenance."""

import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tita import __version__


def software(packages: Sequence[str]) -> dict[str, Any]:
    """Versions of tita, of the git checkout that it runs from, and of `packages`.

    Returns:
        `tita`; `git`, the output of `git describe`, None in an installed package; `packages`.
    """
    return {
        "tita": __version__,
        "git": _git_version(),
        "packages": {name: metadata.version(name) for name in packages},
    }


def _git_version() -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
