"""A thread pool with one progress bar; the first failure or Ctrl-C cancels the remaining work."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial

from tita.storage.manifest import ManifestFile
from tita.storage.waits import checked_while_waiting
from tita.terminal import progress

WORKERS = 16
"""Number of concurrent requests; each holds at most one part of a file in memory."""


class Cancelled(Exception):
    """Another task failed, so this one stops."""


class TransferPool:
    """Runs tasks in threads, and adds up their progress."""

    def __init__(self, show: Callable[[int], None] = lambda _: None) -> None:
        self._show = show
        self._lock = threading.Lock()
        self._cancelled = threading.Event()

    def advance(self, size_bytes: int) -> None:
        """Add to the bytes that are done.

        Raises:
            Cancelled: the task should stop.
        """
        self.check()
        with self._lock:
            self._show(size_bytes)

    def check(self) -> None:
        """Raise `Cancelled` if the task should stop."""
        if self._cancelled.is_set():
            raise Cancelled

    def run(self, tasks: Iterable[Callable[[], object]]) -> None:
        """Run all tasks; the iterable is advanced as threads become free.

        Raises:
            The first failure, once running tasks have reached their next `advance`.
        """
        waiting, waiting_lock = iter(tasks), threading.Lock()

        def work() -> None:
            try:
                with checked_while_waiting(self.check):
                    while not self._cancelled.is_set():
                        with waiting_lock:
                            task = next(waiting, None)
                        if task is None:
                            return
                        task()
            except Cancelled:
                return
            except BaseException:
                self._cancelled.set()
                raise

        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                for future in as_completed([pool.submit(work) for _ in range(WORKERS)]):
                    future.result()
            except BaseException:
                self._cancelled.set()
                raise


@contextmanager
def transfer_pool(what: str, *, total_bytes: int) -> Iterator[TransferPool]:
    """A pool with a progress bar."""
    with progress(what, total=total_bytes, unit="bytes") as advance:
        yield TransferPool(advance)


def for_each_file(
    what: str, files: Collection[ManifestFile], work: Callable[[ManifestFile], object]
) -> None:
    """Call `work` for all files, with a progress bar."""
    with transfer_pool(what, total_bytes=sum(file.size_bytes for file in files)) as pool:

        def task(file: ManifestFile) -> None:
            work(file)
            pool.advance(file.size_bytes)

        pool.run(partial(task, file) for file in files)
