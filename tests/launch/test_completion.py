"""Shell completion, as the shells ask for it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tita.cli.commands import app
from tita.cli.main import run
from tita.jobspec import job_names

TITA = Path(sys.executable).with_name("tita")


def complete(shell: str, words: str, *, base: dict[str, str] | None = None) -> str:
    """The completions of `words`."""
    asked = {
        "bash": {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": words},
        "fish": {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    environment = {**(base or os.environ), **asked, "_TITA_COMPLETE": f"complete_{shell}"}
    done = subprocess.run([TITA], env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_jobs_commands_and_options(shell: str) -> None:
    jobs = complete(shell, "tita launch ")
    assert all(job in jobs for job in ("benchmark", "build-pairs", "train-dpo"))
    narrowed = complete(shell, "tita launch tr")
    assert "train-dpo" in narrowed
    assert "build-pairs" not in narrowed
    assert "watch" in complete(shell, "tita jobs wa")
    assert "--detach" in complete(shell, "tita launch train-dpo --de")


def test_the_help_of_launch_names_all_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["launch", "--help"], name="tita") == 0
    words = capsys.readouterr().out.replace(",", " ").replace(".", " ").split()
    assert set(job_names()) <= set(words)


def test_run_names(lab: Any) -> None:
    for name in ("first-try", "first-success", "second"):
        lab.submit(name)
    base = lab.environment()
    offered = complete("bash", "tita jobs watch fir", base=base).split()
    assert sorted(offered) == ["first-success", "first-try"]
    lab.api.stop()
    assert complete("bash", "tita jobs watch fir", base=base).split() == []
