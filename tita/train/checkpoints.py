"""Checkpoints: saved to this node's disk, uploaded during training, and restored.

`<out>/checkpoints/<step>/node-<k>` is one tree per node with the files that the node's ranks saved.
A checkpoint is complete when the trees of all nodes are; incomplete ones are ignored.
"""

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_chain,
    wait_fixed,
)
from transformers import TrainerCallback

from tita.errors import StoreUnavailable, TitaError, from_os_error, is_disk_full
from tita.records import complete_checkpoints
from tita.storage import Store
from tita.storage.manifest import InvalidManifest
from tita.storage.s3_client import ExpiredCredentials, caller_reports_retries
from tita.terminal import say
from tita.train.group import from_rank_0, gather, local_rank
from tita.train.history import PROGRESS_FILE

BEST = "best"
"""Folder beside a stage's checkpoints, which each of them takes along."""
_MAX_KEPT = 2
"""Complete checkpoints that stay in the store; if the newest is corrupt, there is another."""
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0)
_SHORT_PAUSES_S = (1.0, 3.0)
_OF_RANK = re.compile(r"\w*zero_pp_rank_\d+_.*|rng_state_\d+\.pth")
T = TypeVar("T")


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """The checkpoints of one training stage, as one rank sees them."""

    def __init__(
        self,
        *,
        store: Store,
        out: str,
        node: int,
        num_nodes: int,
        meta: Mapping[str, Any],
        is_same_run: Callable[[Mapping[str, Any]], bool],
    ) -> None:
        """Args:
        store: where they are.
        out: of the run.
        node: rank of this node.
        num_nodes: of the run.
        meta: what is recorded of the run with each checkpoint.
        is_same_run: whether a checkpoint with these records is one of this run.
        """
        self._store = store
        self._prefix = f"{out}/checkpoints"
        self._node = node
        self._num_nodes = num_nodes
        self._meta = dict(meta)
        self._is_same_run = is_same_run
        self._pending: tuple[int, Path] | None = None
        self._changed = threading.Condition()
        self._is_uploading = False
        self._failure: TitaError | None = None
        self._thread: threading.Thread | None = None
        self._own_steps: set[int] = set()
        """Steps that this training saved or resumed from; the store may also have checkpoints of
        another recipe or number of processes under this name."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop if no checkpoint will reach the store again from this process.

        Raises:
            ExpiredCredentials: a new pod may have new ones, and continues from the last checkpoint.
        """
        if isinstance(self._failure, ExpiredCredentials):
            raise self._failure

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Queue the checkpoint that this node's ranks have saved for upload."""
        dist.barrier()
        if args.local_process_index == 0:
            saved = Path(args.output_dir, f"checkpoint-{state.global_step}")
            progress = Path(args.output_dir, PROGRESS_FILE)
            if progress.exists():
                shutil.copyfile(progress, saved / progress.name)
            best = Path(args.output_dir, BEST)
            if best.is_dir():
                shutil.copytree(best, saved / BEST, copy_function=os.link)
            folder = saved.rename(saved.with_name(f"upload-{state.global_step}"))
            with self._changed:
                if self._pending is not None:
                    # Uploads are slower than training: skip the older checkpoint.
                    shutil.rmtree(self._pending[1], ignore_errors=True)
                self._pending = state.global_step, folder
                self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._upload, name="upload", daemon=True)
                self._thread.start()
        dist.barrier()

    def _upload(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None)
                assert self._pending is not None
                (step, folder), self._pending, self._is_uploading = self._pending, None, True
            try:
                self._push(step, folder)
                self._failure = None
                self._remove_old()
            except Exception as error:
                # This thread must survive any error: `finish` and later checkpoints wait for it.
                say(f"train-dpo: cannot upload checkpoint {step}: {error}")
                self._failure = (
                    error if isinstance(error, TitaError) else StoreUnavailable(repr(error))
                )
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                with self._changed:
                    self._is_uploading = False
                    self._changed.notify_all()

    def _push(self, step: int, folder: Path) -> None:
        meta = self._meta | {"step": step}
        key = f"{self._prefix}/{step}/node-{self._node}"
        retry_store(lambda: self._store.push_tree(folder, key, meta=meta))
        self._own_steps.add(step)

    def _remove_old(self) -> None:
        """Delete everything older than the newest complete checkpoints of this training.

        A run with another recipe or number of processes may have left later steps; they do not
        count.
        """
        if self._node != 0:
            return
        try:
            kept = [step for step in self.complete() if step in self._own_steps][:_MAX_KEPT]
            oldest = kept[-1] if len(kept) == _MAX_KEPT else 0
            for step in {step for step, _ in self._list() if step < oldest}:
                self._store.delete_tree(f"{self._prefix}/{step}")
        except (TitaError, OSError) as error:
            say(f"train-dpo: cannot delete old checkpoints, will retry later: {error}")

    def finish(self) -> None:
        """Wait for all uploads.

        Raises:
            TitaError: the last upload failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._pending is None and not self._is_uploading)
        if self._failure is not None:
            raise self._failure

    def complete(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        paths = (f"{step}/{path}" for step, path in self._list())
        return complete_checkpoints(paths, num_nodes=self._num_nodes)

    def newest(self) -> Mapping[str, Any] | None:
        """What is recorded with the newest complete checkpoint of this run; None without one."""
        for step in self.complete():
            try:
                manifest = self._store.read_manifest(f"{self._prefix}/{step}/node-0")
            except InvalidManifest:
                continue  # `restore` skips it, too
            if manifest is not None and self._is_same_run(manifest.meta):
                return manifest.meta
        return None

    def _list(self) -> Iterator[tuple[int, str]]:
        """Step, and path below it, of every object of every checkpoint."""
        for entry in self._store.list(f"{self._prefix}/"):
            step, _, path = entry.key.removeprefix(f"{self._prefix}/").partition("/")
            if step.isdecimal():
                yield int(step), path

    def restore(self, folder: Path) -> Path | None:
        """Download the newest complete checkpoint and its progress lines; every rank calls this.

        All nodes download at once, each the files that its ranks need. If a file is corrupt on any
        node, all take the checkpoint before it.

        Returns:
            The folder to resume from, or None to start at step 0.
        """
        for step in from_rank_0(lambda: retry_store(self.complete)):
            failures = gather(partial(self._try_pull, step, folder))
            if (failure := next(filter(None, failures), None)) is None:
                self._adopt(step, folder)
                return folder / f"checkpoint-{step}"
            if dist.get_rank() == 0:
                say(f"train-dpo: skipping checkpoint {step}: {failure}")
        return None

    def _try_pull(self, step: int, folder: Path) -> str | None:
        """Pull what this node needs; the error if the checkpoint is of no use.

        Raises:
            StoreUnavailable: the checkpoint may be intact, and starting without it would lose work.
        """
        if local_rank() != 0:
            return None
        try:
            self._pull(step, folder)
        except TitaError as error:
            if isinstance(error, StoreUnavailable):
                # Also the error of an object that cannot be read. Fails if the store is away.
                self.complete()
            for unfinished in (folder / f"checkpoint-{step}", *folder.glob("part-*")):
                shutil.rmtree(unfinished, ignore_errors=True)
            return str(error)
        return None

    def _adopt(self, step: int, folder: Path) -> None:
        """Continue the progress lines and the best weights of a checkpoint, on rank 0."""
        if dist.get_rank() != 0:
            return
        say(f"train-dpo: resuming from step {step}")
        progress = folder / f"checkpoint-{step}" / PROGRESS_FILE
        if progress.is_file():
            shutil.copyfile(progress, folder / PROGRESS_FILE)
        best = folder / f"checkpoint-{step}" / BEST
        if best.is_dir():
            best.rename(folder / BEST)
        self._own_steps.add(step)

    def _pull(self, step: int, folder: Path) -> None:
        """Move this node's files, and those that all nodes share, into one folder.

        The first node saves what is shared: the weights outside of shards and the trainer's state.
        """

        def pull() -> None:
            for node in sorted({0, self._node}):
                tree = f"{self._prefix}/{step}/node-{node}"
                manifest = self._store.read_manifest(tree)
                if manifest is None or not self._is_same_run(manifest.meta):
                    raise TitaError("of another recipe or number of processes", where=tree)
                part = folder / f"part-{node}"
                is_own = node == self._node
                self._store.pull_tree(tree, into=part, wanted=_is_any if is_own else _is_shared)
                _move_files(part, folder / f"checkpoint-{step}")

        # On S3 only a retry tells a corrupt tree from a broken connection.
        retry_store(pull, pauses_s=_SHORT_PAUSES_S)


def _is_any(_: str) -> bool:
    return True


def _is_shared(path: str) -> bool:
    """Whether every node reads a file of the first node's checkpoint.

    Rank 0 alone reads the best weights. DeepSpeed names its shards `zero_pp_rank_<rank>_...`, or
    `bf16_zero_pp_rank_<rank>_...`, and each rank reads its own; transformers names the states of
    random generators.
    """
    of_rank = _OF_RANK.fullmatch(path.rpartition("/")[2]) is not None
    return not (of_rank or path.startswith(f"{BEST}/"))


def _move_files(source: Path, target: Path) -> None:
    """Move all files of `source` into `target` on the same file system, and remove `source`."""
    for path in sorted(source.rglob("*")):
        if not path.is_dir():
            moved = target / path.relative_to(source)
            moved.parent.mkdir(parents=True, exist_ok=True)
            path.replace(moved)
    shutil.rmtree(source)


def retry_store(work: Callable[[], T], *, pauses_s: Sequence[float] = _PAUSES_S) -> T:
    """Run `work`, and retry it while the store is unavailable, by default for about four minutes.

    Raises:
        StoreUnavailable: the last attempt failed too.
        TitaError: a directory store is still full.
    """

    def report(state: RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        error = state.outcome.exception()
        # A directory store on a network file system fails with an OSError.
        reason = f"cannot access the store ({error})" if isinstance(error, OSError) else error
        say(f"train-dpo: {reason}; retrying in {state.next_action.sleep:.0f} s")

    retrying = Retrying(
        retry=retry_if_exception_type((StoreUnavailable, OSError)),
        wait=wait_chain(*(wait_fixed(pause_s) for pause_s in pauses_s)),
        stop=stop_after_attempt(len(pauses_s) + 1),
        before_sleep=report,
        reraise=True,
    )
    try:
        with caller_reports_retries():
            return retrying(work)
    except OSError as error:
        if is_disk_full(error) and (full := from_os_error(error)) is not None:
            # Another start would train up to the same point.
            raise full from error
        raise StoreUnavailable(f"cannot access the store ({error.strerror or error})") from error
