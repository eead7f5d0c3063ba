"""A pod that holds GPUs and finds none ends at once; it never continues on the CPU in silence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tita.errors import ExitCode, NoDevice
from tita.gang.gpus import require_gpus
from tita.settings import Settings

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def run(*command: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["tita", "train-dpo", "--set", "model=m", "--set", "pairs=p"],
        ["tita", "build-pairs", "--set", "questions=q"],
        ["tita", "serve", "--base", "m", "--port", "0"],
    ],
    ids=lambda command: command[1],
)
def test_a_job_ends_at_once(tmp_path: Path, command: list[str]) -> None:
    own = {"TITA_GPUS": "2", "TITA_RUN": "r", "TITA_STORE": str(tmp_path)}
    done = run(*command, **own)
    assert done.returncode == ExitCode.NO_DEVICE, done.stderr
    assert "this pod holds 2 GPUs and PyTorch finds none (no NVIDIA driver; PyTorch" in done.stderr
    assert "Traceback" not in done.stderr
    # Permitted, it looks for its data.
    assert run(*command, **own, TITA_ALLOW_CPU="true").returncode == ExitCode.USER


@pytest.mark.parametrize(
    ("settings", "variable", "held"),
    [
        (Settings(gpus=1), "", True),
        (Settings(), "GPU-7cd1ad8d-04cd-2e66-9b4b-5c2f8a8f7d3a", True),
        (Settings(), "all", False),
        (Settings(), "void", False),
        (Settings(gpus=0), "GPU-7cd1ad8d-04cd-2e66-9b4b-5c2f8a8f7d3a", False),
        (Settings(gpus=1, allow_cpu=True), "", False),
    ],
)
def test_what_a_pod_holds(
    settings: Settings, variable: str, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", variable)
    if held:
        with pytest.raises(NoDevice, match="this pod holds 1 GPU and PyTorch finds none"):
            require_gpus(settings)
    require_gpus(settings, allow_cpu=True)
    if not held:
        require_gpus(settings)
