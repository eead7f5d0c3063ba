"""The ranks of one run as a process group: how they meet, and how they agree."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from tita.errors import LostPeer, TitaError
from tita.settings import settings
from tita.train.liveness import PEERS, RENDEZVOUS

T = TypeVar("T")


def join_group(*, timeout_s: float) -> None:
    """Meet the other ranks before a model is loaded: under ZeRO-3 on CPUs it fails later.

    From then on this process ends when another of the gang does, until `PEERS.end()`.

    NCCL on GPUs, gloo on CPUs. `timeout_s` bounds every collective: a rank that waits in one for
    another that is gone, or hangs, fails then.
    """
    import deepspeed
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        # Collectives of Python objects go by the current device, which is the first one till now.
        torch.cuda.set_device(local_rank())
    else:
        # Its shared-memory collectives are compiled for half a minute on first use, and need a
        # compiler; gloo's own do for the few processes of one machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s), verbose=False
    )
    RENDEZVOUS.bound(silent_s=timeout_s)
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    # Ranks of a node are consecutive.
    first = dist.get_rank() - local_rank()
    PEERS.begin(pids[first : first + local_world_size()])


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A working folder for the ranks of this node, removed at the end."""
    import torch.distributed as dist

    parent = settings().scratch_dir
    mine = tempfile.mkdtemp(prefix="tita-train-", dir=parent) if local_rank() == 0 else None
    folders: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(folders, mine)
    # Ranks of a node are consecutive, and its first one made the folder.
    found = folders[dist.get_rank() - local_rank()]
    assert found is not None
    try:
        yield Path(found)
    finally:
        if mine is not None:
            shutil.rmtree(mine, ignore_errors=True)


def together(work: Callable[[], T]) -> T:
    """What `work` gives here, if it succeeds on every rank, however much longer some take.

    Raises:
        TitaError: the first that any rank raised, on every rank; rank 0 tells it for all.
    """
    import torch.distributed as dist

    found: list[T] = []
    mine: tuple[type[TitaError], str, str | None, str | None] | None = None
    with RENDEZVOUS.alive():
        try:
            found.append(work())
        except TitaError as error:
            mine = type(error), error.what, error.where, error.remedy
    RENDEZVOUS.meet()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for told in filter(None, everyone):
        PEERS.end()
        if dist.get_rank() != 0:
            raise LostPeer("rank 0 tells why")
        kind, what, where, remedy = told
        raise kind(what, where=where, remedy=remedy)
    return found[0]


def gathered(work: Callable[[], T]) -> list[T]:
    """What `work` gives on every rank, in the order of the ranks.

    Raises:
        TitaError: as `together`.
    """
    import torch.distributed as dist

    mine = together(work)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def finally_by_rank_0(work: Callable[[], None]) -> None:
    """Rank 0 does `work`, the last of all, and waits for none; the others return when it is done.

    Raises:
        LostPeer: on the others, it is not done and never will be.
    """
    import torch.distributed as dist

    if dist.get_rank() != 0:
        RENDEZVOUS.leave_or_wait()
        return
    with RENDEZVOUS.alive():
        try:
            work()
        except BaseException:
            RENDEZVOUS.leave_or_wait(failed=True)
            raise
    RENDEZVOUS.leave_or_wait()


def local_rank() -> int:
    """This process's rank among those of its node, which is the number of its GPU too."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes of this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
