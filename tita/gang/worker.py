"""Runs one worker, `python -m tita.gang.worker MODULE`, and shows its node that it lives."""

import os
import runpy
import sys
import threading
from pathlib import Path

from tita.gang.torchrun import heartbeat_file
from tita.settings import settings


def main() -> None:
    """Run the module that the first argument names as `__main__`."""
    module = sys.argv.pop(1)
    if (file := heartbeat_file(os.getpid())) is not None:
        threading.Thread(target=_beat, args=(file,), name="alive", daemon=True).start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _beat(file: Path) -> None:
    pause = threading.Event()
    every_s = min(5.0, settings().heartbeat_timeout_s / 4)
    # The folder vanishes with the parent process.
    while file.parent.is_dir():
        file.touch()
        pause.wait(every_s)


if __name__ == "__main__":
    main()
