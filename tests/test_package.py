"""The distributions: a wheel from the sdist, installed alone, has chart, jobs and demo."""

import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command that succeeds, outside of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with the wheel, beside the dependencies of this one."""
    folder = tmp_path_factory.mktemp("package")
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
    return python.parent


def test_the_image_is_built_with_all_that_the_wheel_has() -> None:
    """Hatch refuses to build a wheel without one of them."""
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    wheel = targets["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"]}
    stage = (ROOT / "Dockerfile").read_text().partition(" AS package\n")[2].partition("\nFROM ")[0]
    lines = [line.split()[1:-1] for line in stage.splitlines() if line.startswith("COPY ")]
    copied = {source for sources in lines for source in sources}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    for path in needed:
        assert path.split("/")[0] in copied, path
        assert path.split("/")[0] in sent, path


@pytest.mark.slow
@pytest.mark.timeout(1200)  # on a busy machine
def test_wheel_has_chart_jobs_and_demo(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import tita; print(tita.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))
    chart = Path(run(installed / "tita", "chart", cwd=tmp_path).strip())
    for folder, copy in (("charts/tita", chart), ("jobs", chart / "jobs")):
        source = ROOT / folder
        files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
        assert {
            name for name in files if (copy / name).read_bytes() == (source / name).read_bytes()
        } == files
    command = ("demo", "--quick", "--out", "demo-out")
    assert "guided" in run(installed / "tita", *command, cwd=tmp_path)
    assert (tmp_path / "demo-out" / "report.html").is_file()
