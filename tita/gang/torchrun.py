"""Runs torchrun in this process, so that the job's exit code says why it ended.

torchrun's own command exits with 1 for every failure. Kubernetes decides by the exit code whether
to retry a pod, so `run_workers` reads the workers' codes from torchrun's report and returns the
one that explains the failure.
"""

import json
import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tita.errors import ExitCode, TitaError
from tita.gang.cgroup import memory_limit_bytes, num_cpus, num_memory_kills, peak_memory_bytes
from tita.gang.rendezvous import rendezvous_store, report_lost_worker
from tita.gang.stages import StageReporter
from tita.gang.worker_monitor import WorkerMonitor
from tita.imports import without_garbage_collection
from tita.settings import Settings
from tita.terminal import counted, say

_PERMANENT_CODES = (ExitCode.USER, ExitCode.DAMAGED, ExitCode.CONFLICT)
"""A retry fails the same way, so they decide even if another rank's code came first."""
# Codes that only follow from another failure, the least informative first: after one rank dies,
# torchrun sends its siblings SIGTERM (and may report them first), and ranks elsewhere lose a peer.
_SECONDARY_CODES = (ExitCode.TERMINATED, ExitCode.LOST_PEER, ExitCode.RETRY)

_FOLDER = "_TITA_GANG_FOLDER"
"""Environment variable: the folder in which workers write their exit codes (`exits/<local rank>`)
and their stages, to show that they live (`alive/<pid>`). Internal, so not a setting."""
_SCRATCH = "_TITA_GANG_SCRATCH"
"""The same for a folder on the scratch disk, which may be full."""


def run_workers(module: str, *, settings: Settings) -> ExitCode | int:
    """Run `python -m module` in every worker of this node and wait for all of them.

    Rank, world size and rendezvous address come from the settings; a single node takes any free
    port. Workers see torchrun's variables (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, ...).

    Returns:
        0, or the exit code that explains the failure; 128 + n for a worker killed by signal n.
    """
    arguments = _torchrun_arguments(module, settings=settings)
    if settings.num_nodes > 1:
        others = counted(settings.num_nodes - 1, "other node")
        say(f"waiting for {others}, up to {settings.rendezvous_timeout_s:.0f} s")
    with (
        tempfile.TemporaryDirectory(prefix="tita-gang-") as folder,
        tempfile.TemporaryDirectory(
            prefix="tita-work-", dir=settings.scratch_dir, ignore_cleanup_errors=True
        ) as scratch,
        _removed_at_sigterm(folder, scratch),
    ):
        os.environ |= {_FOLDER: folder, _SCRATCH: scratch}
        exits, alive = Path(folder, "exits"), Path(folder, "alive")
        exits.mkdir()
        alive.mkdir()
        monitor = WorkerMonitor(alive, timeout_s=settings.heartbeat_timeout_s)
        monitor.start()
        try:
            with StageReporter(alive, settings=settings):
                code, codes, error = _run_torchrun(
                    arguments, settings=settings, folder=Path(folder), monitor=monitor
                )
        finally:
            monitor.stop()
    if (code or codes) and (log := settings.termination_log):
        try:
            message = {"exit_code": code, "workers": codes} | ({"error": error} if error else {})
            log.write_text(json.dumps(message))
        except OSError as failed:
            raise TitaError(f"cannot write ({failed.strerror})", where=str(log)) from None
    return code


@contextmanager
def _removed_at_sigterm(*folders: str) -> Iterator[None]:
    """Remove folders and exit at SIGTERM, until torchrun has started workers and handles it.

    That takes seconds: torch is imported, and other nodes are waited for. An exception instead
    could be lost in a module that is being imported. Only the main thread may set handlers.
    """

    def handle(_: int, __: object) -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(ExitCode.TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, before)


