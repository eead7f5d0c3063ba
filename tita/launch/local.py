"""Runs a job on this machine: one process per node, as one pod per node on a cluster."""

import contextlib
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tita.errors import ExitCode
from tita.gang import decisive_exit_code, free_port
from tita.launch.display import open_display
from tita.launch.remedies import describe_exit_code
from tita.launch.run_state import PodRecords, RunPhase, RunSnapshot, WorkerStatus
from tita.launch.template import JobShape, check_run_name
from tita.records import read_record
from tita.terminal import Output, say

OnLine = Callable[[int, str], None]
"""Called with the rank of a node and one line of its output."""


# A job saves a checkpoint on SIGTERM; torchrun gives its workers 540 s for it.
GRACE_S = 570.0
# Environment variable that all processes of one launch inherit, also workers of workers.
_MARK = "TITA_LOCAL_MARK"


def run_node_processes(
    job: str,
    *,
    recipe: Mapping[str, Any],
    run: str,
    store: str,
    nodes: int = 1,
    procs_per_node: int = 2,
    on_line: OnLine | None = None,
    grace_s: float = GRACE_S,
) -> int:
    """Run `job` and wait for it.

    Every node is one process, `tita <job>`, with the environment that its pod would have. When one
    fails, the others are ended. Ctrl-C and SIGTERM are forwarded as SIGTERM, so that the job can
    save; a second one kills.

    Args:
        job: name of a job in `jobs/`.
        recipe: overrides of the job's default recipe.
        run: name of the run.
        store: a directory, or `s3://bucket/prefix`.
        nodes: number of node processes.
        procs_per_node: worker processes per node.
        on_line: receives the output; standard error if not given.
        grace_s: seconds between SIGTERM and SIGKILL.

    Returns:
        0, else the decisive exit code of the nodes (`tita.errors.ExitCode`); 130 after Ctrl-C.
    """
    check_run_name(run)
    shared = {
        "TITA_RUN": run,
        "TITA_RECIPE": json.dumps(dict(recipe)),
        "TITA_STORE": store,
        "TITA_NUM_NODES": str(nodes),
        "TITA_PROCS_PER_NODE": str(procs_per_node),
        "TITA_MASTER_ADDR": "127.0.0.1",
        "TITA_MASTER_PORT": str(free_port()),
        "PYTHONUNBUFFERED": "1",
    }
    # Otherwise each node would use all of this machine's cores.
    threads = max(1, (os.cpu_count() or 1) // (nodes * procs_per_node))
    environment = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ) | shared
    gang = _Gang(grace_s=grace_s)
    with _signals(gang.stop):
        for rank in range(nodes):
            own = {"TITA_NODE_RANK": str(rank), **_devices(rank, nodes, procs_per_node)}
            gang.start([sys.executable, "-m", "tita", job], env=environment | own)
        return gang.wait(on_line or (lambda rank, line: say(f"[{rank}] {line}")))


