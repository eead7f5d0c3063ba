"""Ends that are not of the training's own: eviction, a rank that hangs, a rank that is gone."""

import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tita.errors import ExitCode
from tita.terminal import say
from tita.train.group import local_rank
from tita.train.liveness import PEERS, RENDEZVOUS

_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|socket timeout|timed out"
    r"|nccl (communicator|error|operation)|process group .* (watchdog|abort)|connectFullMesh",
    re.IGNORECASE,
)
# NCCL's words for what is wrong on this very node: the wrong interface, one GPU for two ranks, no
# room in /dev/shm. Another try ends the same, so it must count.
_OWN = re.compile(
    r"nccl(InvalidUsage|InvalidArgument|InternalError|UnhandledCudaError)|unhandled cuda error"
    r"|duplicate gpu|no socket interface|no space left",
    re.IGNORECASE,
)


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """After a SIGTERM to any rank, all finish the same step, save, and stop.

    Before the first step there is nothing to save: a rank ends at once then, even one that waits in
    a collective, where Python's own handlers are not called. After the last step the model is
    brought to the store all the same: that takes less than to come back to this place, and if the
    time that the pod has left is too short, the next start goes on from the last checkpoint.
    """

    def __init__(self, *, folder: Path) -> None:
        """Listen from now on; `folder`, this node's working folder, goes when it ends at once."""
        self._folder = folder
        self._asked = False
        self._something_to_save = False
        self._is_over = False
        self.stopped = False
        signal.signal(signal.SIGTERM, self._note)
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell)
        threading.Thread(target=self._listen, args=(told,), name="sigterm", daemon=True).start()

    def _note(self, *_: Any) -> None:
        self._asked = True
        RENDEZVOUS.hurry()

    def _listen(self, told: int) -> None:
        while os.read(told, 1) != bytes([signal.SIGTERM]):
            pass
        # A rank that fails gets one too, when the others are gone sooner: it must say why it does.
        if not (self._something_to_save or PEERS.is_over):
            self._end()
        if self._is_over and local_rank() == 0:
            say("train-dpo: SIGTERM after the last step: the model is saved all the same")

    def _end(self) -> None:
        if local_rank() == 0:
            say("train-dpo: stopped by SIGTERM before a first step: there is nothing to save")
            shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(ExitCode.TERMINATED)

    def begin_anew(self) -> None:
        """What was trained till now is in the store; what comes next has not begun."""
        self._something_to_save = self._is_over = False
        if self._asked:
            self._end()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From the first step on, what was done must not be lost."""
        self._something_to_save = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What comes now is not training; after a stop it is only the last upload."""
        self._is_over = not self.stopped

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask all ranks: they get their signals at different times, and must stop at one step."""
        import torch
        import torch.distributed as dist

        asked = torch.tensor([int(self._asked)], device=args.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked.item() and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True


class Watchdog(TrainerCallback):  # type: ignore[misc]
    """Ends this process when no step was finished for `timeout_s`: a hung rank never ends itself.

    It begins with the training and ends with it; what comes before and after has bounds of its own.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._beat = time.monotonic()
        self._over = threading.Event()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to watch."""
        self._beat = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note that there is progress."""
        self._beat = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop watching."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self._timeout_s / 4)):
            still_s = time.monotonic() - self._beat
            if still_s > self._timeout_s:
                say(
                    f"train-dpo: rank {os.environ.get('RANK', '0')} stood still for {still_s:.0f} s"
                )
                # Nothing else gets a thread that waits in a collective to stop.
                os._exit(ExitCode.HUNG)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    import torch.distributed as dist

    if not isinstance(error, RuntimeError) or _OWN.search(str(error)):
        return False
    return isinstance(error, dist.DistError) or bool(_LOST.search(str(error)))
