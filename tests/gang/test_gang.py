"""The exit code of a node, with real workers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tita.errors import ExitCode
from tita.gang import free_port
from tita.gang.torchrun import decisive_exit_code

RUN = """
import sys
from tita.gang import run_workers
from tita.settings import settings
sys.exit(run_workers("worker", settings=settings()))
"""


def gang(folder: Path, worker: str, *, sigterm: bool = False) -> tuple[int, dict[str, object]]:
    (folder / "worker.py").write_text(worker)
    word = folder / "word.json"
    own = {
        "TITA_PROCS_PER_NODE": "2",
        "TITA_TERMINATION_LOG": str(word),
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
    }
    process = subprocess.Popen([sys.executable, "-c", RUN], env={**os.environ, **own}, cwd=folder)
    try:
        if sigterm:
            until = time.monotonic() + 60
            while len(list(folder.glob("ready-*"))) < 2:
                assert time.monotonic() < until
                time.sleep(0.1)
            process.terminate()
        code = process.wait(timeout=90)
    finally:
        process.kill()
    return code, json.loads(word.read_text()) if word.exists() else {}


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([-15, 2], ExitCode.USER),
        ([-9, 76], 137),
        ([-15, 70], ExitCode.HUNG),
        ([75, 76], ExitCode.RETRY),
        ([-15, 76], ExitCode.LOST_PEER),
        ([76, 12], ExitCode.OUT_OF_MEMORY),
        ([-15, -15], ExitCode.TERMINATED),
    ],
)
def test_the_decisive_exit_code(codes: list[int], expected: int) -> None:
    assert decisive_exit_code(codes) == expected
    assert decisive_exit_code(reversed(codes)) == expected


@pytest.mark.slow
def test_a_failing_worker_ends_its_sibling(tmp_path: Path) -> None:
    worker = "import os, sys, time\nos.environ['RANK'] == '1' and sys.exit(2)\ntime.sleep(600)\n"
    code, word = gang(tmp_path, worker)
    assert code == word["exit_code"] == ExitCode.USER


@pytest.mark.slow
def test_a_node_that_finds_no_other_ends(tmp_path: Path) -> None:
    """Without a gang scheduler, a gang may get a part of its nodes; it must not hold their GPUs."""
    own = {
        "TITA_NUM_NODES": "2",
        "TITA_MASTER_PORT": str(free_port()),
        "TITA_RENDEZVOUS_TIMEOUT_S": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env={**os.environ, **own},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.GANG_INCOMPLETE, done.stderr
    assert "not all nodes started within 1 s; this node releases its GPUs" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "expected"),
    [("75", ExitCode.RETRY), ("0", ExitCode.OK), ("1", ExitCode.TERMINATED)],
)
def test_the_exit_code_after_sigterm(tmp_path: Path, last: str, expected: int) -> None:
    worker = f"""
import os, pathlib, signal, sys, time
from tita.gang import record_exit_code

def stop(*_):
    record_exit_code({last})
    sys.exit({last})

signal.signal(signal.SIGTERM, stop)
pathlib.Path("ready-" + os.environ["RANK"]).touch()
time.sleep(600)
"""
    code, word = gang(tmp_path, worker, sigterm=True)
    assert code == word["exit_code"] == expected