def num_gpus() -> int:
    """Visible NVIDIA GPUs, from the driver: importing torch takes seconds."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    listed = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed if visible is None else min(listed, len([d for d in visible.split(",") if d]))


def _devices(rank: int, nodes: int, procs_per_node: int) -> dict[str, str]:
    """Divide the GPUs among the nodes of this machine."""
    if nodes == 1 or num_gpus() < nodes * procs_per_node:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    all_devices = visible.split(",") if visible else [str(i) for i in range(num_gpus())]
    own = all_devices[rank * procs_per_node : (rank + 1) * procs_per_node]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}


@dataclass
class _Gang:
    """The processes of all nodes. One queue receives their lines, and None when a pipe ends."""

    grace_s: float
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    lines: queue.SimpleQueue[tuple[int, str | None]] = field(default_factory=queue.SimpleQueue)
    stopped_by: int | None = None
    kill_at: float | None = None

    def start(self, command: list[str], *, env: Mapping[str, str]) -> None:
        # A new session: a terminal sends Ctrl-C to its whole process group, and torchrun would
        # treat it as a failure before the job could save.
        process = subprocess.Popen(
            command,
            env={**env, _MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        rank = len(self.processes)
        self.processes.append(process)
        threading.Thread(target=self._read, args=(rank, process), daemon=True).start()

    def _read(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for raw in process.stdout:
            line = raw.decode("utf-8", errors="replace").rstrip("\r\n")
            # Progress bars rewrite their line: keep its last state.
            self.lines.put((rank, line.rsplit("\r", 1)[-1]))
        self.lines.put((rank, None))

    def stop(self, signum: int) -> None:
        """Terminate all processes; the second time, kill them."""
        if self.stopped_by is None:
            self.stopped_by = signum
            self.terminate()
        else:
            self.kill_at = 0.0

    def terminate(self) -> None:
        if self.kill_at is None:
            self.kill_at = time.monotonic() + self.grace_s
            for process in self.processes:
                _send(process, signal.SIGTERM)

    def wait(self, on_line: OnLine) -> int:
        try:
            open_pipes = len(self.processes)
            while open_pipes > 0:
                open_pipes -= self._take(on_line)
                if any(process.poll() for process in self.processes):
                    self.terminate()
                if self.kill_at is not None and time.monotonic() >= self.kill_at:
                    self._kill()
            codes = [process.wait() for process in self.processes]
        finally:
            self._kill()
        if self.stopped_by == signal.SIGINT:
            return ExitCode.INTERRUPTED
        return decisive_exit_code(codes) if any(codes) else ExitCode.OK

    def _take(self, on_line: OnLine) -> int:
        try:
            rank, line = self.lines.get(timeout=0.2)
        except queue.Empty:
            # A grandchild that outlives its node may keep the pipe open.
            return len(self.processes) if all(p.poll() is not None for p in self.processes) else 0
        if line is None:
            return 1
        on_line(rank, line)
        return 0

    def _kill(self) -> None:
        """Kill all remaining processes: torchrun's workers may outlive it."""
        for process in self.processes:
            _send(process, signal.SIGKILL)
        for pid in _marked(f"{_MARK}={self.mark}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _send(process: subprocess.Popen[bytes], signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            process.send_signal(signum)


def _marked(mark: str) -> list[int]:
    """Processes of this user with `mark` in their environment (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def _signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Forward SIGINT and SIGTERM to `stop`; only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {s: signal.signal(s, lambda n, _: stop(n)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


def launch_local(
    job: str,
    *,
    recipe: Mapping[str, Any],
    run: str,
    store: str,
    shape: JobShape,
    output: Output = Output.TABLE,
) -> int:
    """Run `job` in the display of a cluster run; its exit code."""
    display = open_display(output)
    started = time.monotonic()
    records = PodRecords()

    def update(phase: RunPhase, *, state: str) -> None:
        workers = tuple(
            WorkerStatus(name=f"{run}-{rank}", rank=rank, state=state, node="localhost")
            for rank in range(shape.nodes)
        )
        display.update(
            RunSnapshot(
                run=run,
                job=job,
                phase=phase,
                workers=workers,
                progress=records.progress,
                stages=records.stages,
                elapsed_s=time.monotonic() - started,
            )
        )

    def on_line(rank: int, text: str) -> None:
        if (found := read_record(text)) is None:
            display.line(str(rank), text)
        elif rank == 0:
            records.add(found)
        update(records.phase, state="running")

    try:
        update(RunPhase.STARTING, state="starting")
        code = run_node_processes(
            job,
            recipe=recipe,
            run=run,
            store=store,
            nodes=shape.nodes,
            procs_per_node=shape.procs_per_node,
            on_line=on_line,
        )
        phase = RunPhase.FAILED if code else RunPhase.DONE
        update(phase, state=str(phase))
    finally:
        display.close()
    if code == ExitCode.OK:
        display.say(f"{run} is done")
    else:
        display.say(f"{run} ended with exit code {int(code)}: {describe_exit_code(code)}")
    return code
