"""The short form of benchmarks/scale.py: its bounds of requests, bytes and memory hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_costs_grow_as_documented() -> None:
    ended = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "scale.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stdout
    lines = ended.stdout.splitlines()
    assert {line.partition(":")[0] for line in lines} >= {
        "lengths",
        "restart",
        "pairs",
        "shards",
        "manifest",
    }
    assert "MISSED" not in ended.stdout
