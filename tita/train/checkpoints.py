"""Checkpoints: saved on this node, brought to the store while training goes on, and found again.

`<out>/checkpoints/<step>/node-<k>` is one tree for each node, with what that node's ranks saved. A
checkpoint is complete when every node's tree is; others are not seen.
"""

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback

from tita.errors import StoreUnavailable, TitaError
from tita.storage import Store
from tita.terminal import say
from tita.train.group import gathered, local_rank, together
from tita.train.history import PROGRESS

_KEPT = 2
"""Complete checkpoints that stay in the store: if the newest is broken, there is another."""
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0)
_SHORT_PAUSES_S = (1.0, 3.0)
T = TypeVar("T")


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """The checkpoints of one run, as one rank sees them."""

    def __init__(
        self, *, store: Store, out: str, node: int, num_nodes: int, meta: Mapping[str, Any]
    ) -> None:
        self._store = store
        self._prefix = f"{out}/checkpoints"
        self._node = node
        self._num_nodes = num_nodes
        self._meta = dict(meta)
        self._waiting: tuple[int, Path] | None = None
        self._changed = threading.Condition()
        self._busy = False
        self._failure: TitaError | None = None
        self._thread: threading.Thread | None = None
        self._own: set[int] = set()
        """Steps that this training saved or went on from. Others may lie there under its name."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take over what all ranks of this node have saved; the upload is another thread's."""
        import torch.distributed as dist

        dist.barrier()
        if args.local_process_index == 0:
            saved = Path(args.output_dir, f"checkpoint-{state.global_step}")
            progress = Path(args.output_dir, PROGRESS)
            if progress.exists():
                shutil.copyfile(progress, saved / progress.name)
            folder = saved.rename(saved.with_name(f"upload-{state.global_step}"))
            self._hand_over(state.global_step, folder)
        dist.barrier()

    def _hand_over(self, step: int, folder: Path) -> None:
        with self._changed:
            if self._waiting is not None:
                # The store is slower than the training: only the newest is worth its time.
                shutil.rmtree(self._waiting[1], ignore_errors=True)
            self._waiting = step, folder
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                assert self._waiting is not None
                (step, folder), self._waiting, self._busy = self._waiting, None, True
            try:
                self._push(step, folder)
                self._failure = None
                self._remove_old()
            except Exception as error:
                # Whatever it was, this thread must go on: `finish` and the next ones wait for it.
                say(f"train-dpo: checkpoint {step} did not reach the store: {error}")
                self._failure = (
                    error if isinstance(error, TitaError) else StoreUnavailable(repr(error))
                )
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _push(self, step: int, folder: Path) -> None:
        meta = self._meta | {"step": step}
        key = f"{self._prefix}/{step}/node-{self._node}"
        patiently(lambda: self._store.push_tree(folder, key, meta=meta))
        self._own.add(step)

    def _remove_old(self) -> None:
        """Delete what is older than the newest complete ones of this training, whole or not.

        A run that was begun with another recipe or number of processes may have come further.
        """
        if self._node != 0:
            return
        try:
            kept = [step for step in self.complete() if step in self._own][:_KEPT]
            oldest = kept[-1] if len(kept) == _KEPT else 0
            for step in {step for step, _ in self._seen() if step < oldest}:
                remove_tree(self._store, f"{self._prefix}/{step}")
        except (TitaError, OSError) as error:
            say(f"train-dpo: old checkpoints stay for now: {error}")

    def finish(self) -> None:
        """Wait until nothing is on its way to the store any more.

        Raises:
            TitaError: the last checkpoint did not arrive.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and not self._busy)
        if self._failure is not None:
            raise self._failure

    def complete(self) -> list[int]:
        """Steps of the complete checkpoints, the newest first."""
        nodes: dict[int, set[int]] = {}
        for step, path in self._seen():
            if match := re.fullmatch(r"node-(\d+)/manifest\.json", path):
                nodes.setdefault(step, set()).add(int(match[1]))
        whole = set(range(self._num_nodes))
        return sorted((step for step, found in nodes.items() if found >= whole), reverse=True)

    def _seen(self) -> Iterator[tuple[int, str]]:
        """Step, and path below it, of every object of any checkpoint."""
        for entry in self._store.list(f"{self._prefix}/"):
            step, _, path = entry.key.removeprefix(f"{self._prefix}/").partition("/")
            if step.isdecimal():
                yield int(step), path

    def remove(self) -> None:
        """Delete all of them: the run has ended, or this part of it."""
        remove_tree(self._store, self._prefix)

    def restore(self, folder: Path) -> Path | None:
        """Bring the newest complete checkpoint here; every rank calls this.

        Rank 0 chooses, so that all nodes go on from the same step. One that turns out broken is
        passed over for the one before.

        Returns:
            The folder to resume from, or None to begin at the beginning.
        """
        import torch.distributed as dist

        step = gathered(lambda: self._choose(folder) if dist.get_rank() == 0 else None)[0]

        def bring() -> None:
            if step is not None and self._node != 0 and local_rank() == 0:
                self._pull_whole(step, folder)

        together(bring)
        return None if step is None else folder / f"checkpoint-{step}"

    def _choose(self, folder: Path) -> int | None:
        for step in patiently(self.complete):
            try:
                self._pull_whole(step, folder)
            except TitaError as error:
                if isinstance(error, StoreUnavailable) and not self._answers():
                    # Not this checkpoint's fault: going on without it would lose work.
                    raise
                say(f"train-dpo: checkpoint {step} is passed over: {error}")
                continue
            say(f"train-dpo: going on from step {step}")
            self._own.add(step)
            return step
        return None

    def _pull_whole(self, step: int, folder: Path) -> None:
        # From S3 a broken tree and a broken connection look alike until tried again.
        patiently(lambda: self._pull(step, folder), pauses_s=_SHORT_PAUSES_S)

    def _answers(self) -> bool:
        try:
            self.complete()
        except StoreUnavailable:
            return False
        return True

    def _pull(self, step: int, folder: Path) -> None:
        target = folder / f"checkpoint-{step}"
        for node in range(self._num_nodes):
            tree = f"{self._prefix}/{step}/node-{node}"
            manifest = self._store.read_manifest(tree)
            found = {} if manifest is None else {k: manifest.meta.get(k) for k in self._meta}
            if found != self._meta:
                raise TitaError("of another recipe or number of processes", where=tree)
            part = folder / f"part-{node}"
            self._store.pull_tree(tree, into=part)
            shutil.copytree(part, target, dirs_exist_ok=True)
            shutil.rmtree(part)


def patiently(work: Callable[[], T], *, pauses_s: Sequence[float] = _PAUSES_S) -> T:
    """Do `work`, again and again while the store is away, for about four minutes in all.

    Raises:
        StoreUnavailable: it was still away after the last pause.
    """
    for pause_s in pauses_s:
        try:
            return work()
        except StoreUnavailable as error:
            say(f"train-dpo: {error}; trying again in {pause_s:.0f} s")
        except OSError as error:
            # A directory store on a network file system fails with these.
            say(f"train-dpo: the store fails ({error}); trying again in {pause_s:.0f} s")
        time.sleep(pause_s)
    try:
        return work()
    except OSError as error:
        raise StoreUnavailable(f"the store fails ({error.strerror or error})") from error


def remove_tree(store: Store, prefix: str) -> None:
    """Delete all below `prefix`, manifests first: what is half gone must not look whole."""
    keys = [entry.key for entry in store.list(f"{prefix}/")]
    for key in sorted(keys, key=lambda key: not key.endswith("/manifest.json")):
        store.delete(key)
