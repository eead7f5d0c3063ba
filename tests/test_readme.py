"""The READMEs: the same commands in both languages, and every command works."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tita.demo.models import demo_model_path
from tita.demo.scenes import make_scenes, write_scenes
from tita.storage import open_store

ROOT = Path(__file__).parent.parent
BUCKET = "--set s3.bucket=my-bucket"


def commands(readme: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / readme).read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_both_languages_have_the_same_commands() -> None:
    assert commands("README.md")
    assert commands("README.md") == commands("README.zh-CN.md")


def test_both_languages_have_the_same_sections() -> None:
    one, other = (
        re.findall(r"^(#+) ", (ROOT / name).read_text(), flags=re.MULTILINE)
        for name in ("README.md", "README.zh-CN.md")
    )
    assert one == other


def test_environment_is_activated_before_the_first_tita_command() -> None:
    """`make` installs into `.venv`, which is not on a new user's PATH."""
    lines = commands("README.md")
    first = next(n for n, line in enumerate(lines) if line.startswith("tita"))
    assert lines[first - 1] == ". .venv/bin/activate"
    makefile = (ROOT / "Makefile").read_text()
    assert "VENV := .venv\n" in makefile


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_ci_runs_the_first_two_commands(command: str) -> None:
    assert command in commands("README.md")
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert any(line.split("#")[0].strip().startswith(command) for line in lines)


def test_an_interrupted_installation_is_continued(tmp_path: Path) -> None:
    """An environment that was created halfway has python and no pip."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    goal = ["make", "-n", "install", f"VENV={tmp_path}", "PYTHON=echo"]
    printed = subprocess.run(goal, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    [create] = [line for line in printed.splitlines() if "-m venv" in line]
    created = subprocess.run(create, shell=True, capture_output=True, text=True, check=True)
    assert created.stdout == f"-m venv {tmp_path}\n"


def run(command: str, *, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run one line of the README in a shell, with this environment's commands on PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command,
        shell=True,
        cwd=cwd,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_make_names_a_python_that_does_not_exist(tmp_path: Path) -> None:
    done = run(f"make install PYTHON=python3.99 VENV={tmp_path}/venv", cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("found no python3.99; give one, for example make PYTHON=")


@pytest.mark.slow
def test_commands_for_one_machine_work_unchanged(tmp_path: Path) -> None:
    scenes = make_scenes("train", number=40)
    write_scenes(tmp_path / "data", scenes, name="train")
    image = tmp_path / "data" / str(scenes[0].questions[0].image)
    shutil.copy(image, tmp_path / "data" / "photo.png")
    for role in ("base", "reward"):
        shutil.copytree(demo_model_path(role), tmp_path / role)
    own = [line for line in commands("README.md") if "--local" in line or " data " in line]
    own += [line for line in commands("README.md") if line.startswith("tita infer")]
    assert len(own) == 5
    for command in own:
        done = run(command, cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    compared = done.stdout.splitlines()
    assert compared[0].startswith("base: ")
    assert compared[1].startswith("w = 0.3: ")
    store = open_store(str(tmp_path / "tita-store"))
    pairs, trained = store.read_manifest("pairs/my-pairs"), store.pull_tree("runs/my-run")
    assert pairs is not None
    recorded = json.loads((trained / "run.json").read_text())["pairs"]
    assert (recorded["digest"], recorded["number"]) == (pairs.digest, pairs.meta["num_kept"])


@pytest.mark.slow
def test_helm_commands_render(tmp_path: Path) -> None:
    """tests/chart tests the same commands against an API server."""
    tool = Path(run(f"{sys.executable} charts/get_helm.py", cwd=ROOT).stdout.strip()) / "helm"
    helm = [line for line in commands("README.md") if line.startswith("helm ")]
    assert len(helm) == 2
    for command in helm:
        line = command.replace("helm install", f"{tool} template")
        line = line.replace("helm upgrade", f"{tool} template")
        line = line.replace("--reset-then-reuse-values", BUCKET)
        done = run(line, cwd=ROOT)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "kind: CronJob" in done.stdout


@pytest.mark.slow
def test_cluster_commands_report_a_missing_cluster_in_one_line(tmp_path: Path) -> None:
    """tests/launch tests them against an API server."""
    ours = ("tita doctor", "tita jobs", "tita promote", "tita launch train-dpo --gpus 4")
    lines = [line for line in commands("README.md") if line.startswith(ours)]
    assert len(lines) == 4
    for command in lines:
        done = run(command, cwd=tmp_path, KUBECONFIG=str(tmp_path / "none"))
        assert done.returncode in (1, 2, 3), command
        assert "Traceback" not in done.stderr
        assert done.stdout or done.stderr


def test_benchmark_commands_are_tested() -> None:
    lines = [line for line in commands("README.md") if line.startswith("tita-bench")]
    tested = (ROOT / "tests" / "bench" / "test_flow.py").read_text()
    tested = " ".join(tested.replace("\\\n", " ").split())
    assert len(lines) == 3
    for line in lines:
        assert line in tested


def test_links_resolve() -> None:
    for readme in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / readme).read_text()):
            assert (ROOT / target).exists(), f"{readme} links to {target}"
