"""Keeps the log of a node's processes in the store: pods are deleted, and their logs with them."""

import gzip
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tita.errors import TitaError
from tita.storage import Store

# A log has at most this size in the store, before compression: its start, and its last lines.
_HEAD_BYTES = 256 << 10
_TAIL_BYTES = 4 << 20
# A killed process loses what it wrote since the last upload.
_UPLOAD_EVERY_S = 120.0
_LAST_UPLOAD_S = 30.0


def log_prefix(run: str) -> str:
    """The prefix of a run's logs in the store: one object per start of its first node."""
    return f"logs/{run}/"


def read_logs(store: Store, run: str) -> Iterator[str]:
    """The lines of a run's logs in the store, oldest first; none if it has no log."""
    for key in sorted(info.key for info in store.list(log_prefix(run))):
        yield from gzip.decompress(store.get(key)).decode(errors="replace").splitlines()


@contextmanager
def archive_log(store: Store, run: str) -> Iterator[None]:
    """Copy what this process and its children write to standard output and error to the store.

    Both streams arrive in this process's standard output, as they do in a pod's log. A store that
    cannot be written does not stop the job.
    """
    now_ns = time.time_ns()
    started = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now_ns // 10**9))
    # With nanoseconds, so that names sort by time and no two starts have the same.
    archive = _LogArchive(store, f"{log_prefix(run)}{started}.{now_ns % 10**9:09d}Z.log.gz")
    archive.start()
    last_line = b""
    try:
        yield
    except TitaError as error:
        last_line = f"{error}\n".encode()
        raise
    finally:
        archive.close(last_line)


class _LogArchive:
    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key
        self._lock = threading.Lock()
        self._head = b""
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self._num_omitted = 0
        self._changed = False
        self._closed = threading.Event()
        self._saved: list[tuple[int, int]] = []

    def start(self) -> None:
        """Redirect the streams into a pipe that a thread copies from."""
        _flush()
        read_end, write_end = os.pipe()
        self._saved = [(number, os.dup(number)) for number in (1, 2)]
        for number, _ in self._saved:
            os.dup2(write_end, number)
        os.close(write_end)
        self._copier = threading.Thread(target=self._copy, args=(read_end,), daemon=True)
        self._copier.start()
        threading.Thread(target=self._upload_regularly, daemon=True).start()

    def close(self, last_line: bytes) -> None:
        """Restore the streams, and upload the rest within a bounded time.

        Args:
            last_line: added after everything that was written; the error that ends the process is
                printed later.
        """
        _flush()
        # The pipe ends when the last process that holds it does.
        for number, saved in self._saved:
            os.dup2(saved, number)
        self._copier.join(timeout=5.0)
        if last_line:
            self.add(last_line)
        self._closed.set()
        last = threading.Thread(target=self._upload, daemon=True)
        last.start()
        last.join(timeout=_LAST_UPLOAD_S)

    def add(self, data: bytes) -> None:
        """Keep the first and the last bytes."""
        with self._lock:
            self._changed = True
            missing = _HEAD_BYTES - len(self._head)
            self._head += data[:missing]
            if data := data[missing:]:
                self._tail.append(data)
                self._tail_bytes += len(data)
            while self._tail_bytes > _TAIL_BYTES:
                dropped = len(self._tail.popleft())
                self._tail_bytes -= dropped
                self._num_omitted += dropped

    def _copy(self, read_end: int) -> None:
        output = self._saved[0][1]
        with suppress(OSError):
            while data := os.read(read_end, 1 << 16):
                self.add(data)
                os.write(output, data)
        os.close(read_end)

    def _upload_regularly(self) -> None:
        while not self._closed.wait(_UPLOAD_EVERY_S):
            self._upload()

    def _upload(self) -> None:
        with self._lock:
            if not self._changed:
                return
            self._changed = False
            omitted = f"\n[{self._num_omitted} bytes omitted]\n" if self._num_omitted else ""
            data = b"".join((self._head, omitted.encode(), *self._tail))
        with suppress(TitaError, OSError):
            self._store.put(self._key, gzip.compress(data))


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
