"""The gang's own record of its attempts in the store, from which it counts the tries that are used.

    attempts/<run>/<launch>/<node>-<started>-<boot>           one attempt of one node
    attempts/<run>/<launch>/<node>-<started>-<boot>-<ended>-<exit code>

Times are milliseconds since 1970; `launch` is the uid of the Job; `boot` stands for one boot of one
machine. The names hold everything, so one listing reads the record. A node that was killed leaves
no end: if the next attempt runs on the same boot, its process was killed, otherwise the machine was
lost.
"""

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tita.errors import ABORTED, NEVER_RETRIED, UNCOUNTED, ExitCode, OutOfTries, TitaError
from tita.gang.incidents import Incident, NodeEnd, count_tries, find_incidents
from tita.settings import Settings
from tita.storage import Store
from tita.terminal import counted, say

_PREFIX = "attempts"
_KILLED = 137
"""Exit code that Kubernetes reports for a container that was killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAttempt:
    """One attempt of one node."""

    node: int
    started_ms: int
    boot: str
    ended_ms: int | None = None
    code: int | None = None

    @property
    def name(self) -> str:
        start = f"{self.node}-{self.started_ms}-{self.boot}"
        return start if self.ended_ms is None else f"{start}-{self.ended_ms}-{self.code}"


class AttemptRecord:
    """The attempts of one launch, as one of its nodes sees them."""

    def __init__(self, store: Store, *, run: str, launch: str, node: int, tries: int) -> None:
        self._store = store
        self._prefix = f"{_PREFIX}/{run}/{launch}/"
        self._tries = tries
        self._own = NodeAttempt(node=node, started_ms=_now_ms(), boot=boot_id())

    @classmethod
    def from_settings(cls, settings: Settings, store: Store) -> "AttemptRecord | None":
        """The record of this launch; None outside a cluster, where nothing restarts a gang."""
        if settings.launch_uid is None or settings.tries is None or settings.run is None:
            return None
        return cls(
            store,
            run=settings.run,
            launch=settings.launch_uid,
            node=settings.node_rank,
            tries=settings.tries,
        )

    def start(self) -> None:
        """Record that this node starts.

        Raises:
            OutOfTries: the gang has no tries left.
        """
        self._store.put(f"{self._prefix}{self._own.name}", b"")
        ends = node_ends(_read(self._store, self._prefix))
        used = count_tries(ends)
        if used > self._tries:
            raise OutOfTries(self._out_of_tries(used))
        if incidents := find_incidents(ends):
            before = counted(len(incidents), "incident")
            say(f"start after {before}; {used} of {self._tries} tries used")

    def end(self, code: int) -> int:
        """Record how this node ended; its exit code, `OUT_OF_TRIES` if this was the last try.

        Whether an abort is a try depends on how the other nodes end, so the next start decides.
        """
        ended = replace(self._own, ended_ms=_now_ms(), code=code)
        try:
            self._store.put(f"{self._prefix}{ended.name}", b"")
            if code in UNCOUNTED | NEVER_RETRIED | {0, ABORTED}:
                return code
            used = count_tries(node_ends(_read(self._store, self._prefix)))
        except TitaError as error:
            say(f"the end of this attempt is not recorded: {error}")
            return code
        if used <= self._tries:
            return code
        say(self._out_of_tries(used))
        return ExitCode.OUT_OF_TRIES

    def _out_of_tries(self, used: int) -> str:
        return f"no tries are left: {counted(used, 'incident')}, {self._tries} allowed"


def read_incidents(store: Store, run: str) -> list[Incident]:
    """The incidents of a run's newest launch, oldest first."""
    return find_incidents(node_ends(read_attempts(store, run)))


def read_attempts(store: Store, run: str) -> list[NodeAttempt]:
    """The attempts of a run's newest launch."""
    launches: dict[str, list[NodeAttempt]] = defaultdict(list)
    for info in store.list(f"{_PREFIX}/{run}/"):
        launch, _, name = info.key.removeprefix(f"{_PREFIX}/{run}/").partition("/")
        launches[launch].append(_parse(name))
    newest = max(launches.values(), key=lambda found: max(a.started_ms for a in found), default=[])
    return _without_open_twins(newest)


def node_ends(attempts: Iterable[NodeAttempt]) -> list[NodeEnd]:
    """The attempts that failed; of one without an end, only once its node has started again."""
    by_node: dict[int, list[NodeAttempt]] = defaultdict(list)
    for attempt in sorted(attempts, key=lambda attempt: attempt.started_ms):
        by_node[attempt.node].append(attempt)
    ends = []
    for of_node in by_node.values():
        for attempt, after in zip(of_node, [*of_node[1:], None], strict=True):
            if attempt.ended_ms is not None:
                ended_ms, code = attempt.ended_ms, attempt.code
            elif after is not None:
                ended_ms = after.started_ms
                code = _KILLED if after.boot == attempt.boot else None
            else:
                continue
            if code != 0:
                ends.append(
                    NodeEnd(
                        node=attempt.node,
                        started=attempt.started_ms / 1000,
                        ended=ended_ms / 1000,
                        code=code,
                    )
                )
    return ends


def boot_id() -> str:
    """A short id of this boot of this machine (Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = "unknown"
    return hashlib.sha256(boot.encode()).hexdigest()[:12]


def _read(store: Store, prefix: str) -> list[NodeAttempt]:
    found = [_parse(info.key.removeprefix(prefix)) for info in store.list(prefix)]
    return _without_open_twins(found)


def _without_open_twins(found: Iterable[NodeAttempt]) -> list[NodeAttempt]:
    """An attempt that ended has two objects: keep the second."""
    newest: dict[tuple[int, int], NodeAttempt] = {}
    for attempt in sorted(found, key=lambda attempt: attempt.ended_ms is not None):
        newest[attempt.node, attempt.started_ms] = attempt
    return list(newest.values())


def _parse(name: str) -> NodeAttempt:
    node, started, boot, *end = name.split("-")
    attempt = NodeAttempt(node=int(node), started_ms=int(started), boot=boot)
    return replace(attempt, ended_ms=int(end[0]), code=int(end[1])) if end else attempt


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
