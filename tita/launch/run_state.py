"""What is known of a run: changes go in, snapshots come out. No I/O."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tita.launch.objects import (
    JOB_LABEL,
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
    termination_reason,
    waiting_reasons,
)
from tita.records import TrainProgress


class RunPhase(StrEnum):
    """How far a run is."""

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


OVER = (RunPhase.DONE, RunPhase.FAILED, RunPhase.CANCELLED, RunPhase.DELETED)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One pod, or with `--local` one process that stands for a node."""

    name: str
    rank: int
    state: str
    node: str = ""
    restarts: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSnapshot:
    """All that there is to say of a run at one moment."""

    run: str
    job: str
    phase: RunPhase
    workers: Sequence[WorkerStatus] = ()
    progress: TrainProgress | None = None
    elapsed_s: float = 0.0
    reasons: Sequence[RunReason] = ()


def workers_of(
    pods: Iterable[Object], *, pulling: frozenset[str] = frozenset()
) -> list[WorkerStatus]:
    """The newest pod of each rank, with how often the rank was tried before."""
    everything = list(pods)
    attempts: dict[int, int] = {}
    for pod in everything:
        attempts[rank_of(pod)] = attempts.get(rank_of(pod), 0) + 1
    found = []
    for pod in current_pods(everything):
        state, note = pod_state(pod, pulling=pod["metadata"]["name"] in pulling)
        restarts = container_status(pod).get("restartCount", 0) + attempts[rank_of(pod)] - 1
        found.append(
            WorkerStatus(
                name=pod["metadata"]["name"],
                rank=rank_of(pod),
                state=state,
                node=(pod.get("spec") or {}).get("nodeName") or "",
                restarts=restarts,
                note=note,
            )
        )
    return found


def pod_state(pod: Mapping[str, Any], *, pulling: bool = False) -> tuple[str, str]:
    """One word on the pod, and one or two more if there is something to say."""
    status = pod.get("status") or {}
    ended = terminated(pod)
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
        return "lost", "node is silent"
    if pod["metadata"].get("deletionTimestamp"):
        return "ending", disrupted.get("reason", "") if disrupted else ""
    if not _scheduled(pod):
        return "pending", ""
    state = container_status(pod).get("state") or {}
    if "running" in state:
        return "running", ""
    reason = (state.get("waiting") or {}).get("reason", "")
    if reason not in ("", "ContainerCreating", "PodInitializing"):
        return "stuck", reason
    return ("pulling" if pulling else "starting"), ""


def phase_of(
    job: Mapping[str, Any] | None,
    workers: Sequence[WorkerStatus],
    *,
    progress: TrainProgress | None = None,
    retrying: bool = False,
) -> RunPhase:
    """How far the run is: as far as its slowest pod; `retrying` between two tries."""
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
    if progress is None:
        return RunPhase.RUNNING
    return RunPhase.TRAINING if progress.step < progress.steps else RunPhase.UPLOADING


def _scheduled(pod: Mapping[str, Any]) -> bool:
    return bool((pod.get("spec") or {}).get("nodeName") or condition(pod, "PodScheduled"))


JOBS, PODS, EVENTS = "jobs.batch", "pods", "events"


WORKLOADS = "workloads.kueue.x-k8s.io"


_TELLING_EVENTS = frozenset(
    {"FailedCreate", "FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"}
    | {"Pulling", "Pulled", *CLAIM_EVENTS}
)


@dataclass(kw_only=True)
class RunState:
    """All that is known of a run; changes go in by `apply`."""

    run: str
    job: Object | None = None
    pods: dict[str, Object] = field(default_factory=dict)
    events: dict[str, Object] = field(default_factory=dict)
    workloads: tuple[Object, ...] = ()
    progress: TrainProgress | None = None
    listed: set[str] = field(default_factory=set)
    """Kinds of which a list has come: before that, absence means nothing."""
    last_job: Object | None = None
    """The Job as it was last seen, also after it went."""
    gone: set[str] = field(default_factory=set)
    """Pods that are kept although they went, and their logs with them."""

    @property
    def has_logs(self) -> bool:
        """Whether there is a pod left whose log can be read."""
        return not self.pods.keys() <= self.gone

    def apply(self, change: ListEvent | WatchEvent) -> None:
        """Lay one change over what is known."""
        items = change.items if isinstance(change, ListEvent) else (change.item,)
        self.listed.add(change.kind)
        if change.kind == WORKLOADS:
            self.workloads = tuple(items)
        elif change.kind == JOBS:
            gone = isinstance(change, WatchEvent) and change.gone
            self.job = items[0] if items and not gone else None
            self.last_job = self.job or self.last_job
        elif change.kind == PODS:
            self._apply_pods(change, items)
        else:
            for event in items:
                if self._about_us(event):
                    self.events[event["metadata"]["uid"]] = _slim_event(event)

    def _apply_pods(self, change: ListEvent | WatchEvent, items: tuple[Object, ...]) -> None:
        if isinstance(change, ListEvent):
            # A pod that failed and was cleared away still tells why the run failed.
            here = {pod["metadata"]["uid"] for pod in items}
            self.pods = {u: p for u, p in self.pods.items() if u in here or terminated(p)}
            self.gone = self.pods.keys() - here
        for pod in items:
            uid = pod["metadata"]["uid"]
            if isinstance(change, WatchEvent) and change.gone:
                self.gone.add(uid)
                if not terminated(pod):
                    self.pods.pop(uid, None)
                    continue
            self.pods[uid] = slim_pod(pod)

    def _about_us(self, event: Mapping[str, Any]) -> bool:
        name = event["involvedObject"].get("name") or ""
        ours = name == self.run or name.startswith(f"{self.run}-")
        return ours and event.get("reason") in _TELLING_EVENTS

    def snapshot(self) -> RunSnapshot:
        """What there is to say of the run now."""
        pods = self.pods.values()
        workers = workers_of(pods, pulling=self._pulling())
        again = retry_reason(self.job, pods)
        return RunSnapshot(
            run=self.run,
            job=((self.last_job or {}).get("metadata") or {}).get("labels", {}).get(JOB_LABEL, ""),
            phase=phase_of(self.job, workers, progress=self.progress, retrying=again is not None),
            workers=workers,
            progress=self.progress,
            elapsed_s=self._elapsed_s(),
            reasons=self._reasons(again),
        )

    def _reasons(self, again: RunReason | None) -> list[RunReason]:
        pods = self.pods.values()
        if again is not None:
            return [again]
        if (ending := termination_reason(self.job, pods)) is not None:
            return [ending, *disruption_reasons(self.job, pods)]
        workload = self._workload()
        position = queue_position(workload, self.workloads) if workload else None
        events = sorted(self.events.values(), key=lambda e: e["time"])
        waits = waiting_reasons(self.job, pods, events, workload=workload, position=position)
        return [*disruption_reasons(self.job, pods), *waits]

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
        created = ((self.last_job or {}).get("metadata") or {}).get("creationTimestamp")
        if not created:
            return 0.0
        end = ended_at(self.last_job)
        until = epoch(end) if end else time.time()
        return max(0.0, until - epoch(created))


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
