"""torchrun's rendezvous store, through which the nodes of a gang tell each other how they are."""

import os
from contextlib import suppress
from datetime import timedelta
from typing import Any

_LOST_KEY = "tita/lost"


def rendezvous_store(*, host: str | None = None, port: int | None = None, timeout_s: float) -> Any:
    """A new connection to torchrun's rendezvous store, which the first node hosts.

    The store outlives every worker, so it can report the loss of one to the others. A blocking
    request holds its connection, so each thread opens its own. By default it is the store that
    this worker's environment names.

    Raises:
        torch.distributed.DistError: no answer within the timeout, here or in later calls.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(
        host or os.environ["MASTER_ADDR"],
        port or int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )


def report_lost_worker(store: Any) -> None:
    """Record in the rendezvous store that a worker is lost; does nothing if the store is gone."""
    from torch.distributed import DistError

    with suppress(DistError):
        store.add(_LOST_KEY, 1)


def is_worker_lost(store: Any) -> bool:
    """Whether any worker was reported lost."""
    return bool(store.add(_LOST_KEY, 0) > 0)
