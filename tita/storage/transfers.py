"""Many pieces of work at once: in threads, with one bar, ended by the first failure or Ctrl-C."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial

from tita.storage.manifest import ManifestFile
from tita.terminal import progress

WORKERS = 16
"""Requests under way at once; each holds at most one part of a file in memory."""

Advance = Callable[[int], None]


class Stopped(Exception):
    """Another piece of the work failed, so this one need not go on."""


class Transfer:
    """What the threads of one transfer share."""

    def __init__(self, show: Advance) -> None:
        self._show = show
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def advance(self, size_bytes: int) -> None:
        """So many bytes more are done.

        Raises:
            Stopped: nothing more should be.
        """
        if self._stop.is_set():
            raise Stopped
        with self._lock:
            self._show(size_bytes)

    def run(self, tasks: Iterable[Callable[[], object]]) -> None:
        """Run all tasks, taken one by one as threads are free.

        Raises:
            The first failure, after the tasks under way have come to their next `advance`.
        """
        waiting, turn = iter(tasks), threading.Lock()

        def work() -> None:
            try:
                while not self._stop.is_set():
                    with turn:
                        task = next(waiting, None)
                    if task is None:
                        return
                    task()
            except Stopped:
                return
            except BaseException:
                self._stop.set()
                raise

        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                for future in as_completed([pool.submit(work) for _ in range(WORKERS)]):
                    future.result()
            except BaseException:
                self._stop.set()
                raise


@contextmanager
def transfer(what: str, *, total: int) -> Iterator[Transfer]:
    """A transfer of so many bytes, shown under this name."""
    with progress(what, total=total, unit="bytes") as advance:
        yield Transfer(advance)


def each(
    what: str, files: Collection[ManifestFile], work: Callable[[ManifestFile], object]
) -> None:
    """Do the same for all files, shown under this name; the first failure ends it."""
    with transfer(what, total=sum(file.size_bytes for file in files)) as going:

        def one(file: ManifestFile) -> None:
            work(file)
            going.advance(file.size_bytes)

        going.run(partial(one, file) for file in files)


def in_parallel(tasks: Iterable[Callable[[], object]]) -> None:
    """Run tasks in as many threads; the first failure ends it."""
    Transfer(lambda _: None).run(tasks)
