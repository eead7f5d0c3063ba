"""A pod's log from its first line to its last, across waits, broken connections and restarts.

A reopened log starts again at a second's boundary, so lines are told apart by their time stamps
and, because the two output streams may cross, by what was seen since that second.
"""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tita.errors import Unreachable
from tita.launch.cluster import ApiError, Busy, Cluster, Object
from tita.launch.states import container_status
from tita.launch.template import CONTAINER

# A job may have nothing to say for long; a silent connection is opened anew all the same.
SILENCE_S = 60.0
_OVERLAP = timedelta(seconds=1)
_FAILURES_TOLD = 3


@dataclass
class Seen:
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


class Tail(threading.Thread):
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
        self._seen = Seen()

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
            except Busy as error:
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


def last_lines(cluster: Cluster, pod: str, *, count: int) -> list[str]:
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
