"""The state of one run: watch events go in, snapshots come out. No I/O."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from tita.launch.objects import (
    JOB_LABEL,
    STARTING_REASONS,
    ListEvent,
    Object,
    WatchEvent,
    condition,
    container_status,
    current_pods,
    ended_at,
    epoch,
    is_cancelled,
    is_ending,
    node_is_lost,
    rank_of,
    terminated,
)
from tita.launch.reasons import (
    CLAIM_EVENTS,
    RunReason,
    disruption_reasons,
    queue_position,
    retry_reason,
    sidecar_reasons,
    termination_reason,
    waiting_reasons,
)
from tita.launch.scope import CommandScope
from tita.records import TRAINING_STAGE, RunStages, TrainProgress

JOBS, PODS, EVENTS = "jobs.batch", "pods", "events"
WORKLOADS = "workloads.kueue.x-k8s.io"
_USED_EVENTS = frozenset(
    {"FailedCreate", "FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"}
    | {"Pulling", "Pulled", *CLAIM_EVENTS}
)


class RunPhase(StrEnum):
    """How far a run is; docs/launching.md explains each phase."""

    QUEUED = "queued"
    SCHEDULING = "scheduling"
    PULLING = "pulling"
    STARTING = "starting"
    RUNNING = "running"
    TRAINING = "training"
    UPLOADING = "uploading"
    RETRYING = "retrying"
    CANCELLING = "cancelling"
    ENDING = "ending"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DELETED = "deleted"


_RECOMPUTE_EVERY_S = 10.0
"""Some reasons name the time that is left."""

OVER = (RunPhase.DONE, RunPhase.FAILED, RunPhase.CANCELLED, RunPhase.DELETED)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One pod, or with `--local` one node's process."""

    name: str
    rank: int
    state: str
    node: str = ""
    restarts: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSnapshot:
    """A run at one moment, as it is displayed."""

    run: str
    job: str
    phase: RunPhase
    workers: Sequence[WorkerStatus] = ()
    progress: TrainProgress | None = None
    stages: RunStages | None = None
    elapsed_s: float = 0.0
    reasons: Sequence[RunReason] = ()


@dataclass(slots=True)
class PodRecords:
    """The newest records in the log of one pod."""

    progress: TrainProgress | None = None
    stages: RunStages | None = None

    def add(self, record: TrainProgress | RunStages) -> None:
        if isinstance(record, TrainProgress):
            self.progress = record
        else:
            self.stages = record

    @property
    def phase(self) -> RunPhase:
        """The phase of a run whose pods are all running."""
        if self.progress is not None:
            done = self.progress.step >= self.progress.steps
            return RunPhase.UPLOADING if done else RunPhase.TRAINING
        names = {stage.name for stage in self.stages.stages} if self.stages else set()
        return RunPhase.TRAINING if TRAINING_STAGE in names else RunPhase.RUNNING


@dataclass(frozen=True, slots=True, kw_only=True)
class _PodsView:
    """The part of a snapshot that takes time with many pods, and changes only with events."""

    workers: Sequence[WorkerStatus]
    retry: RunReason | None
    reasons: Sequence[RunReason]
    computed_at: float


