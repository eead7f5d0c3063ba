"""Informers and log streams: list-then-watch and log following that survive broken connections."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tita.errors import TitaError, Unreachable
from tita.launch.cluster import ApiError, ApiUnavailable, Cluster
from tita.launch.objects import CONTAINER, ListEvent, Object, WatchEvent, container_status


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionEvent:
    """The API gives no answer; the feed tries again. With `back` it does again."""

    kind: str
    why: str = ""
    back: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchForbidden:
    """The API will never answer this; the feed has ended."""

    kind: str
    error: TitaError


Change = ListEvent | WatchEvent | ConnectionEvent | WatchForbidden


class Informer(threading.Thread):
    """Sends every change of `kind` to `sink`, until stopped."""

    def __init__(
        self,
        cluster: Cluster,
        kind: str,
        *,
        params: Mapping[str, str],
        sink: Callable[[Change], None],
        pause_s: tuple[float, float] = (0.5, 15.0),
    ) -> None:
        super().__init__(daemon=True, name=f"feed {kind}")
        self._cluster = cluster
        self._kind = kind
        self._params = dict(params)
        self._sink = sink
        self._first_pause_s, self._longest_pause_s = pause_s
        self._halt = threading.Event()
        self._away = False
        self._version = ""

    def stop(self) -> None:
        """End soon; the thread may still wait for its last answer."""
        self._halt.set()

    def run(self) -> None:
        pause = self._first_pause_s
        while not self._halt.is_set():
            started = time.monotonic()
            try:
                if not self._version:
                    self._list()
                self._watch()
                pause = self._first_pause_s
            except ApiError as error:
                if error.status == 410:
                    self._version = ""
                    continue
                if error.status in (401, 403, 404, 405):
                    self._sink(WatchForbidden(kind=self._kind, error=error))
                    return
                self._lost(error)
            except (Unreachable, ValueError) as error:
                self._lost(error)
                self._halt.wait(getattr(error, "retry_after_s", 0.0))  # the server's Retry-After
            # A server that ends every watch at once must not be asked in a tight loop.
            if time.monotonic() - started < 1.0:
                self._halt.wait(pause * random.uniform(0.8, 1.2))
                pause = min(2 * pause, self._longest_pause_s)

    def _list(self) -> None:
        items, version = self._cluster.list(self._cluster.path(self._kind), **self._params)
        self._back()
        self._sink(ListEvent(kind=self._kind, items=tuple(items)))
        self._version = version

    def _watch(self) -> None:
        path = self._cluster.path(self._kind)
        for change in self._cluster.watch(
            path, version=self._version, on_open=self._back, **self._params
        ):
            if self._halt.is_set():
                return
            item = change["object"]
            if change["type"] != "BOOKMARK":
                gone = change["type"] == "DELETED"
                self._sink(WatchEvent(kind=self._kind, item=item, gone=gone))
            self._version = item["metadata"]["resourceVersion"]

    def _lost(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            self._sink(ConnectionEvent(kind=self._kind, why=getattr(error, "what", str(error))))

    def _back(self) -> None:
        if self._away:
            self._away = False
            self._sink(ConnectionEvent(kind=self._kind, back=True))


# A job may have nothing to say for long; a silent connection is opened anew all the same.
SILENCE_S = 60.0


_OVERLAP = timedelta(seconds=1)


_FAILURES_TOLD = 3


@dataclass
class LogPosition:
    """Where a log was left, and what was read of the last seconds."""

    since: datetime | None = None
    recent: Counter[str] = field(default_factory=Counter)
    _replayed: Counter[str] = field(default_factory=Counter)

    def reopen(self) -> dict[str, str]:
        """Parameters that go on from here; what they repeat is dropped by `take`."""
        self._replayed = self.recent.copy()
        if self.since is None:
            return {}
        return {"sinceTime": self.since.strftime("%Y-%m-%dT%H:%M:%SZ")}

    def take(self, stamped: str) -> str | None:
        """The line without its time stamp, or None if it was read before."""
        if self._replayed[stamped] > 0:
            self._replayed[stamped] -= 1
            return None
        stamp, _, line = stamped.partition(" ")
        second = _second(stamp)
        if second is None:
            return stamped
        since = second - _OVERLAP
        if self.since is None or since > self.since:
            self.since = since
            self.recent = Counter(
                {old: n for old, n in self.recent.items() if (_second(old) or since) >= since}
            )
        self.recent[stamped] += 1
        return line


class LogStream(threading.Thread):
    """Sends every line of one pod's container to `sink`, once and in order, until it ended.

    `tell` hears what keeps the log from being read, once while it lasts.
    """

    def __init__(
        self,
        cluster: Cluster,
        pod: str,
        *,
        sink: Callable[[str], None],
        tell: Callable[[str], None],
        pause_s: float = 1.0,
    ) -> None:
        super().__init__(daemon=True, name=f"tail {pod}")
        self._cluster = cluster
        self._pod = pod
        self._sink = sink
        self._tell = tell
        self._num_failed = 0
        self._pause_s = pause_s
        self._halt = threading.Event()
        self._restarts = 0
        self._was_open = False
        self._seen = LogPosition()

    def stop(self) -> None:
        """End soon; the thread may still wait for its last answer."""
        self._halt.set()

    def run(self) -> None:
        while not self._halt.is_set():
            self._was_open = False
            try:
                if self._once():
                    return
                self._num_failed = 0
            except ApiError as error:
                if error.status == 404:
                    return
                if error.status in (401, 403):
                    self._tell(f"cannot read logs: {error.what}")
                    return
            except ApiUnavailable as error:
                # The API is there, but not the node's kubelet, or no way to it.
                self._num_failed += 1
                if self._num_failed == _FAILURES_TOLD:
                    self._tell(f"no logs for now, trying on: {error.what}")
            except Unreachable:
                pass  # whoever watches the run tells that
            # A log that ended has most likely ended for good: look at once.
            self._halt.wait(0.05 if self._was_open else self._pause_s)

    def _once(self) -> bool:
        """Read as far as there is; True when the container will not write again."""
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
        return ended and _never_again(pod)

    def _read(self, **how: str) -> None:
        params = {"container": CONTAINER, "timestamps": "true", **self._seen.reopen(), **how}
        path = self._cluster.path("pods", self._pod, sub="log")
        for stamped in self._cluster.stream(path, params=params, silence_s=SILENCE_S):
            if self._halt.is_set():
                return
            line = self._seen.take(stamped)
            if line is not None:
                self._sink(line)


def tail_log(cluster: Cluster, pod: str, *, count: int) -> list[str]:
    """The end of a pod's log; empty if the pod is gone."""
    params = {"container": CONTAINER, "tailLines": str(count)}
    path = cluster.path("pods", pod, sub="log")
    try:
        return list(cluster.stream(path, params=params, silence_s=15.0))
    except (ApiError, Unreachable):
        return []


def _never_again(pod: Object) -> bool:
    policy = (pod.get("spec") or {}).get("restartPolicy", "Never")
    return policy == "Never" or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def _second(stamped: str) -> datetime | None:
    try:
        return datetime.strptime(stamped[:19], "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return None
