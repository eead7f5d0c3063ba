"""The process group of one run: setting it up, and work that all ranks or rank 0 do."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from tita.activity import mark_progress
from tita.errors import LostPeer, TitaError
from tita.gang import WATCHDOG, scratch_folder
from tita.settings import settings
from tita.train.liveness import HEARTBEAT, PEER_MONITOR

T = TypeVar("T")

BLOCK = 1 << 13
"""Number of rows that ranks exchange at once: as Python objects they take several times the memory
of an array, on every rank for each."""


def join_group(*, timeout_s: float) -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs.

    Called before a model is loaded, because under ZeRO-3 on CPUs a later call fails. From here on
    this process ends when another rank dies, until `PEER_MONITOR.stop()`, and when it makes no
    progress itself.

    Args:
        timeout_s: of every collective and of this process's progress.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        # Collectives of Python objects use the current device, by default GPU 0 on every rank.
        torch.cuda.set_device(local_rank())
    else:
        # DeepSpeed compiles its shared-memory collectives on first use, which takes half a minute
        # and a compiler. It has no public option to use gloo's, so mark the op incompatible.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    WATCHDOG.start("train-dpo", timeout_s=timeout_s)
    HEARTBEAT.limit_timeout(timeout_s)
    PEER_MONITOR.start()
    deepspeed.init_distributed(
        "nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s), verbose=False
    )
    pids = _all_gather(os.getpid())
    first = dist.get_rank() - local_rank()  # the ranks of a node are consecutive
    PEER_MONITOR.watch_processes(pids[first : first + local_world_size()])


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A working folder that the ranks of this node share; removed at the end.

    If they are killed, their parent removes it.
    """
    parent = scratch_folder() or settings().scratch_dir
    own = tempfile.mkdtemp(prefix="tita-train-", dir=parent) if local_rank() == 0 else None
    folder = _all_gather(own)[dist.get_rank() - local_rank()]
    assert folder is not None
    try:
        yield Path(folder)
    finally:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)


def on_all_ranks(work: Callable[[], T]) -> T:
    """Run `work` on every rank, whatever time each takes, and return this rank's result.

    Raises:
        TitaError: on every rank, the first error that any rank raised; rank 0 reports it.
    """
    result: list[T] = []
    failure: tuple[type[TitaError], str, str | None, str | None] | None = None
    mark_progress()
    with HEARTBEAT.beating():
        try:
            result.append(work())
        except TitaError as error:
            failure = type(error), error.what, error.where, error.remedy
    HEARTBEAT.barrier()
    mark_progress()
    for raised in filter(None, _all_gather(failure)):
        PEER_MONITOR.stop()
        if dist.get_rank() != 0:
            raise LostPeer("rank 0 reports the error")
        kind, what, where, remedy = raised
        raise kind(what, where=where, remedy=remedy)
    return result[0]


def gather(work: Callable[[], T]) -> list[T]:
    """As `on_all_ranks`, but return the results of all ranks, in their order."""
    return _all_gather(on_all_ranks(work))


def from_rank_0(work: Callable[[], T]) -> T:
    """As `on_all_ranks`, but run `work` on rank 0 alone and return its result on every rank."""
    results: list[Any] = gather(lambda: work() if dist.get_rank() == 0 else None)
    result: T = results[0]
    return result


def share_from_rank_0(values: Any) -> None:
    """Overwrite an array `[N, ...]` on every rank with that of rank 0, a block at a time.

    `from_rank_0` would need several times its size on each rank.
    """
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        block[:] = from_rank_0(partial(np.copy, block))


def finish_on_rank_0(work: Callable[[], None]) -> None:
    """Run `work` on rank 0, which then does not wait for the others; they wait until it is done.

    Raises:
        LostPeer: on the other ranks, if rank 0 failed or died.
    """
    if dist.get_rank() != 0:
        HEARTBEAT.wait_for_rank_0()
        return
    mark_progress()
    with HEARTBEAT.beating():
        try:
            work()
        except BaseException:
            HEARTBEAT.publish_rank_0(failed=True)
            raise
    HEARTBEAT.publish_rank_0()


def _all_gather(value: T) -> list[T]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def local_rank() -> int:
    """This process's rank among those of its node; also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """The number of processes on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