@dataclass(kw_only=True)
class RunState:
    """The objects of one run."""

    run: str
    scope: CommandScope = field(default_factory=CommandScope)
    job: Object | None = None
    pods: dict[str, Object] = field(default_factory=dict)
    events: dict[str, Object] = field(default_factory=dict)
    workloads: tuple[Object, ...] = ()
    records: dict[str, PodRecords] = field(default_factory=dict)
    """By the pod's name: an attempt begins without the records of the attempt before."""
    listed: set[str] = field(default_factory=set)
    """Kinds that were listed; a missing object of another kind means nothing yet."""
    last_job: Object | None = None
    """The Job as last seen, also after its deletion."""
    deleted: set[str] = field(default_factory=set)
    """Deleted pods that are kept because they show how the run ended. They have no logs."""
    _pods_view: _PodsView | None = None
    """What the last events say; None after a change."""

    @property
    def has_logs(self) -> bool:
        """Whether a pod is left whose log can be read."""
        return not self.pods.keys() <= self.deleted

    def apply(self, change: ListEvent | WatchEvent) -> None:
        """Apply one event."""
        items = change.items if isinstance(change, ListEvent) else (change.item,)
        self.listed.add(change.kind)
        if change.kind != EVENTS:
            self._pods_view = None
        if change.kind == WORKLOADS:
            self.workloads = tuple(items)
        elif change.kind == JOBS:
            deleted = isinstance(change, WatchEvent) and change.deleted
            self.job = items[0] if items and not deleted else None
            self.last_job = self.job or self.last_job
        elif change.kind == PODS:
            self._apply_pods(change, items)
        else:
            for event in items:
                if self._is_relevant(event):
                    self._pods_view = None
                    self.events[event["metadata"]["uid"]] = _slim_event(event)

    def add_record(self, pod: str, record: TrainProgress | RunStages) -> None:
        """Apply a record in the log of one pod."""
        self.records.setdefault(pod, PodRecords()).add(record)

    def _apply_pods(self, change: ListEvent | WatchEvent, items: tuple[Object, ...]) -> None:
        if isinstance(change, ListEvent):
            # A failed pod that was deleted still tells why the run failed.
            listed = {pod["metadata"]["uid"] for pod in items}
            self.pods = {u: p for u, p in self.pods.items() if u in listed or terminated(p)}
            self.deleted = self.pods.keys() - listed
        for pod in items:
            uid = pod["metadata"]["uid"]
            if isinstance(change, WatchEvent) and change.deleted:
                self.deleted.add(uid)
                if not terminated(pod):
                    self.pods.pop(uid, None)
                    continue
            self.pods[uid] = _slim_pod(pod)

    def _is_relevant(self, event: Object) -> bool:
        name = event["involvedObject"].get("name") or ""
        ours = name == self.run or name.startswith(f"{self.run}-")
        return ours and event.get("reason") in _USED_EVENTS

    def snapshot(self) -> RunSnapshot:
        """The run as it is now."""
        view = self._pods_view
        if view is None or time.monotonic() - view.computed_at > _RECOMPUTE_EVERY_S:
            view = self._pods_view = self._view_pods()
        first = next((worker.name for worker in view.workers if worker.rank == 0), "")
        records = self.records.get(first, PodRecords())
        is_retrying = view.retry is not None
        return RunSnapshot(
            run=self.run,
            job=((self.last_job or {}).get("metadata") or {}).get("labels", {}).get(JOB_LABEL, ""),
            phase=phase_of(self.job, view.workers, records=records, retrying=is_retrying),
            workers=view.workers,
            progress=records.progress,
            stages=records.stages,
            elapsed_s=self._elapsed_s(),
            reasons=view.reasons,
        )

    def _view_pods(self) -> _PodsView:
        pods = self.pods.values()
        retry = retry_reason(self.job, pods)
        return _PodsView(
            workers=workers_of(pods, pulling=self._pulling_pods()),
            retry=retry,
            reasons=[
                replace(reason, text=self.scope.fill(reason.text))
                for reason in self._reasons(retry)
            ],
            computed_at=time.monotonic(),
        )

    def _reasons(self, retry: RunReason | None) -> list[RunReason]:
        pods = self.pods.values()
        if sidecars := sidecar_reasons(self.job, pods):
            return sidecars
        if retry is not None:
            return [retry]
        disruptions = disruption_reasons(self.job, pods)
        if (ending := termination_reason(self.job, pods)) is not None:
            return [ending, *disruptions]
        workload = self._workload()
        position = queue_position(workload, self.workloads) if workload else None
        events = self._sorted_events()
        waits = waiting_reasons(self.job, pods, events, workload=workload, position=position)
        return [*disruptions, *waits]

    def _sorted_events(self) -> list[Object]:
        return sorted(self.events.values(), key=lambda event: event["time"])

    def _pulling_pods(self) -> frozenset[str]:
        last = {
            event["involvedObject"]["name"]: event["reason"]
            for event in self._sorted_events()
            if event["reason"] in ("Pulling", "Pulled")
        }
        return frozenset(name for name, reason in last.items() if reason == "Pulling")

    def _workload(self) -> Object | None:
        uid = ((self.job or {}).get("metadata") or {}).get("uid")
        for workload in self.workloads:
            owners = workload["metadata"].get("ownerReferences") or []
            if any(owner.get("uid") == uid for owner in owners):
                return workload
        return None

    def _elapsed_s(self) -> float:
        created = ((self.last_job or {}).get("metadata") or {}).get("creationTimestamp")
        if not created:
            return 0.0
        end = ended_at(self.last_job)
        return max(0.0, (epoch(end) if end else time.time()) - epoch(created))


