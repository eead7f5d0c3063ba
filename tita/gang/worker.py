"""Runs one worker, `python -m tita.gang.worker MODULE`, and shows its node what it does."""

import os
import runpy
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from tita.activity import Stage, current_stage, enter_stage, report_stages
from tita.gang.stages import to_text
from tita.gang.torchrun import heartbeat_file
from tita.settings import settings

_LOOK_S = 0.5
"""Seconds between two looks at this worker's stage."""
_PROGRESS_EVERY_S = 2.0


def main() -> None:
    """Run the module that the first argument names as `__main__`."""
    module = sys.argv.pop(1)
    ended = threading.Event()
    beat = None
    if (file := heartbeat_file(os.getpid())) is not None:
        enter_stage("importing libraries")
        report_stages()
        beat = threading.Thread(target=_beat, args=(file, ended), name="alive", daemon=True)
        beat.start()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        # A daemon thread that runs while the interpreter ends may crash it.
        ended.set()
        if beat is not None:
            beat.join(timeout=_LOOK_S)


def _beat(file: Path, ended: threading.Event) -> None:
    """Write this worker's stage when it changes, its progress and a heartbeat now and then."""
    rank = int(os.environ.get("RANK", "0"))
    every_s = min(_PROGRESS_EVERY_S, settings().heartbeat_timeout_s / 4)
    written: Stage | None = None
    written_at = float("-inf")
    # The folder vanishes with the parent process.
    while file.parent.is_dir() and not ended.is_set():
        stage, now = current_stage(), time.monotonic()
        if stage is not None and (stage is not written or now - written_at >= every_s):
            # A full disk: the file's time has changed, which is the heartbeat.
            with suppress(OSError):
                file.write_text(to_text(stage, rank=rank))
            written, written_at = stage, now
        ended.wait(min(_LOOK_S, every_s))


if __name__ == "__main__":
    main()
