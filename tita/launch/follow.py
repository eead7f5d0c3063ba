"""Following one run to its end: feeds and logs in, a view and an exit code out."""

import queue
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tita.errors import ExitCode, TitaError, Unreachable
from tita.launch.cluster import ApiError, Cluster, Object
from tita.launch.feed import Away, Change, Changed, Denied, Feed, Listed
from tita.launch.progress import read_progress
from tita.launch.states import OVER, Snapshot, phase_of, rank_of, terminated, workers_of
from tita.launch.tail import Tail, last_lines
from tita.launch.template import JOB_LABEL, QUEUE_LABEL, container_of, environment_of
from tita.launch.verdict import Verdict, judge
from tita.launch.views import View
from tita.launch.waiting import queue_position, why_waiting
from tita.records import TrainProgress

JOBS, PODS, EVENTS = "jobs.batch", "pods", "events"
WORKLOADS = "workloads.kueue.x-k8s.io"
_TELLING_EVENTS = frozenset(
    {"FailedCreate", "FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"}
    | {"Pulling", "Pulled"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    pod: str
    rank: int
    text: str


@dataclass(kw_only=True)
class RunState:
    """All that is known of a run; changes go in by `apply`."""

    run: str
    job: Object | None = None
    pods: dict[str, Object] = field(default_factory=dict)
    events: dict[str, Object] = field(default_factory=dict)
    workloads: tuple[Object, ...] = ()
    progress: TrainProgress | None = None
    listed: bool = False
    last_job: Object | None = None
    """The Job as it was last seen, also after it went."""

    def apply(self, change: Listed | Changed) -> None:
        """Lay one change over what is known."""
        items = change.items if isinstance(change, Listed) else (change.item,)
        if change.kind == WORKLOADS:
            self.workloads = tuple(items)
        elif change.kind == JOBS:
            gone = isinstance(change, Changed) and change.gone
            self.job = items[0] if items and not gone else None
            self.last_job = self.job or self.last_job
            self.listed = True
        elif change.kind == PODS:
            self._apply_pods(change, items)
        else:
            for event in items:
                if self._about_us(event):
                    self.events[event["metadata"]["uid"]] = _slim_event(event)

    def _apply_pods(self, change: Listed | Changed, items: tuple[Object, ...]) -> None:
        if isinstance(change, Listed):
            # A pod that failed and was cleared away still tells why the run failed.
            here = {pod["metadata"]["uid"] for pod in items}
            self.pods = {u: p for u, p in self.pods.items() if u in here or terminated(p)}
        for pod in items:
            if isinstance(change, Changed) and change.gone and not terminated(pod):
                self.pods.pop(pod["metadata"]["uid"], None)
            else:
                self.pods[pod["metadata"]["uid"]] = slim_pod(pod)

    def _about_us(self, event: Mapping[str, Any]) -> bool:
        name = event["involvedObject"].get("name") or ""
        ours = name == self.run or name.startswith(f"{self.run}-")
        return ours and event.get("reason") in _TELLING_EVENTS

    def snapshot(self) -> Snapshot:
        """What a view shows."""
        pods = self.pods.values()
        workers = workers_of(pods, pulling=self._pulling())
        return Snapshot(
            run=self.run,
            job=((self.last_job or {}).get("metadata") or {}).get("labels", {}).get(JOB_LABEL, ""),
            phase=phase_of(self.job, workers, progress=self.progress),
            workers=workers,
            progress=self.progress,
            elapsed_s=self._elapsed_s(),
        )

    def reasons(self) -> list[tuple[str, str]]:
        """Why the run waits, each with a key that stays while only numbers change."""
        workload = self._workload()
        position = queue_position(workload, self.workloads) if workload else None
        events = sorted(self.events.values(), key=lambda e: e["time"])
        found = why_waiting(
            self.job, self.pods.values(), events, workload=workload, position=position
        )
        return [(reason.key, reason.text) for reason in found]

    def _pulling(self) -> frozenset[str]:
        last: dict[str, str] = {}
        for event in sorted(self.events.values(), key=lambda e: e["time"]):
            if event["reason"] in ("Pulling", "Pulled"):
                last[event["involvedObject"]["name"]] = event["reason"]
        return frozenset(name for name, reason in last.items() if reason == "Pulling")

    def _workload(self) -> Object | None:
        uid = ((self.job or {}).get("metadata") or {}).get("uid")
        for workload in self.workloads:
            owners = workload["metadata"].get("ownerReferences") or []
            if any(owner.get("uid") == uid for owner in owners):
                return workload
        return None

    def _elapsed_s(self) -> float:
        status = (self.last_job or {}).get("status") or {}
        created = ((self.last_job or {}).get("metadata") or {}).get("creationTimestamp")
        if not created:
            return 0.0
        end = status.get("completionTime")
        until = _epoch(end) if end else time.time()
        return max(0.0, until - _epoch(created))


class Follower:
    """Follows a run; `watch` returns when it is over."""

    def __init__(
        self, cluster: Cluster, run: str, view: View, *, all_ranks: bool = False, logs: bool = True
    ) -> None:
        self._cluster = cluster
        self._view = view
        self._all_ranks = all_ranks
        self._logs = logs
        self._state = RunState(run=run)
        self._inbox: queue.SimpleQueue[Change | _Line] = queue.SimpleQueue()
        self._tails: dict[str, Tail] = {}
        self._recent: dict[str, deque[str]] = {}
        self._said: set[str] = set()
        self._away: set[str] = set()
        self._halt = threading.Event()
        self._clock_gap_s = time.time() - time.monotonic()

    def watch(self) -> Verdict:
        """Show the run until it is over.

        Raises:
            TitaError: there is no such run, or it must not be looked at.
            KeyboardInterrupt: let go; call `close` on the view.
        """
        feeds = self._start_feeds()
        try:
            while True:
                self._take()
                if not self._state.listed:
                    continue
                if self._state.last_job is None:
                    raise TitaError(
                        f"no run {self._state.run!r}",
                        where=f"namespace {self._cluster.namespace}",
                        remedy="see `tita jobs list`",
                    )
                self._notice_sleep()
                self._start_tails()
                snapshot = self._state.snapshot()
                self._view.update(snapshot)
                self._explain_waiting()
                if snapshot.phase in OVER:
                    return self._end()
        finally:
            self._halt.set()
            for thread in [*feeds, *self._tails.values()]:
                thread.stop()

    def _start_feeds(self) -> list[Feed]:
        run = self._state.run
        asked = {
            JOBS: {"fieldSelector": f"metadata.name={run}"},
            PODS: {"labelSelector": f"batch.kubernetes.io/job-name={run}"},
            EVENTS: {},
        }
        feeds = [
            Feed(self._cluster, kind, params=params, sink=self._inbox.put)
            for kind, params in asked.items()
        ]
        for feed in feeds:
            feed.start()
        threading.Thread(target=self._poll_queue, daemon=True).start()
        return feeds

    def _poll_queue(self) -> None:
        """Kueue's workloads, while the Job waits in a queue: few may watch them."""
        while not self._halt.wait(1.0):
            job = self._state.job
            if job is None or not job["spec"].get("suspend"):
                continue
            if QUEUE_LABEL not in (job["metadata"].get("labels") or {}):
                continue
            try:
                found, _ = self._cluster.list(self._cluster.path(WORKLOADS))
                self._inbox.put(Listed(kind=WORKLOADS, items=tuple(found)))
            except ApiError:
                return  # no Kueue, or no right to look: the queue's name must do
            except Unreachable:
                pass
            self._halt.wait(9.0)

    def _take(self, *, wait_s: float = 0.5) -> None:
        """Take in what came, and what more came while that was done."""
        try:
            self._accept(self._inbox.get(timeout=wait_s))
            while True:
                self._accept(self._inbox.get_nowait())
        except queue.Empty:
            return

    def _accept(self, item: Change | _Line) -> None:
        if isinstance(item, _Line):
            self._accept_line(item)
        elif isinstance(item, Away):
            self._tell_away(item)
        elif isinstance(item, Denied):
            if item.kind == JOBS:
                raise item.error
            self._view.say(f"cannot watch {item.kind}: {item.error.what}")
        else:
            self._state.apply(item)

    def _accept_line(self, line: _Line) -> None:
        self._recent.setdefault(line.pod, deque(maxlen=20)).append(line.text)
        progress = read_progress(line.text)
        if progress is None:
            self._view.line(str(line.rank), line.text)
        elif line.rank == 0:
            self._state.progress = progress

    def _tell_away(self, item: Away) -> None:
        before = bool(self._away)
        (self._away.discard if item.back else self._away.add)(item.kind)
        if self._away and not before:
            self._view.say(f"{item.why}; the job goes on, and so will this view")
        elif before and not self._away:
            self._view.say("the cluster's API answers again")

    def _notice_sleep(self) -> None:
        gap_s = time.time() - time.monotonic()
        slept_s = gap_s - self._clock_gap_s
        self._clock_gap_s = gap_s
        if slept_s > 30:
            self._view.say(f"this machine slept for {slept_s / 60:.0f} min; catching up")

    def _start_tails(self) -> None:
        if not self._logs:
            return
        for uid, pod in self._state.pods.items():
            rank, name = rank_of(pod), pod["metadata"]["name"]
            if uid in self._tails or not (self._all_ranks or rank == 0):
                continue

            def put(text: str, rank: int = rank, name: str = name) -> None:
                self._inbox.put(_Line(pod=name, rank=rank, text=text))

            self._tails[uid] = Tail(self._cluster, name, sink=put)
            self._tails[uid].start()

    def _explain_waiting(self) -> None:
        for key, text in self._state.reasons():
            if key not in self._said:
                self._said.add(key)
                self._view.say(text)

    def _end(self) -> Verdict:
        """The last lines of all logs may still be on their way, and the last pods' states."""
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            self._take(wait_s=0.2)
            if not any(tail.is_alive() for tail in self._tails.values()) and self._inbox.empty():
                break
        self._view.update(self._state.snapshot())
        return judge(self._state.job, self._state.pods.values(), run=self._state.run)

    def explain(self, verdict: Verdict) -> None:
        """Tell how the run ended, with the last lines of the pod that says why."""
        for line in verdict.lines:
            self._view.say(line)
        if verdict.pod is not None:
            for line in self._last_lines(verdict.pod):
                self._view.say(f"    {line}")
        if verdict.code != ExitCode.OK:
            self._tell_checkpoint()
        for remedy in verdict.remedies:
            self._view.say(f"  - {remedy}")

    def _last_lines(self, pod: str, *, count: int = 12) -> list[str]:
        if lines := last_lines(self._cluster, pod, count=count):
            return lines
        if pod in self._recent:
            return list(self._recent[pod])[-count:]
        for found in self._state.pods.values():
            if found["metadata"]["name"] == pod:
                return str((terminated(found) or {}).get("message") or "").splitlines()[-count:]
        return []

    def _tell_checkpoint(self) -> None:
        from tita.launch.runs import last_checkpoint

        if self._state.last_job is None:
            return
        pod = self._state.last_job["spec"]["template"]
        store = environment_of(container_of(pod)).get("TITA_STORE", "")
        found = last_checkpoint(self._state.run, store=store)
        if found:
            self._view.say(f"last complete checkpoint: {found}")


def slim_pod(pod: Object) -> Object:
    """What is looked at of a pod: a few hundred of them are kept."""
    metadata, spec = pod["metadata"], pod.get("spec") or {}
    names = ("name", "uid", "labels", "annotations", "creationTimestamp", "deletionTimestamp")
    return {
        "metadata": {name: metadata[name] for name in names if name in metadata},
        "spec": {name: spec[name] for name in ("nodeName", "restartPolicy") if name in spec},
        "status": pod.get("status") or {},
    }


def _slim_event(event: Object) -> Object:
    when = event.get("lastTimestamp") or event.get("eventTime")
    return {
        "reason": event["reason"],
        "message": event.get("message", ""),
        "involvedObject": event["involvedObject"],
        "time": when or event["metadata"].get("creationTimestamp") or "",
    }


def _epoch(stamp: str) -> float:
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
