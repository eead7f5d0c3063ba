"""Real torchrun workers; the exit code of the node explains the failure."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tita.errors import ExitCode
from tita.gang.torchrun import decisive_exit_code

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        ([0, 0], ExitCode.FAILED),
        ([ExitCode.TERMINATED, 1], 1),
        ([-15, ExitCode.USER], ExitCode.USER),
        ([1, ExitCode.USER], ExitCode.USER),
        ([ExitCode.LOST_PEER, -9], 137),
        ([ExitCode.LOST_PEER, ExitCode.RETRY], ExitCode.RETRY),
        ([-15, ExitCode.LOST_PEER], ExitCode.LOST_PEER),
        ([-15], ExitCode.TERMINATED),
        ([ExitCode.OUT_OF_MEMORY, ExitCode.LOST_PEER], ExitCode.OUT_OF_MEMORY),
    ],
)
def test_the_decisive_exit_code(codes: list[int], wanted: int) -> None:
    assert decisive_exit_code(codes) == wanted


def run(tmp_path: Path, body: str, *, before: str = "true") -> "subprocess.CompletedProcess[str]":
    """Run `body` in two workers, as `tita train-dpo` does."""
    (tmp_path / "worker_under_test.py").write_text(f"import os, sys, time, signal\n{body}")
    code = (
        "import sys; from tita.gang import run_workers; from tita.settings import settings;"
        "sys.exit(run_workers('worker_under_test', settings=settings()))"
    )
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "TITA_PROCS_PER_NODE": "2",
        "TITA_TERMINATION_LOG": str(tmp_path / "last-word"),
    }
    return subprocess.run(
        ["sh", "-c", f'{before} && exec "$0" "$@"', sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_all_workers_run_with_their_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    body = f"open(f'{tmp_path}/{{os.environ[\"RANK\"]}}', 'w').write(os.environ['WORLD_SIZE'])\n"
    assert run(tmp_path, body).returncode == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]
    left = {path.name.partition("_")[0] for path in (tmp_path / "tmp").iterdir()}
    assert left <= {"torchinductor"}, "torch's cache of compiled kernels"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("sys.exit(2 if os.environ['RANK'] == '1' else time.sleep(30))", 2),
        (
            "os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '0' else time.sleep(30)",
            137,
        ),
        ("sys.exit(75)", 75),
    ],
)
def test_a_failing_worker_ends_all_with_its_code(tmp_path: Path, body: str, code: int) -> None:
    done = run(tmp_path, body)
    assert done.returncode == code, done.stderr
    assert json.loads((tmp_path / "last-word").read_text())["exit_code"] == code


def test_sigterm_while_torch_is_imported_leaves_no_folders(tmp_path: Path) -> None:
    """A module `torch` that takes a minute stands for the seconds of the real one."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        f"import pathlib, time\npathlib.Path('{tmp_path}/importing').touch()\ntime.sleep(60)\n"
    )
    code = (
        "from tita.gang import run_workers; from tita.settings import settings;"
        "run_workers('worker_under_test', settings=settings())"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "TMPDIR": str(tmp_path / "tmp")}
    node = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        while not (tmp_path / "importing").exists():
            assert node.poll() is None
            time.sleep(0.05)
        kinds = sorted(path.name[:10] for path in (tmp_path / "tmp").iterdir())
        assert kinds == ["tita-gang-", "tita-work-"]
        node.terminate()
        assert node.wait(timeout=30) == ExitCode.TERMINATED
    finally:
        node.kill()
        node.wait()
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.slow
def test_a_frozen_worker_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITA_HEARTBEAT_TIMEOUT_S", "5")
    body = """
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(600)
"""
    done = run(tmp_path, body)
    assert done.returncode == ExitCode.HUNG, done.stderr
    assert "rank 1 (process" in done.stderr
    assert "is frozen: no life for" in done.stderr
    assert "out of memory" not in done.stderr


@pytest.mark.slow
def test_a_rank_without_progress_is_ended(tmp_path: Path) -> None:
    body = """
from tita.activity import mark_progress
from tita.gang import WATCHDOG
WATCHDOG.start("job", timeout_s=3.0)
for _ in range(20):
    time.sleep(0.2)
    mark_progress()
if os.environ["RANK"] == "1":
    time.sleep(600)
while True:
    time.sleep(0.2)
    mark_progress()
"""
    done = run(tmp_path, body)
    assert done.returncode == ExitCode.HUNG, done.stderr
    assert "job: rank 1 is hung: no progress for" in done.stderr
    assert "rank 0 is hung" not in done.stderr


@pytest.fixture
def limited_cpus() -> Iterator[Path]:
    """A control group of one and a half CPUs that other processes can be put into."""
    limits = {
        "cpu": {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "150000"},
        "": {"cpu.max": "150000 100000"},
    }
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in limits:
            continue
        group = Path("/sys/fs/cgroup", controllers, path.strip("/"), f"tita-{os.getpid()}")
        try:
            group.mkdir()
            for name, text in limits[controllers].items():
                (group / name).write_text(text)
        except OSError:
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("this user may not create a CPU control group")


def test_cpus_are_those_of_the_container(limited_cpus: Path) -> None:
    program = "from tita.gang import num_cpus; print(num_cpus())"
    outputs = [
        subprocess.run(
            ["sh", "-c", f'{before} && exec "$0" "$@"', sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for before in ("true", f"echo $$ > {limited_cpus}/cgroup.procs")
    ]
    assert [int(output) for output in outputs] == [len(os.sched_getaffinity(0)), 1]


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory control group of 800 MiB that other processes can be put into."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        first = controllers == "memory"
        if not first and controllers:
            continue
        root = Path("/sys/fs/cgroup", "memory" if first else "", path.strip("/"))
        group = root / f"tita-{os.getpid()}"
        limits = ("memory.limit_in_bytes",) if first else ("memory.max", "memory.swap.max")
        try:
            group.mkdir()
            for name in limits:
                (group / name).write_text("0" if "swap" in name else str(800 * 2**20))
        except OSError:
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("this user may not create a memory control group")


@pytest.mark.slow
def test_an_oom_kill_is_reported(tmp_path: Path, small_cgroup: Path) -> None:
    body = "os.environ['RANK'] == '1' and bytearray(2**31)\ntime.sleep(30)\n"
    done = run(tmp_path, body, before=f"echo $$ > {small_cgroup}/cgroup.procs")
    # `OUT_OF_MEMORY` is the device's memory, and never retried.
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    words = r"this pod reached its memory limit of 0.8 GiB \(0.8 GiB were used\); raise "
    assert re.search(words + r"jobs\.resources\.limits\.memory", done.stderr)
    message = json.loads((tmp_path / "last-word").read_text())
    assert "memory limit of 0.8 GiB" in message["error"]
