"""The store that the workers of all nodes meet at: torchrun's, which the first node keeps.

It outlives every worker, so it tells the living what the dead cannot: that one of them is gone.
"""

import os
from contextlib import suppress
from datetime import timedelta
from typing import Any

from tita.settings import Settings

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
