"""Detects ranks that are dead or hung: peer monitor, heartbeats and finished steps.

- `PeerMonitor` ends this process when another rank has died. NCCL does not report a process that
  died on the same machine (github.com/NVIDIA/nccl/issues/279). For one on another machine,
  PyTorch's watchdog waits a minute and aborts, which counts against the Job like any crash.
- `Heartbeat` lets ranks wait for work of unknown length, such as rank 0's upload of the model. A
  collective would fail after the group's timeout. Instead, ranks poll the rendezvous store and wait
  as long as a working rank sends heartbeats. A rank whose work makes no progress is ended by
  `tita.gang.WATCHDOG`, so heartbeats do not go on for ever.
- `StepWatchdog` tells that watchdog, and those that watch the run, which steps are finished.
"""

import os
import re
import select
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from tita.activity import Stage, enter_stage, mark_progress, stage
from tita.errors import ExitCode, LostPeer
from tita.gang import WATCHDOG, is_worker_lost, rendezvous_store, report_lost_worker
from tita.records import TRAINING_STAGE
from tita.settings import settings
from tita.terminal import say

_STORE_TIMEOUT_S = 120.0
"""How long the network to the rendezvous store may be down."""

_PEER_POLL_S = 2.0
_PEER_GRACE_S = 10.0
"""How long a failing rank has to report its own error after another one was lost."""

HEARTBEAT_TIMEOUT_AFTER_SIGTERM_S = 20.0
"""Their timeout after a SIGTERM, which torchrun sends to the other ranks of a node if one dies."""
_MAX_POLL_S = 1.0
_HEARTBEATS_KEY = "tita/beats"

_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|socket timeout|timed out"
    r"|nccl (communicator|error|operation)|process group .* (watchdog|abort)|connectFullMesh",
    re.IGNORECASE,
)
# NCCL's messages for faults of this node: wrong network interface, one GPU for two ranks, /dev/shm
# full. A retry would fail the same way, so these must count against the Job's backoff limit.
_LOCAL_FAULT = re.compile(
    r"nccl(InvalidUsage|InvalidArgument|InternalError|UnhandledCudaError)|unhandled cuda error"
    r"|duplicate gpu|no socket interface|no space left",
    re.IGNORECASE,
)


