"""Thousands of requests of all kinds leak no memory, files or places."""

import re
from pathlib import Path

import pytest
import traffic
from serve_process import Server, serving

MAX_GROWN_BYTES = 20 * 2**20
"""2 KiB per request, less than the smallest leak: one pending request and its prompt's tensors.
The memory that glibc retains varies by a few MiB."""


def resident_bytes(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return 1024 * int(found[1])


def num_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def test_requests_of_all_kinds_leave_the_server_idle(server: Server):
    traffic.send(server, num_requests=100, seed=1)
    assert server.idle_within(60)
    assert "Traceback" not in server.log


@pytest.mark.soak
def test_10000_requests_leak_no_memory():
    with serving() as server:
        server.ready()
        traffic.send(server, num_requests=1500, seed=0)
        assert server.idle_within(60)
        before, files = resident_bytes(server), num_files(server)
        for tenth in range(10):
            traffic.send(server, num_requests=1000, seed=1 + tenth)
            now = resident_bytes(server)
            print(
                f"{1000 * (tenth + 1):>6,} requests: {(now - before) / 2**20:+.1f} MiB", flush=True
            )
        assert server.idle_within(60)
        assert "Traceback" not in server.log
        assert num_files(server) <= files + 8
        assert resident_bytes(server) - before <= MAX_GROWN_BYTES
        assert server.terminate() == 0
