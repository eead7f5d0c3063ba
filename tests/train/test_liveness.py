"""Ranks notice lost peers without a collective; errors of collectives are classified."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import DistBackendError

from tita.errors import ExitCode
from tita.gang import free_port
from tita.train.liveness import is_lost_peer

WORKER = """
import os, pathlib, signal, time
from tita.train.group import join_group
signal.signal(signal.SIGTERM, lambda *_: None)  # As training does.
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


@pytest.mark.slow
def test_ranks_that_compute_notice_a_dead_rank(tmp_path: Path) -> None:
    """Two nodes of two: the dead rank's neighbour sees it and reports it to the other node."""
    (tmp_path / "computing.py").write_text(WORKER)
    own = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
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
        until = time.monotonic() + 150
        while not all((tmp_path / f"pid-{rank}").exists() for rank in range(4)):
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(int((tmp_path / "pid-3").read_text()), signal.SIGKILL)
        codes = [agent.wait(timeout=90) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    # One node returns the kill's code; the other only lost a peer.
    assert codes == [ExitCode.LOST_PEER, 128 + signal.SIGKILL]


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("NCCL communicator was aborted on rank 1.", True),
        ("NCCL error in: x.cpp:1, remote process exited or there was a network error", True),
        ("NCCL error: unhandled system error (run with NCCL_DEBUG=INFO)", True),
        ("NCCL error: ncclInternalError: Bootstrap : no socket interface found", False),
        ("NCCL error: ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1", False),
        ("NCCL error: ncclSystemError: failed to extend /dev/shm/nccl-x: No space left", False),
        ("NCCL error: ncclUnhandledCudaError: Call to CUDA function failed.", False),
    ],
)
def test_a_fault_of_this_node_is_not_a_lost_peer(words: str, lost: bool) -> None:
    """A lost peer's code is retried without limit."""
    assert is_lost_peer(DistBackendError(words)) == lost
    assert not is_lost_peer(ValueError(words))
