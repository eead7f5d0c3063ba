"""tita as users install it: a wheel from the sdist, in an environment without the checkout."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.once import made_once

ROOT = Path(__file__).parent.parent


def outside() -> dict[str, str]:
    """Environment variables of processes that don't use the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command that succeeds, outside of the checkout."""
    done = subprocess.run(
        command, cwd=cwd, env=outside(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with the wheel, beside the dependencies of this one."""
    return made_once(tmp_path_factory, "installed", _install) / "env" / "bin"


def _install(folder: Path) -> None:
    folder.mkdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    # Another pip in it would take as long as all that is done here.
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    packages = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    # Editable installs of the other environment are no part of it: their .pth files are not read.
    Path(packages.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