class PeerMonitor:
    """Ends this process when another rank has died, until `stop` is called."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._exits = select.poll()

    def start(self) -> None:
        """Watch the reports of other nodes, also while the process group is being set up."""
        store = rendezvous_store(timeout_s=_STORE_TIMEOUT_S)
        threading.Thread(target=self._watch, args=(store,), name="peers", daemon=True).start()

    def watch_processes(self, pids: Iterable[int]) -> None:
        """Watch this node's processes `pids`, too."""
        for pid in pids:
            if pid == os.getpid():
                continue
            # Some sandboxes lack pidfd_open; the rendezvous store and torchrun still report deaths.
            with suppress(OSError, AttributeError):
                self._exits.register(os.pidfd_open(pid), select.POLLIN)

    def stop(self) -> None:
        """Ignore exits from now on: training is over, or every rank knows that it failed."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    def _watch(self, store: Any) -> None:
        while not self.is_stopped:
            try:
                if self._exits.poll(_PEER_POLL_S * 1000):
                    report_lost_worker(store)
                    lost = "another rank of this node has died"
                elif is_worker_lost(store):
                    lost = "a rank of another node has died"
                else:
                    continue
            except dist.DistError:
                lost = "cannot reach the first node"
            if not self._stopped.wait(_PEER_GRACE_S):
                say(f"train-dpo: rank {os.environ.get('RANK', '0')}: {lost}")
                # A thread that waits in a collective cannot be stopped in any other way.
                os._exit(ExitCode.LOST_PEER)


class Heartbeat:
    """Synchronises the ranks of a group around work that may take any time.

    Ranks that work send heartbeats; ranks that wait fail when no heartbeat arrives in time.
    """

    def __init__(self) -> None:
        self._limit_s = float("inf")
        self._num_barriers = 0

    def limit_timeout(self, timeout_s: float) -> None:
        """Wait at most this long for a heartbeat."""
        self._limit_s = min(self._limit_s, timeout_s)

    @property
    def _timeout_s(self) -> float:
        return min(self._limit_s, settings().heartbeat_timeout_s)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Send heartbeats while the block runs."""
        over = threading.Event()
        if dist.get_world_size() > 1:
            arguments = _heartbeat_store(), over
            threading.Thread(target=_beat, args=arguments, name="beat", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def barrier(self) -> None:
        """Wait until all ranks have called this.

        Raises:
            LostPeer: no heartbeat from the missing ranks.
        """
        self._num_barriers += 1
        if dist.get_world_size() > 1:
            self._wait(f"tita/met/{self._num_barriers}", until=dist.get_world_size(), add=1)

    def publish_rank_0(self, *, failed: bool = False) -> None:
        """On rank 0, report the outcome of its work without waiting for the other ranks."""
        self._num_barriers += 1
        if dist.get_world_size() == 1:
            return
        # The outcome is the same even if the other ranks cannot be notified.
        with suppress(dist.DistError):
            if failed:
                _heartbeat_store().add(f"tita/failed/{self._num_barriers}", 1)
            _heartbeat_store().add(f"tita/done/{self._num_barriers}", 1)

    def wait_for_rank_0(self) -> None:
        """On the other ranks, wait until rank 0 has reported its outcome.

        Raises:
            LostPeer: rank 0 failed or sends no heartbeat.
        """
        self._num_barriers += 1
        self._wait(f"tita/done/{self._num_barriers}", until=1, add=0)
        if _heartbeat_store().add(f"tita/failed/{self._num_barriers}", 0):
            raise LostPeer("rank 0 failed; see its log")

    def _wait(self, key: str, *, until: int, add: int) -> None:
        """Add `add` to the counter at `key`, and wait until it reaches `until`."""
        with stage("waiting for other ranks", is_waiting=True):
            self._wait_for(key, until=until, add=add)

    def _wait_for(self, key: str, *, until: int, add: int) -> None:
        store, pause_s = _heartbeat_store(), 0.01
        count, heartbeats, last_heartbeat = store.add(key, add), -1, time.monotonic()
        while count < until:
            time.sleep(pause_s)
            pause_s = min(_MAX_POLL_S, 2 * pause_s)
            now = time.monotonic()
            if (found := store.add(_HEARTBEATS_KEY, 0)) != heartbeats:
                heartbeats, last_heartbeat = found, now
                mark_progress()
            elif now - last_heartbeat > self._timeout_s:
                message = f"no heartbeat from any other rank for {now - last_heartbeat:.0f} s"
                say(f"train-dpo: rank {dist.get_rank()}: {message}")
                raise LostPeer(message)
            count = store.add(key, 0)


def _beat(store: Any, over: threading.Event) -> None:
    every_s = min(5.0, settings().heartbeat_timeout_s / 4)
    # If the store is gone, this rank finds out when its work is done.
    with suppress(dist.DistError):
        while True:
            store.add(_HEARTBEATS_KEY, 1)
            if over.wait(every_s):
                return


@cache
def _heartbeat_store() -> Any:
    """This process's connection to the rendezvous store, opened on first use."""
    return rendezvous_store(timeout_s=_STORE_TIMEOUT_S)


# One of each per process, which is one rank of one group.
PEER_MONITOR = PeerMonitor()
HEARTBEAT = Heartbeat()


class StepWatchdog(TrainerCallback):  # type: ignore[misc]
    """Makes `tita.gang.WATCHDOG` count only finished steps while a model is trained."""

    def __init__(self, *, stage: str) -> None:
        """`stage` is this process's stage while it trains."""
        self._name = stage
        self._stage: Stage | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        WATCHDOG.finish_step()
        self._stage = enter_stage(self._name)
        if self._name != TRAINING_STAGE:
            self._stage.total, self._stage.unit = state.max_steps, "steps"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        WATCHDOG.finish_step()
        if self._stage is not None and self._stage.total:
            self._stage.done = state.global_step

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A batch of an evaluation is progress, too."""
        WATCHDOG.finish_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        WATCHDOG.end_steps()
        enter_stage("saving the model")


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    if not isinstance(error, RuntimeError) or _LOCAL_FAULT.search(str(error)):
        return False
    return isinstance(error, dist.DistError) or bool(_LOST_PEER.search(str(error)))
