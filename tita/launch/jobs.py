"""Runs in the cluster: list, status, cancel and delete."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from tita.errors import ExitCode, TitaError
from tita.launch.cluster import ApiError, Cluster
from tita.launch.display import progress_line, stages_line
from tita.launch.objects import (
    CANCELLED,
    INSTANCE_LABEL,
    JOB_LABEL,
    JOB_NAME,
    ListEvent,
    Object,
    in_queue,
    is_over,
)
from tita.launch.outcome import failure_reason, next_steps, run_outcome
from tita.launch.run_state import EVENTS, JOBS, OVER, PODS, WORKLOADS, RunPhase, RunState
from tita.launch.watch import tail_log
from tita.records import read_record
from tita.terminal import say

_LAST_LINES = 200
"""Lines of a log among which the newest records are looked for."""


def list_jobs(
    cluster: Cluster, *, job: str | None = None, all_namespaces: bool = False
) -> list[dict[str, Any]]:
    """All runs in the namespace, or in all, oldest first, as rows of `tita jobs list`."""
    jobs = _find(cluster, job=job, all_namespaces=all_namespaces)
    pods: dict[tuple[str, str], list[Object]] = defaultdict(list)
    events: dict[str, list[Object]] = defaultdict(list)
    if any(not is_over(item) for item in jobs):
        path = cluster.path(PODS, all_namespaces=all_namespaces)
        for pod in cluster.list(path, labelSelector=JOB_NAME)[0]:
            metadata = pod["metadata"]
            pods[metadata["namespace"], metadata["labels"][JOB_NAME]].append(pod)
        for event in cluster.list(cluster.path(EVENTS, all_namespaces=all_namespaces))[0]:
            events[event["metadata"]["namespace"]].append(event)
    rows = []
    for item in jobs:
        metadata = item["metadata"]
        namespace = metadata["namespace"]
        state = _state(
            cluster, item, pods=pods[namespace, metadata["name"]], events=events[namespace]
        )
        snapshot = state.snapshot()
        ready = (item.get("status") or {}).get("ready") or 0
        rows.append(
            {
                "run": snapshot.run,
                "job": snapshot.job,
                "release": (metadata.get("labels") or {}).get(INSTANCE_LABEL),
                "namespace": namespace,
                "phase": str(snapshot.phase),
                "pods": f"{ready}/{item['spec'].get('parallelism', 1)}",
                "created": metadata.get("creationTimestamp"),
                "why": failure_reason(item) if snapshot.phase is RunPhase.FAILED else "",
            }
        )
    return rows


def list_names(cluster: Cluster) -> list[str]:
    """Names of all runs in the namespace, oldest first, in one request."""
    return [item["metadata"]["name"] for item in _find(cluster)]


def read_status(cluster: Cluster, run: str) -> dict[str, Any]:
    """A run's phase, pods, and messages (`told`).

    Raises:
        TitaError: there is no such run.
    """
    found = _require(cluster, run)
    pods, _ = cluster.list(cluster.path(PODS), labelSelector=f"{JOB_NAME}={run}")
    events, _ = cluster.list(cluster.path(EVENTS))
    state = _state(cluster, found, pods=pods, events=events)
    if in_queue(found):
        state.apply(ListEvent(kind=WORKLOADS, items=tuple(list_workloads(cluster))))
    snapshot = state.snapshot()
    if snapshot.phase is RunPhase.RUNNING:
        # How far a running pod is is in its log alone.
        first = next((worker.name for worker in snapshot.workers if worker.rank == 0), "")
        lines = tail_log(cluster, first, count=_LAST_LINES) if first else []
        for record in map(read_record, lines):
            if record is not None:
                state.add_record(first, record)
        snapshot = state.snapshot()
    messages = [reason.text for reason in snapshot.reasons]
    if snapshot.phase is RunPhase.RUNNING and snapshot.stages is not None:
        messages.append(stages_line(snapshot.stages))
    if snapshot.progress is not None:
        messages.append(progress_line(snapshot.progress))
    if snapshot.phase in OVER:
        scope = cluster.scope
        outcome = run_outcome(state.job, state.pods.values(), run=run, scope=scope)
        remedies = list(outcome.remedies)
        if outcome.code != ExitCode.OK:
            remedies += next_steps(found, outcome, has_logs=state.has_logs, scope=scope)
        messages = [*outcome.lines, *(f"- {remedy}" for remedy in remedies)]
    return {
        "run": run,
        "job": snapshot.job,
        "phase": str(snapshot.phase),
        "seconds": round(snapshot.elapsed_s),
        "pods": [
            {"rank": w.rank, "pod": w.name, "state": w.state, "node": w.node,
             "restarts": w.restarts, "note": w.note}
            for w in snapshot.workers
        ],
        "told": messages,
    }  # fmt: skip


def list_workloads(cluster: Cluster) -> list[Object]:
    """Kueue's workloads; empty without Kueue or without permission."""
    try:
        return cluster.list(cluster.path(WORKLOADS))[0]
    except ApiError:
        return []


