"""Handles SIGTERM: all ranks finish the same step, save a checkpoint and stop."""

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from tita.errors import ExitCode
from tita.terminal import say
from tita.train.group import local_rank
from tita.train.liveness import (
    HEARTBEAT,
    HEARTBEAT_TIMEOUT_AFTER_SIGTERM_S,
    PEER_MONITOR,
)


class PreemptionHandler(TrainerCallback):  # type: ignore[misc]
    """After a SIGTERM to any rank, all ranks finish the same step, save and stop.

    Before the first step there is nothing to save, so a rank exits at once. This includes a rank
    that waits in a collective, where Python does not call its signal handlers. After the last step
    the model is still uploaded: that takes less time than training again. If the pod's grace period
    is too short for it, the next start resumes from the last checkpoint.
    """

    def __init__(self, *, folder: Path) -> None:
        """Start to listen; `folder`, this node's working folder, is removed on an early exit."""
        self._folder = folder
        self._sigterm_received = False
        self._is_training = False
        self._is_trained = False
        self.stopped = False
        signal.signal(signal.SIGTERM, self._on_sigterm)
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        signal.set_wakeup_fd(write_fd)
        thread = threading.Thread(target=self._listen, args=(read_fd,), name="sigterm", daemon=True)
        thread.start()

    def _on_sigterm(self, *_: Any) -> None:
        self._sigterm_received = True
        # A rank that sends no heartbeat now has probably died.
        HEARTBEAT.limit_timeout(HEARTBEAT_TIMEOUT_AFTER_SIGTERM_S)

    def _listen(self, read_fd: int) -> None:
        while os.read(read_fd, 1) != bytes([signal.SIGTERM]):
            pass
        # torchrun also sends SIGTERM to a failing rank whose siblings have already exited; that
        # rank must still report its error.
        if not (self._is_training or PEER_MONITOR.is_stopped):
            self._exit()
        if self._is_trained and local_rank() == 0:
            say("train-dpo: SIGTERM after the last step; saving the model before exit")

    def _exit(self) -> None:
        if local_rank() == 0:
            say("train-dpo: stopped by SIGTERM before the first step; nothing to save")
            shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(ExitCode.TERMINATED)

    def begin_stage(self) -> None:
        """Enter the next training stage; the result of the previous one is in the store."""
        self._is_training = self._is_trained = False
        if self._sigterm_received:
            self._exit()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From here on there is progress to save."""
        self._is_training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._is_trained = not self.stopped

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop all ranks at the same step, although they get their signals at different times."""
        received = torch.tensor([int(self._sigterm_received)], device=args.device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        if received.item() and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
