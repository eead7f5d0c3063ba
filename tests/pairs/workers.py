"""Workers of `build-pairs` as processes of their own that start in no time and die where told.

They are forked from a server that has imported what they need. What runs in them is what
`python -m tita.pairs` runs.
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

_ROOMS = tuple(str(Path(tita.__file__).parent / room) for room in ("pairs", "storage"))
_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["tests.pairs.preloaded"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker that was started."""

    process: BaseProcess
    said: Path
    """Its standard error."""
    steps: Path
    """How many calls and returns of the rooms it was killed in there were, once it is done."""

    def end(self) -> tuple[int, str]:
        """Wait for its end; exit code and what it said."""
        self.process.join(timeout=180)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode, self.said.read_text()

    def good(self) -> str:
        """Wait for its end, which must be a good one; what it said."""
        code, said = self.end()
        assert code == 0, said
        return said


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
        folder: where it writes what it says.
        environment: names the store.
        die_at: the call or return in `tita.pairs` and `tita.storage` at which SIGKILL comes.
        recipe: keys to lay over.
    """
    whole: dict[str, Any] = {
        "model": str(demo_model_path("base")),
        "questions": "data/train.jsonl",
        "images": "data",
        "dtype": "float32",
        "max_new_tokens": 4,
        "batch_size": 5,
        "noise": "ddpm",
    } | recipe
    own = {
        **environment,
        "TITA_RUN": run,
        "TITA_RECIPE": json.dumps(whole),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    number = len(list(folder.glob("*.err")))
    said, steps = folder / f"{number}.err", folder / f"{number}.steps"
    said.touch()
    process = _FORKING.Process(target=_work, args=(own, str(said), str(steps), die_at))
    process.start()
    return Worker(process=process, said=said, steps=steps)


def _work(environment: dict[str, str], said: str, steps: str, die_at: int) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, [environment.get("PYTHONPATH")])
    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    count = 0

    def step(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        if event in ("call", "return") and frame.f_code.co_filename.startswith(_ROOMS):
            count += 1
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(step)
    sys.setprofile(step)
    runpy.run_module("tita.pairs", run_name="__main__")
    sys.setprofile(None)
    Path(steps).write_text(str(count))
