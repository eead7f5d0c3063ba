"""The distributions have chart and jobs; tests/demo runs the demo of the same environment."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from tests.installed import ROOT, run
from tita import __version__
from tita.cli import bench, commands, main


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
def test_wheel_has_chart_and_jobs(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import tita; print(tita.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))
    chart = Path(run(installed / "tita", "chart", cwd=tmp_path).strip())
    for folder, copy in (("charts/tita", chart), ("jobs", chart / "jobs")):
        source = ROOT / folder
        files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
        assert {
            name for name in files if (copy / name).read_bytes() == (source / name).read_bytes()
        } == files


@pytest.mark.parametrize(("app", "name"), [(commands.app, "tita"), (bench.app, "tita-bench")])
def test_both_commands_print_the_version(
    app: typer.Typer, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(app, ["--version"], name=name) == 0
    assert capsys.readouterr().out == f"tita {__version__}\n"


_WITHOUT_EXTRA = """
import sys
for name in ("numpy", "PIL", "torch", "transformers"):
    sys.modules[name] = None
from tita.cli import bench, commands
from tita.cli.main import run
app = {"tita": commands.app, "tita-bench": bench.app}[sys.argv[1]]
sys.exit(run(app, sys.argv[2:], name=sys.argv[1]))
"""


@pytest.mark.parametrize(
    "command",
    [
        "tita ask hello",
        "tita data validate data.jsonl",
        "tita serve --base b",
        "tita selftest --cpu",
        "tita-bench sample --out questions.jsonl",
        "tita-bench run --questions questions.jsonl --out results.jsonl",
    ],
)
def test_a_command_without_its_packages_names_the_extra(command: str, tmp_path: Path) -> None:
    """`pip install .` has what submits and watches jobs, and no torch."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_EXTRA, *command.split()],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    name = command.partition(" ")[0]
    assert line.startswith(f"{name}: this command needs ")
    assert line.endswith(", which is not installed; pip install 'tita[ml]'")
    assert not done.stdout
    assert not list(tmp_path.iterdir())