def device_holders(cluster: Cluster, resource: str) -> dict[str, int]:
    """Runs of this namespace whose pods are on nodes, and how much of a resource each holds.

    Args:
        cluster: the cluster and namespace.
        resource: extended resource, such as `nvidia.com/gpu` or `nvidia.com/mig-1g.10gb`.
    """
    held: Counter[str] = Counter()
    for pod in cluster.list(cluster.path(PODS), labelSelector=JOB_NAME)[0]:
        spec, phase = pod["spec"], (pod.get("status") or {}).get("phase")
        if not spec.get("nodeName") or phase in ("Succeeded", "Failed"):
            continue
        for container in spec["containers"]:
            limits = (container.get("resources") or {}).get("limits") or {}
            held[pod["metadata"]["labels"][JOB_NAME]] += int(limits.get(resource, 0))
    return {run: num for run, num in held.most_common() if num}


def cancel(cluster: Cluster, run: str) -> str:
    """End a run's pods, keep its Job, and describe what was done.

    The Job's deadline is moved to now: a suspended Job would look like a queued one. A Job that is
    suspended already has no running deadline and no pods; it is deleted.
    """
    job = _require(cluster, run)
    if is_over(job):
        raise TitaError(
            f"{run} is over", remedy=f"to delete it: {cluster.scope.tita('jobs delete', run)}"
        )
    if job["spec"].get("suspend"):
        cluster.delete(cluster.path(JOBS, run))
        return f"{run} was not running and is deleted; its results in the store are kept"
    annotations = {"metadata": {"annotations": {CANCELLED: "true"}}}
    cluster.patch(cluster.path(JOBS, run), {**annotations, "spec": {"activeDeadlineSeconds": 1}})
    return f"{run} is stopping; to delete it: {cluster.scope.tita('jobs delete', run)}"


def delete(
    cluster: Cluster, run: str, *, wait: bool = True, notify: Callable[[str], None] = say
) -> None:
    """Delete the Job and its pods; `wait` until the pods have saved and exited."""
    job = _require(cluster, run)
    cluster.delete(cluster.path(JOBS, run))
    started, notified = time.monotonic(), False
    while wait and (found := _get(cluster, run)):
        if found["metadata"]["uid"] != job["metadata"]["uid"]:
            return  # a new run of the same name
        if not notified and time.monotonic() - started > 2.0:
            status = cluster.scope.tita("jobs status", run)
            notify(
                f"{run} is deleted when its pods have saved and exited ({status}); "
                "Ctrl-C does not undo this"
            )
            notified = True
        time.sleep(0.5)


def run_not_found(cluster: Cluster, run: str) -> TitaError:
    where = f"namespace {cluster.namespace}"
    return TitaError(
        f"no run {run!r}", where=where, remedy=f"see `{cluster.scope.tita('jobs list')}`"
    )


def _get(cluster: Cluster, run: str) -> Object | None:
    try:
        return cluster.get(cluster.path(JOBS, run))
    except ApiError as error:
        if error.status != 404:
            raise
        return None


def _require(cluster: Cluster, run: str) -> Object:
    found = _get(cluster, run)
    # A Job of something else is not ours to cancel or delete.
    if found is None or JOB_LABEL not in (found["metadata"].get("labels") or {}):
        raise run_not_found(cluster, run)
    return found


def _find(
    cluster: Cluster, *, job: str | None = None, all_namespaces: bool = False
) -> list[Object]:
    selector = f"{JOB_LABEL}={job}" if job else JOB_LABEL
    path = cluster.path(JOBS, all_namespaces=all_namespaces)
    found, _ = cluster.list(path, labelSelector=selector)
    return sorted(found, key=lambda item: item["metadata"].get("creationTimestamp") or "")


def _state(
    cluster: Cluster, job: Object, *, pods: Sequence[Object], events: Sequence[Object]
) -> RunState:
    state = RunState(run=job["metadata"]["name"], scope=cluster.scope)
    for kind, items in ((JOBS, [job]), (PODS, pods), (EVENTS, events)):
        state.apply(ListEvent(kind=kind, items=tuple(items)))
    return state
