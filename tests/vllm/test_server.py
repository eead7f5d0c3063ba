"""A server over vLLM, as a process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("vllm", reason="engine vllm is not installed: run make test-vllm")

from tita.demo.models import demo_model_path
from tita.gang import free_port

START_S = 280


def children(pid: int) -> list[int]:
    shown = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False
    )
    found = [int(word) for word in shown.stdout.split()]
    return found + [each for child in found for each in children(child)]


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_killed_server_leaves_no_process(tmp_path: Path) -> None:
    port = free_port()
    named = [f"--{role}={demo_model_path(role)}" for role in ("base", "reward")]
    command = [sys.executable, "-m", "tita", "serve", "--port", str(port), *named]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--engine", "vllm", "--enforce-eager"],
            stderr=log,
            env=os.environ | environment,
        )
        try:
            ends = time.monotonic() + START_S
            while time.monotonic() < ends:
                assert server.poll() is None, (tmp_path / "log").read_text()
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.5)
            else:
                pytest.fail("the server was not ready in time")
            started = children(server.pid)
            assert len(started) >= 1
        finally:
            server.send_signal(signal.SIGKILL)
            server.wait()
    ends = time.monotonic() + 10
    while any(map(runs, started)) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not [pid for pid in started if runs(pid)]
