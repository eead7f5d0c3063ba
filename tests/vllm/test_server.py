"""A server over vLLM, as a process."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytest.importorskip("vllm", reason="engine vllm is not installed: run make test-vllm")

from tita.demo.models import demo_model_path
from tita.gang import free_port

START_S = 1000
"""On a busy machine."""


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


def left(pids: list[int], *, within_s: float) -> list[int]:
    """Those that still run after this time."""
    ends = time.monotonic() + within_s
    while any(map(runs, pids)) and time.monotonic() < ends:
        time.sleep(0.1)
    return [pid for pid in pids if runs(pid)]


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A ready server, in a process group of its own, and its address."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    named = [f"--{role}={demo_model_path(role)}" for role in ("base", "reward")]
    command = [sys.executable, "-m", "tita", "serve", "--port", str(port), *named]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--engine", "vllm", "--enforce-eager"],
            stderr=log,
            env=os.environ | environment,
            start_new_session=True,
        )
        try:
            ends = time.monotonic() + START_S
            while time.monotonic() < ends:
                assert server.poll() is None, (folder / "log").read_text()
                try:
                    if httpx.get(f"{address}/readyz", timeout=60).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.5)
            else:
                pytest.fail("the server was not ready in time")
            yield server, address
        finally:
            server.send_signal(signal.SIGKILL)
            server.wait()


def test_a_killed_server_leaves_no_process(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, _):
        started = children(server.pid)
        assert len(started) >= 1
    assert not left(started, within_s=60)


def test_interrupted_server_finishes_its_answers(tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches every process of the group."""
    body = {
        "model": "tita",
        "messages": [{"role": "user", "content": "what number is written ?"}],
        "max_tokens": 40,
        "ignore_eos": True,
        "guidance_weight": 0.5,
    }
    found: list[httpx.Response] = []
    with serving(tmp_path) as (server, address):
        started = children(server.pid)

        def ask() -> None:
            found.append(httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300))

        asking = threading.Thread(target=ask)
        asking.start()
        running = re.compile(r"tita:num_requests_running\S* 1\.0")
        while not running.search(httpx.get(f"{address}/metrics", timeout=60).text):
            assert asking.is_alive(), "the answer was complete before the interrupt"
        os.killpg(server.pid, signal.SIGINT)
        asking.join(timeout=300)
        assert server.wait(timeout=120) == 0
    assert found[0].status_code == 200
    assert found[0].json()["usage"]["completion_tokens"] == 40
    assert not left(started, within_s=60)


def test_a_server_whose_engine_died_is_not_healthy(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, address):
        # Its other child is the resource tracker of multiprocessing.
        (engine,) = (
            pid
            for pid in children(server.pid)
            if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(engine, signal.SIGKILL)
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            statuses = [
                httpx.get(f"{address}/{name}", timeout=60).status_code
                for name in ("healthz", "readyz")
            ]
            if statuses == [500, 500]:
                break
            time.sleep(0.2)
        assert statuses == [500, 500]
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=120) == 0
