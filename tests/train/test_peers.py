"""Ranks that no collective tells of a death: they end all the same, and soon."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tita.errors import ExitCode
from tita.gang import free_port

pytestmark = [pytest.mark.slow]

WORKER = """
import os, pathlib, signal, time
from tita.train.group import join_group
signal.signal(signal.SIGTERM, lambda *_: None)  # Training notes it and goes on, too.
join_group(timeout_s=600)
pathlib.Path("pid-" + os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(600)
"""
RUN = """
import sys
from tita.gang import run_workers
from tita.settings import settings
sys.exit(run_workers("computing", settings=settings()))
"""


def test_ranks_that_compute_notice_that_another_is_gone(tmp_path: Path) -> None:
    """Two nodes of two: the dead one's neighbour sees it, the other node is told."""
    (tmp_path / "computing.py").write_text(WORKER)
    own = {
        "PYTHONPATH": str(tmp_path),
        "TITA_NUM_NODES": "2",
        "TITA_PROCS_PER_NODE": "2",
        "TITA_MASTER_PORT": str(free_port()),
    }
    agents = [
        subprocess.Popen(
            [sys.executable, "-c", RUN],
            env={**os.environ, **own, "TITA_NODE_RANK": str(rank)},
            cwd=tmp_path,
        )
        for rank in range(2)
    ]
    try:
        until = time.monotonic() + 90
        while not all((tmp_path / f"pid-{rank}").exists() for rank in range(4)):
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(int((tmp_path / "pid-3").read_text()), signal.SIGKILL)
        killed = time.monotonic()
        codes = [agent.wait(timeout=90) for agent in agents]
        assert time.monotonic() - killed < 60
    finally:
        for agent in agents:
            agent.kill()
    # One node counts the death; the other only lost a peer.
    assert codes == [ExitCode.LOST_PEER, 128 + signal.SIGKILL]
