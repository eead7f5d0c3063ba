"""Noticing that another rank is gone, where no collective tells.

NCCL says nothing of a process that died on the same machine (github.com/NVIDIA/nccl/issues/279);
when one of another machine is gone, PyTorch's watchdog lets a minute pass and aborts, an end that
counts against the Job like any crash. A rank that waits for something else hears from neither.
"""

import os
import select
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from tita.errors import ExitCode
from tita.gang import is_one_lost, meeting_store, tell_lost
from tita.terminal import say

_EVERY_S = 2.0
_GRACE_S = 10.0
"""Whoever fails has so long to say why, before it is ended for the others that already have."""
_TIMEOUT_S = 120.0
"""The network may be away for so long."""


class PeerWatch:
    """Ends this process when another of the gang has ended, until `end` is called."""

    def __init__(self) -> None:
        self._over = threading.Event()

    def begin(self, pids: Iterable[int]) -> None:
        """Watch the processes `pids` of this node, and what the other nodes tell of theirs."""
        store = meeting_store(timeout_s=_TIMEOUT_S)
        peers = _open(pid for pid in pids if pid != os.getpid())
        threading.Thread(target=self._watch, args=(store, peers), name="peers", daemon=True).start()

    def end(self) -> None:
        """From now on others may go: the training is over, or all know that it has failed."""
        self._over.set()

    @property
    def is_over(self) -> bool:
        """Whether all know of the end, good or bad: what remains is to say why."""
        return self._over.is_set()

    def _watch(self, store: Any, peers: select.poll) -> None:
        while not self._over.is_set():
            gone = _look(store, peers)
            if gone is None:
                continue
            if not self._over.wait(_GRACE_S):
                say(f"train-dpo: rank {os.environ.get('RANK', '0')}: {gone}")
                # Nothing else gets a thread that waits in a collective to stop.
                os._exit(ExitCode.LOST_PEER)


def _open(pids: Iterable[int]) -> select.poll:
    """What becomes readable when one of the processes ends."""
    peers = select.poll()
    for pid in pids:
        # Some sandboxes have no such call; the first node's store and torchrun remain.
        with suppress(OSError, AttributeError):
            peers.register(os.pidfd_open(pid), select.POLLIN)
    return peers


def _look(store: Any, peers: select.poll) -> str | None:
    """Who is gone, in words; None if nobody is known to be."""
    from torch.distributed import DistError

    if peers.poll(_EVERY_S * 1000):
        tell_lost(store)
        return "another rank of this node is gone"
    try:
        return "a rank of another node is gone" if is_one_lost(store) else None
    except DistError:
        return "the first node is gone"


PEERS = PeerWatch()
"""Of this process."""
