"""Versions that results record."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PRINT = "from tita.provenance import software; print(software([])['git'])"


def git_version(folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _PRINT], cwd=folder, capture_output=True, text=True, timeout=60,
        check=True, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), **environment},
    )  # fmt: skip
    return done.stdout.strip()


def test_an_image_reports_its_revision() -> None:
    assert git_version(ROOT, TITA_REVISION="abc123") == "abc123"


def test_the_version_of_another_checkout_is_not_reported(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", tmp_path, *identity, "commit", "--allow-empty", "-qm", "x"]
    subprocess.run(command, check=True)
    installed = tmp_path / "site-packages"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tita", installed / "tita", ignore=ignore)
    assert git_version(installed) == "None"
    assert git_version(ROOT) not in ("", "None")
