"""Starts `build-pairs` workers as processes, and kills them at a given call.

They are forked from a server with all imports done, and run `python -m tita.pairs`.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import tita
from tita.demo.models import demo_model_path

_PACKAGES = tuple(str(Path(tita.__file__).parent / package) for package in ("pairs", "storage"))
_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["tests.pairs.preloaded"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker that was started."""

    process: BaseProcess
    stderr: Path
    """Its standard error."""
    steps: Path
    """Number of calls and returns in the traced packages, written at the end."""

    def end(self) -> tuple[int, str]:
        """Wait for its end; return exit code and standard error."""
        self.process.join(timeout=180)
        assert self.process.exitcode is not None, "the worker hangs"
        return self.process.exitcode, self.stderr.read_text()

    def succeed(self) -> str:
        """Wait for its end with exit code 0; return standard error."""
        code, stderr = self.end()
        assert code == 0, stderr
        return stderr


def start(
    folder: Path,
    environment: Mapping[str, str],
    *,
    run: str = "r",
    rank: int = 0,
    world_size: int = 1,
    die_at: int = 0,
    **recipe: object,
) -> Worker:
    """Start a worker of the demo's base model.

    Args:
        folder: for its standard error.
        environment: with `TITA_STORE`.
        die_at: the call or return in `tita.pairs` and `tita.storage` at which SIGKILL comes.
        recipe: keys that override the defaults.
    """
    whole: dict[str, Any] = {
        "model": str(demo_model_path("base")),
        "questions": "data/train.jsonl",
        "images": "data",
        "dtype": "float32",
        "max_new_tokens": 4,
        "batch_size": 5,
    } | recipe
    if whole.get("strategy") != "judge":
        whole.setdefault("noise", "ddpm")
    own = {
        **environment,
        "TITA_RUN": run,
        "TITA_RECIPE": json.dumps(whole),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    number = len(list(folder.glob("*.err")))
    stderr, steps = folder / f"{number}.err", folder / f"{number}.steps"
    stderr.touch()
    process = _FORKING.Process(target=_work, args=(own, str(stderr), str(steps), die_at))
    process.start()
    return Worker(process=process, stderr=stderr, steps=steps)


def _work(environment: dict[str, str], stderr: str, steps: str, die_at: int) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, [environment.get("PYTHONPATH")])
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    count = 0

    def step(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        if event in ("call", "return") and frame.f_code.co_filename.startswith(_PACKAGES):
            count += 1
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(step)
    sys.setprofile(step)
    runpy.run_module("tita.pairs", run_name="__main__")
    sys.setprofile(None)
    Path(steps).write_text(str(count))
