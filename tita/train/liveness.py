"""Waiting for ranks that work alone, such as rank 0 that brings a model to the store.

A collective fails when a rank comes later than the group's timeout, whatever it was busy with. So
ranks do not wait for work of unforeseeable length in a collective, but ask the store that the group
met at (torchrun's, on the first node) every second: as long as those at work show life there, the
others wait; the work itself is bounded by the time-outs of what it speaks with.
"""

import os
import select
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from tita.errors import ExitCode, LostPeer
from tita.gang import is_one_lost, meeting_store, tell_lost
from tita.terminal import say

_BEAT_S = 5.0
_SILENT_S = 120.0
"""Nobody at work shows no life for so long: a thread of its own beats, whatever the work is."""
_HURRIED_SILENT_S = 20.0
"""The same after a SIGTERM, which torchrun sends the other ranks of a node when one has died."""
_LONGEST_PAUSE_S = 1.0
_BEATS = "tita/beats"


class Rendezvous:
    """Where the ranks of one group tell each other that they live, and that they are done."""

    def __init__(self) -> None:
        self._silent_s = _SILENT_S
        self._number = 0

    def bound(self, *, silent_s: float) -> None:
        """Wait for a rank that shows no life no longer than this."""
        self._silent_s = min(self._silent_s, silent_s)

    def hurry(self) -> None:
        """A SIGTERM came: a rank that shows no life now will show none later."""
        self.bound(silent_s=_HURRIED_SILENT_S)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Show life while the work in this block is done."""
        import torch.distributed as dist

        over = threading.Event()
        if dist.get_world_size() > 1:
            threading.Thread(target=_beat, args=(_store(), over), name="beat", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def meet(self) -> None:
        """Return when all ranks have come here.

        Raises:
            LostPeer: those that are missing show no life any more.
        """
        import torch.distributed as dist

        self._number += 1
        if dist.get_world_size() > 1:
            self._wait(f"tita/met/{self._number}", number=dist.get_world_size(), come=1)

    def leave_or_wait(self, *, failed: bool = False) -> None:
        """Rank 0 tells how its work ended and goes; the others return when it has told.

        Raises:
            LostPeer: on the others, rank 0 failed or shows no life any more.
        """
        import torch.distributed as dist

        self._number += 1
        key, fault = f"tita/done/{self._number}", f"tita/failed/{self._number}"
        if dist.get_world_size() == 1:
            return
        if dist.get_rank() != 0:
            self._wait(key, number=1, come=0)
            if _store().add(fault, 0):
                raise LostPeer("rank 0 tells why")
            return
        # The work is done, or has failed: that the others cannot be told changes neither.
        with suppress(dist.DistError):
            if failed:
                _store().add(fault, 1)
            _store().add(key, 1)

    def _wait(self, key: str, *, number: int, come: int) -> None:
        """Count `come` up at `key`, and return when it has come to `number`."""
        import torch.distributed as dist

        store, pause_s = _store(), 0.01
        there, beats, heard = store.add(key, come), -1, time.monotonic()
        while there < number:
            time.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
            now = time.monotonic()
            if (count := store.add(_BEATS, 0)) != beats:
                beats, heard = count, now
            elif now - heard > self._silent_s:
                silent = f"no other rank has shown life for {now - heard:.0f} s"
                say(f"train-dpo: rank {dist.get_rank()}: {silent}")
                raise LostPeer(silent)
            there = store.add(key, 0)


def _beat(store: Any, over: threading.Event) -> None:
    import torch.distributed as dist

    # Where the store is gone, the rank notices when it has done its work.
    with suppress(dist.DistError):
        while True:
            store.add(_BEATS, 1)
            if over.wait(_BEAT_S):
                return


@cache
def _store() -> Any:
    """This process's connection to the gang's store, opened when it is first asked."""
    return meeting_store(timeout_s=_SILENT_S)


RENDEZVOUS = Rendezvous()
"""Of this process, which is one rank of one group."""


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
