"""torchrun in this process, so that a job's exit code says why it ended.

torchrun's own command exits with 1 whatever happened. Kubernetes decides by the exit code whether
a pod is tried again, so the workers' codes are read from torchrun's report and the telling one is
passed on.
"""

import json
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from tita.errors import ExitCode, TitaError
from tita.gang.cgroup import num_cpus, num_memory_kills
from tita.settings import Settings
from tita.terminal import say

# Which of several failures tells why: when a rank dies, torchrun ends its siblings by SIGTERM and
# they may even be reported first, and a rank that lost its peer says so only because of the other.
_LEAST_TELLING = (ExitCode.TERMINATED, ExitCode.LOST_PEER, ExitCode.RETRY)

_MEET_S = 1800
"""Nodes wait so long for each other before they start: one may have to be bought, booted and filled
with images first. torchrun's own ten minutes are soon over."""

# A folder where workers write how they end; between this module and itself, so not a setting.
_FATES = "_GANG_FATES"


def run_workers(module: str, *, settings: Settings) -> ExitCode | int:
    """Run `python -m module` in every worker of this node and wait for all.

    Rank, world size and rendezvous come from the settings; a lone node takes any free port. Workers
    see torchrun's variables (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, ...).

    Returns:
        0, or the exit code of the failure that tells most, 128 + n for a worker killed by signal n.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    arguments = _prepare(module, settings=settings)
    kills = num_memory_kills()
    with tempfile.TemporaryDirectory(prefix="tita-gang-") as folder:
        os.environ[_FATES] = folder
        try:
            main(arguments)
        except ChildFailedError as error:
            tell_lost_of_node(settings)
            codes = [failure.exitcode for failure in error.failures.values()]
            code = telling(codes)
            if code != ExitCode.USER:
                for rank, failure in sorted(error.failures.items()):
                    say(f"rank {rank} ended with {failure.exitcode}")
            if code == 128 + signal.SIGKILL:
                code = _killed(kills)
            return _finish(code, settings=settings, codes=codes)
        except SignalException as error:
            # torchrun has waited for the workers and forgets how they ended.
            codes = [int(path.read_text()) for path in Path(folder).iterdir()]
            # Saved in time, or even done; anything else was not to last.
            for code in (ExitCode.RETRY, ExitCode.OK):
                if codes == [code] * settings.procs_per_node:
                    return _finish(code, settings=settings, codes=codes)
            return _finish(128 + int(error.sigval), settings=settings, codes=codes)
        except DistError as error:
            say(f"the other nodes are not there: {str(error).splitlines()[0]}")
            return _finish(ExitCode.LOST_PEER, settings=settings, codes=[])
    return ExitCode.OK


def _prepare(module: str, *, settings: Settings) -> list[str]:
    """torchrun's arguments, and what it and the workers read from the environment."""
    # It says of every failure what we say in our own words.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # With more than one thread each, several ranks on few cores slow each other down by a factor.
    threads = max(1, num_cpus() // settings.procs_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # torchrun kills workers 30 s after a SIGTERM, however long the pod would have had.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "540")
    port = settings.master_port if settings.num_nodes > 1 else free_port()
    return [
        f"--nnodes={settings.num_nodes}",
        f"--node-rank={settings.node_rank}",
        f"--nproc-per-node={settings.procs_per_node}",
        f"--master-addr={settings.master_addr}",
        f"--master-port={port}",
        f"--rdzv-conf=timeout={_MEET_S}",
        # Kubernetes starts again, as a gang; a torchrun that restarts alone waits for its peers.
        "--max-restarts=0",
        "--module",
        module,
    ]


def tell_fate(code: int) -> None:
    """Called by a worker before it exits with `code`: how it ended when its node was told to."""
    folder = os.environ.get(_FATES)
    if folder and Path(folder).is_dir():
        Path(folder, os.environ.get("LOCAL_RANK", "0")).write_text(str(int(code)))


def telling(codes: Iterable[int]) -> int:
    """The exit code of the failure that tells most; torchrun reports signals as negative codes."""
    found = [128 - code if code < 0 else code for code in codes if code]
    if ExitCode.USER in found:
        return ExitCode.USER
    for code in found:
        if code not in _LEAST_TELLING:
            return code
    for code in reversed(_LEAST_TELLING):
        if code in found:
            return code
    return ExitCode.FAILED


def _killed(kills_before: int) -> int:
    """Say why a worker got SIGKILL, which no process can say of itself."""
    remedy = "give its pod more memory, or set what it holds at once (batch_size) lower"
    if num_memory_kills() > kills_before:
        say(f"a worker was killed: this node's memory ran out; {remedy}")
        return ExitCode.OUT_OF_MEMORY
    say(f"a worker was killed by SIGKILL; if this node's memory ran out, {remedy}")
    return 128 + signal.SIGKILL


def _finish(code: int, *, settings: Settings, codes: list[int]) -> int:
    if settings.termination_log:
        _write_last_word(settings.termination_log, {"exit_code": code, "workers": codes})
    return code


def _write_last_word(path: Path, word: dict[str, object]) -> None:
    try:
        path.write_text(json.dumps(word))
    except OSError as error:
        raise TitaError(f"cannot write ({error.strerror})", where=str(path)) from None


def free_port() -> int:
    """A port of the loopback interface that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


_LOST = "tita/lost"


def meeting_store(*, host: str | None = None, port: int | None = None, timeout_s: float) -> Any:
    """A connection of its own to the gang's store, by default to the one that this worker is told.

    Whoever waits for an answer on one connection keeps other threads from using it.

    Raises:
        torch.distributed.DistError: nobody answers there within the timeout; later calls too.
    """
    import torch.distributed as dist

    return dist.TCPStore(  # type: ignore[attr-defined]
        host or os.environ["MASTER_ADDR"],
        port or int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )


def tell_lost(store: Any) -> None:
    """Let all workers know that one is gone, as far as there is anybody to be told."""
    from torch.distributed import DistError

    with suppress(DistError):
        store.add(_LOST, 1)


def is_one_lost(store: Any) -> bool:
    """Whether somebody has told so."""
    return bool(store.add(_LOST, 0) > 0)


def tell_lost_of_node(settings: Settings) -> None:
    """The same from outside of the workers; when the first node's end, the store goes with them."""
    from torch.distributed import DistError

    if settings.node_rank == 0:
        return
    with suppress(DistError):
        tell_lost(
            meeting_store(host=settings.master_addr, port=settings.master_port, timeout_s=5.0)
        )
