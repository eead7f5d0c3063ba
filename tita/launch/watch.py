"""Informers and log streams: threads that survive broken connections and restarts."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tita.errors import TitaError, Unreachable
from tita.launch.cluster import ApiError, ApiUnavailable, Cluster
from tita.launch.objects import CONTAINER, ListEvent, Object, WatchEvent, container_status

# Read timeout of logs: a job may be silent for longer, and the stream is then opened again.
SILENCE_S = 60.0
# A reopened log starts one second early: the two output streams may be stamped out of order.
_OVERLAP = timedelta(seconds=1)
_FAILURES_BEFORE_NOTICE = 3
_RESTART_S = 300.0
"""An API server that restarts refuses requests with 403 until it knows the cluster's roles; with
many of them for minutes (https://github.com/kubernetes/kubernetes/issues/121635)."""
_FIRST_REOPEN_S, _LONGEST_REOPEN_S = 0.05, 5.0
"""Waits before a log that was open is opened again, doubled while it ends within a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionEvent:
    """The API stopped answering, or answers again; the informer reconnects by itself."""

    kind: str
    why: str = ""
    restored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchForbidden:
    """The API refuses this watch for good; the informer has ended."""

    kind: str
    error: TitaError


InformerEvent = ListEvent | WatchEvent | ConnectionEvent | WatchForbidden


class _StoppableThread(threading.Thread):
    def __init__(self, name: str) -> None:
        super().__init__(daemon=True, name=name)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End soon; the thread may still wait for a response."""
        self._stopped.set()


class _Permission:
    """Tells a refusal for good from one of an API server that restarts."""

    def __init__(self) -> None:
        self._was_granted = False
        self._refused_at: float | None = None

    def grant(self) -> None:
        self._was_granted, self._refused_at = True, None

    def is_lost(self, error: ApiError) -> bool:
        """Whether requests are refused for good, after this refusal."""
        if error.status != 403 or not self._was_granted:
            return True
        if self._refused_at is None:
            self._refused_at = time.monotonic()
        return time.monotonic() - self._refused_at >= _RESTART_S


class Informer(_StoppableThread):
    """Sends every change of the objects of one kind to `sink`, until stopped.

    Lists, then watches from the list's resourceVersion, and reconnects from the last version seen.
    Lists again after 410 Gone, as the official informers do.
    https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
    """

    def __init__(
        self,
        cluster: Cluster,
        kind: str,
        *,
        params: Mapping[str, str],
        sink: Callable[[InformerEvent], None],
        wait_s: tuple[float, float] = (0.5, 15.0),
    ) -> None:
        """`wait_s`: first and longest wait before reconnecting."""
        super().__init__(f"informer {kind}")
        self._cluster = cluster
        self._kind = kind
        self._params = dict(params)
        self._sink = sink
        self._first_wait_s, self._longest_wait_s = wait_s
        self._disconnected = False
        self._permission = _Permission()
        self._version = ""

    def run(self) -> None:
        wait_s = self._first_wait_s
        while not self._stopped.is_set():
            started = time.monotonic()
            try:
                if not self._version:
                    self._list()
                self._watch()
                wait_s = self._first_wait_s
            except ApiError as error:
                if error.status in (401, 403, 404, 405) and self._permission.is_lost(error):
                    self._sink(WatchForbidden(kind=self._kind, error=error))
                    return
                if error.status == 410:
                    self._version = ""
                else:
                    self._on_disconnect(error)
            except (Unreachable, ValueError) as error:
                self._on_disconnect(error)
                self._stopped.wait(getattr(error, "retry_after_s", 0.0))
            # A server that ends every watch at once must not be asked in a tight loop.
            if time.monotonic() - started < 1.0:
                self._stopped.wait(wait_s * random.uniform(0.8, 1.2))
                wait_s = min(2 * wait_s, self._longest_wait_s)

    def _list(self) -> None:
        items, version = self._cluster.list(self._cluster.path(self._kind), **self._params)
        self._on_connect()
        self._sink(ListEvent(kind=self._kind, items=tuple(items)))
        self._version = version

    def _watch(self) -> None:
        path = self._cluster.path(self._kind)
        for change in self._cluster.watch(
            path, version=self._version, on_open=self._on_connect, **self._params
        ):
            if self._stopped.is_set():
                return
            item = change["object"]
            if change["type"] != "BOOKMARK":
                deleted = change["type"] == "DELETED"
                self._sink(WatchEvent(kind=self._kind, item=item, deleted=deleted))
            self._version = item["metadata"]["resourceVersion"]

    def _on_disconnect(self, error: Exception) -> None:
        if not self._disconnected:
            self._disconnected = True
            self._sink(ConnectionEvent(kind=self._kind, why=getattr(error, "what", str(error))))

    def _on_connect(self) -> None:
        self._permission.grant()
        if self._disconnected:
            self._disconnected = False
            self._sink(ConnectionEvent(kind=self._kind, restored=True))


@dataclass
class LogPosition:
    """Where a log was left. Lines that a reopened log repeats are recognised and dropped."""

    since: datetime | None = None
    recent: Counter[str] = field(default_factory=Counter)
    """Lines of the last seconds, with their timestamps."""
    _replayed: Counter[str] = field(default_factory=Counter)

    def reopen(self) -> dict[str, str]:
        """Query parameters that continue from here."""
        self._replayed = self.recent.copy()
        return {"sinceTime": self.since.strftime("%Y-%m-%dT%H:%M:%SZ")} if self.since else {}

    def take(self, stamped: str) -> str | None:
        """The line without its timestamp; None if it was read before."""
        if self._replayed[stamped] > 0:
            self._replayed[stamped] -= 1
            return None
        second = _second(stamped)
        if second is None:
            return stamped
        since = second - _OVERLAP
        if self.since is None or since > self.since:
            self.since = since
            recent = {
                line: n for line, n in self.recent.items() if (_second(line) or since) >= since
            }
            self.recent = Counter(recent)
        self.recent[stamped] += 1
        return stamped.partition(" ")[2]


class LogStream(_StoppableThread):
    """Sends every line of one pod's log to `sink`, once and in order, from first to last.

    `notify` receives what keeps the log from being read, once.
    """

    def __init__(
        self,
        cluster: Cluster,
        pod: str,
        *,
        sink: Callable[[str], None],
        notify: Callable[[str], None],
        wait_s: float = 1.0,
    ) -> None:
        super().__init__(f"log {pod}")
        self._cluster = cluster
        self._pod = pod
        self._sink = sink
        self._notify = notify
        self._num_failed = 0
        self._wait_s = wait_s
        self._restarts = 0
        self._was_open = False
        self._permission = _Permission()
        self._position = LogPosition()

    def run(self) -> None:
        reopen_s = _FIRST_REOPEN_S
        while not self._stopped.is_set():
            self._was_open = False
            retry_after_s, started = 0.0, time.monotonic()
            try:
                if self._read_available():
                    return
                self._num_failed = 0
            except ApiError as error:
                if error.status == 404:
                    return
                if error.status in (401, 403) and self._permission.is_lost(error):
                    self._notify(f"cannot read logs: {error.what}")
                    return
            except ApiUnavailable as error:
                # The API answers, but cannot reach the node's kubelet.
                retry_after_s = error.retry_after_s
                self._num_failed += 1
                if self._num_failed == _FAILURES_BEFORE_NOTICE:
                    self._notify(f"logs are unavailable, still trying: {error.what}")
            except Unreachable:
                pass  # the informers report it
            if not self._was_open:
                self._stopped.wait(max(self._wait_s, retry_after_s))
                continue
            # A stream that was open and ended most likely ended for good: check at once. But a
            # proxy that ends every stream must not be asked in a tight loop.
            if time.monotonic() - started >= 1.0:
                reopen_s = _FIRST_REOPEN_S
            self._stopped.wait(reopen_s)
            reopen_s = min(2 * reopen_s, _LONGEST_REOPEN_S)

    def _read_available(self) -> bool:
        """Read as far as possible; True when the container will not write again."""
        pod = self._cluster.get(self._cluster.path("pods", self._pod))
        status = container_status(pod)
        restarts = status.get("restartCount", 0)
        if restarts > self._restarts:
            self._read(previous="true")
            self._restarts = restarts
        state = status.get("state") or {}
        ended = "terminated" in state
        if ended or "running" in state:
            self._read(**({} if ended else {"follow": "true"}))
            self._was_open = not ended
        return ended and _is_final(pod)

    def _read(self, **options: str) -> None:
        params = {"container": CONTAINER, "timestamps": "true", **self._position.reopen()}
        path = self._cluster.path("pods", self._pod, sub="log")
        for stamped in self._cluster.stream(
            path,
            params=params | options,
            silence_s=SILENCE_S,
            on_open=self._permission.grant,
        ):
            if self._stopped.is_set():
                return
            line = self._position.take(stamped)
            if line is not None:
                self._sink(line)


def tail_log(cluster: Cluster, pod: str, *, count: int) -> list[str]:
    """The last lines of a pod's log; empty if the pod is gone."""
    params = {"container": CONTAINER, "tailLines": str(count)}
    path = cluster.path("pods", pod, sub="log")
    try:
        return list(cluster.stream(path, params=params, silence_s=15.0))
    except (ApiError, Unreachable):
        return []


def read_log(cluster: Cluster, pod: str, *, limit_bytes: int | None = None) -> Iterator[str]:
    """The lines of a pod's log so far, or of its first `limit_bytes`.

    Raises:
        ApiError: the log must not be read, the container has not started, or the pod is gone.
    """
    params = {"container": CONTAINER} | ({"limitBytes": str(limit_bytes)} if limit_bytes else {})
    yield from cluster.stream(cluster.path("pods", pod, sub="log"), params=params, silence_s=15.0)


def _is_final(pod: Object) -> bool:
    """Whether a terminated container is not restarted."""
    policy = (pod.get("spec") or {}).get("restartPolicy", "Never")
    return policy == "Never" or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def _second(stamped: str) -> datetime | None:
    try:
        return datetime.strptime(stamped[:19], "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return None