def _run_torchrun(
    arguments: list[str], *, settings: Settings, folder: Path, monitor: WorkerMonitor
) -> tuple[int, list[int], str]:
    """Run torchrun; the exit code of this node, those of workers that failed, and the cause."""
    # torch takes seconds to import, and the launcher uses other functions of this module.
    with without_garbage_collection():
        from torch.distributed import DistError
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import main

    kills, began = num_memory_kills(), time.monotonic()
    try:
        # Its own folder of logs would stay.
        main([f"--log-dir={folder / 'logs'}", *arguments])
    except ChildFailedError as error:
        if settings.node_rank != 0:
            # On the first node the store ends with this process.
            host, port = settings.master_addr, settings.master_port
            with suppress(DistError):
                report_lost_worker(rendezvous_store(host=host, port=port, timeout_s=5.0))
        codes = [failure.exitcode for failure in error.failures.values()]
        code: int = decisive_exit_code(codes)
        if code != ExitCode.USER:
            for rank, failure in sorted(error.failures.items()):
                say(f"rank {rank} exited with code {failure.exitcode}")
        if monitor.ended and code in (128 + signal.SIGKILL, *_SECONDARY_CODES):
            code = ExitCode.HUNG
        elif code == 128 + signal.SIGKILL:
            reason = _explain_sigkill(kills)
            say(reason)
            return code, codes, reason
        return code, codes, ""
    except SignalException as error:
        # torchrun waits for the workers after a signal but does not report their exit codes.
        codes = [int(path.read_text()) for path in (folder / "exits").iterdir()]
        # All workers saved their state, or all had finished.
        if codes in ([ended] * settings.procs_per_node for ended in (ExitCode.RETRY, 0)):
            return codes[0], codes, ""
        return 128 + int(error.sigval), codes, ""
    except DistError as error:
        timeout_s = settings.rendezvous_timeout_s
        no_worker = not any((folder / "alive").iterdir())
        if no_worker and time.monotonic() - began >= timeout_s:
            reason = f"not all nodes started within {timeout_s:.0f} s; this node releases its GPUs"
            say(reason)
            return ExitCode.GANG_INCOMPLETE, [], reason
        say(f"cannot reach the other nodes: {str(error).splitlines()[0]}")
        return ExitCode.LOST_PEER, [], ""
    return ExitCode.OK, [], ""


def _torchrun_arguments(module: str, *, settings: Settings) -> list[str]:
    """torchrun's arguments; also sets what torchrun and the workers read from the environment."""
    # Its messages about failures repeat ours.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # More threads than cores slow down several ranks on one node by a large factor.
    threads = max(1, num_cpus() // settings.procs_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # By default torchrun kills workers 30 s after SIGTERM, whatever the pod's grace period.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "540")
    port = settings.master_port if settings.num_nodes > 1 else free_port()
    return [
        f"--nnodes={settings.num_nodes}",
        f"--node-rank={settings.node_rank}",
        f"--nproc-per-node={settings.procs_per_node}",
        f"--master-addr={settings.master_addr}",
        f"--master-port={port}",
        # One node may have to be provisioned, booted and its images pulled.
        f"--rdzv-conf=timeout={math.ceil(settings.rendezvous_timeout_s)}",
        # Kubernetes restarts the whole gang; a single restarted torchrun would wait for its peers.
        "--max-restarts=0",
        "--module",
        "tita.gang.worker",
        module,
    ]


def record_exit_code(code: int) -> None:
    """Record this worker's exit code just before it exits, for `run_workers` after a signal."""
    folder = os.environ.get(_FOLDER)
    if folder and Path(folder).is_dir():
        Path(folder, "exits", os.environ.get("LOCAL_RANK", "0")).write_text(str(int(code)))


def heartbeat_file(pid: int) -> Path | None:
    """The file that a worker writes to show that it lives; None outside `run_workers`."""
    folder = os.environ.get(_FOLDER)
    return Path(folder, "alive", str(pid)) if folder else None


def scratch_folder() -> Path | None:
    """A folder on the scratch disk that is removed when this node's workers have ended, however.

    None outside `run_workers`.
    """
    folder = os.environ.get(_SCRATCH)
    return Path(folder) if folder and Path(folder).is_dir() else None


def decisive_exit_code(codes: Iterable[int]) -> int:
    """The code that explains the failure; torchrun reports signals as negative codes."""
    found = [128 - code if code < 0 else code for code in codes if code]
    for permanent in _PERMANENT_CODES:
        if permanent in found:
            return permanent
    for code in found:
        if code not in _SECONDARY_CODES:
            return code
    for code in reversed(_SECONDARY_CODES):
        if code in found:
            return code
    return ExitCode.FAILED


def _explain_sigkill(kills_before: int) -> str:
    """Why a worker got SIGKILL."""
    remedy = (
        "raise jobs.resources.limits.memory in the release's values, or use fewer GPUs per node"
    )
    if num_memory_kills() == kills_before:
        return f"a worker was killed by SIGKILL; if this node is out of memory, {remedy}"
    limit, peak = memory_limit_bytes(), peak_memory_bytes()
    if limit is None:
        return f"the kernel killed a worker because this node is out of memory; {remedy}"
    used = "" if peak is None else f" ({peak / 2**30:.1f} GiB were used)"
    return (
        "the kernel killed a worker because this pod reached its memory limit of "
        f"{limit / 2**30:.1f} GiB{used}; {remedy}"
    )


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