def workers_of(
    pods: Iterable[Object], *, pulling: frozenset[str] = frozenset()
) -> list[WorkerStatus]:
    """The newest pod of each rank, with the number of the rank's earlier attempts."""
    everything = list(pods)
    attempts = Counter(map(rank_of, everything))
    workers = []
    for pod in current_pods(everything):
        name, rank = pod["metadata"]["name"], rank_of(pod)
        state, note = pod_state(pod, pulling=name in pulling)
        workers.append(
            WorkerStatus(
                name=name,
                rank=rank,
                state=state,
                node=(pod.get("spec") or {}).get("nodeName") or "",
                restarts=container_status(pod).get("restartCount", 0) + attempts[rank] - 1,
                note=note,
            )
        )
    return workers


def pod_state(pod: Object, *, pulling: bool = False) -> tuple[str, str]:
    """The pod's state in one word, and a short note or an empty string."""
    status, ended = pod.get("status") or {}, terminated(pod)
    disrupted = condition(pod, "DisruptionTarget")
    if status.get("phase") == "Succeeded":
        return "done", ""
    if status.get("phase") == "Failed" or ended:
        if status.get("reason") == "Evicted":
            return "evicted", ""
        if disrupted:
            return "disrupted", disrupted.get("reason", "")
        code = (ended or {}).get("exitCode")
        return ("done", "") if code == 0 else ("failed", "" if code is None else f"exit {code}")
    if node_is_lost(pod):
        return "lost", "node not reporting"
    if pod["metadata"].get("deletionTimestamp"):
        return "ending", disrupted.get("reason", "") if disrupted else ""
    if not ((pod.get("spec") or {}).get("nodeName") or condition(pod, "PodScheduled")):
        return "pending", ""
    state = container_status(pod).get("state") or {}
    if "running" in state:
        return "running", ""
    reason = (state.get("waiting") or {}).get("reason", "")
    if reason not in STARTING_REASONS:
        return "stuck", reason
    return ("pulling" if pulling else "starting"), ""


def phase_of(
    job: Object | None,
    workers: Sequence[WorkerStatus],
    *,
    records: PodRecords | None = None,
    retrying: bool = False,
) -> RunPhase:
    """The phase of the slowest pod; `retrying` between two attempts.

    `records` are those of the first node's pod.
    """
    if job is None:
        return RunPhase.DELETED
    if condition(job, "Complete"):
        return RunPhase.DONE
    if condition(job, "Failed"):
        return RunPhase.CANCELLED if is_cancelled(job) else RunPhase.FAILED
    if is_ending(job):
        return RunPhase.CANCELLING if is_cancelled(job) else RunPhase.ENDING
    if job["spec"].get("suspend"):
        return RunPhase.QUEUED
    if retrying:
        return RunPhase.RETRYING
    states = {worker.state for worker in workers}
    if len(workers) < job["spec"].get("parallelism", 1) or "pending" in states:
        return RunPhase.SCHEDULING
    if "pulling" in states:
        return RunPhase.PULLING
    if states & {"starting", "stuck"}:
        return RunPhase.STARTING
    return (records or PodRecords()).phase


def _slim_pod(pod: Object) -> Object:
    """The fields that are used: hundreds of pods are kept in memory."""
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
