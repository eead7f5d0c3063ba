"""What is known of a run: changes go in, snapshots come out. Nothing here does I/O."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tita.launch.cluster import Object
from tita.launch.feed import Changed, Listed
from tita.launch.states import Reason, Snapshot, ended_at, epoch, phase_of, terminated, workers_of
from tita.launch.template import JOB_LABEL
from tita.launch.tries import lost_pods, next_try, why_ending
from tita.launch.waiting import CLAIM_EVENTS, queue_position, why_waiting
from tita.records import TrainProgress

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

    def apply(self, change: Listed | Changed) -> None:
        """Lay one change over what is known."""
        items = change.items if isinstance(change, Listed) else (change.item,)
        self.listed.add(change.kind)
        if change.kind == WORKLOADS:
            self.workloads = tuple(items)
        elif change.kind == JOBS:
            gone = isinstance(change, Changed) and change.gone
            self.job = items[0] if items and not gone else None
            self.last_job = self.job or self.last_job
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
            self.gone = self.pods.keys() - here
        for pod in items:
            uid = pod["metadata"]["uid"]
            if isinstance(change, Changed) and change.gone:
                self.gone.add(uid)
                if not terminated(pod):
                    self.pods.pop(uid, None)
                    continue
            self.pods[uid] = slim_pod(pod)

    def _about_us(self, event: Mapping[str, Any]) -> bool:
        name = event["involvedObject"].get("name") or ""
        ours = name == self.run or name.startswith(f"{self.run}-")
        return ours and event.get("reason") in _TELLING_EVENTS

    def snapshot(self) -> Snapshot:
        """What there is to say of the run now."""
        pods = self.pods.values()
        workers = workers_of(pods, pulling=self._pulling())
        again = next_try(self.job, pods)
        return Snapshot(
            run=self.run,
            job=((self.last_job or {}).get("metadata") or {}).get("labels", {}).get(JOB_LABEL, ""),
            phase=phase_of(self.job, workers, progress=self.progress, retrying=again is not None),
            workers=workers,
            progress=self.progress,
            elapsed_s=self._elapsed_s(),
            reasons=self._reasons(again),
        )

    def _reasons(self, again: Reason | None) -> list[Reason]:
        pods = self.pods.values()
        if again is not None:
            return [again]
        if (ending := why_ending(self.job, pods)) is not None:
            return [ending, *lost_pods(self.job, pods)]
        workload = self._workload()
        position = queue_position(workload, self.workloads) if workload else None
        events = sorted(self.events.values(), key=lambda e: e["time"])
        waits = why_waiting(self.job, pods, events, workload=workload, position=position)
        return [*lost_pods(self.job, pods), *waits]

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
