"""Jobs in the cluster: what `tita jobs` lists, shows, cancels and deletes."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from tita.errors import TitaError
from tita.launch.cluster import ApiError, Cluster
from tita.launch.objects import CANCELLED, JOB_LABEL, JOB_NAME, ListEvent, Object, in_queue, is_over
from tita.launch.reasons import failure_reason, run_outcome
from tita.launch.run_state import EVENTS, JOBS, OVER, PODS, WORKLOADS, RunPhase, RunState
from tita.terminal import say


def list_jobs(cluster: Cluster, *, job: str | None = None) -> list[dict[str, Any]]:
    """All runs in the namespace, oldest first."""
    jobs = _find(cluster, job=job)
    pods: dict[str, list[Object]] = defaultdict(list)
    events: list[Object] = []
    if any(not is_over(item) for item in jobs):
        for pod in cluster.list(cluster.path(PODS), labelSelector=JOB_NAME)[0]:
            pods[pod["metadata"]["labels"][JOB_NAME]].append(pod)
        events, _ = cluster.list(cluster.path(EVENTS))
    return [_row(_state(item, pods=pods[item["metadata"]["name"]], events=events)) for item in jobs]


def list_names(cluster: Cluster) -> list[str]:
    """Names of all runs in the namespace, oldest first, in one request."""
    return [item["metadata"]["name"] for item in _find(cluster)]


def read_status(cluster: Cluster, run: str) -> dict[str, Any]:
    """A run as it is now: phase, pods, and what there is to say about it.

    Raises:
        TitaError: there is no such run.
    """
    found = _get(cluster, run)
    pods, _ = cluster.list(cluster.path(PODS), labelSelector=f"{JOB_NAME}={run}")
    events, _ = cluster.list(cluster.path(EVENTS))
    state = _state(found, pods=pods, events=events)
    if in_queue(found):
        state.apply(ListEvent(kind=WORKLOADS, items=tuple(list_workloads(cluster))))
    snapshot = state.snapshot()
    told = [reason.text for reason in snapshot.reasons]
    if snapshot.phase in OVER:
        verdict = run_outcome(state.job, state.pods.values(), run=run, has_logs=state.has_logs)
        told = [*verdict.lines, *(f"- {remedy}" for remedy in verdict.remedies)]
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
        "told": told,
    }  # fmt: skip


def list_workloads(cluster: Cluster) -> list[Object]:
    """Kueue's records of what waits and runs; empty without Kueue, or the right to look."""
    try:
        return cluster.list(cluster.path(WORKLOADS))[0]
    except ApiError:
        return []


def cancel(cluster: Cluster, run: str) -> str:
    """End the pods and keep the Job; what was done is told in a sentence.

    Its deadline is moved to now: suspending it would leave a run that looks as if it waited. A
    suspended Job's deadline does not run; it has nothing to keep and is deleted.
    """
    job = _get(cluster, run)
    if is_over(job):
        raise TitaError(f"{run} is over", remedy=f"tita jobs delete {run} clears it away")
    if job["spec"].get("suspend"):
        cluster.delete(cluster.path(JOBS, run))
        return f"{run} was not running and is deleted; what is in the store stays"
    marked = {"metadata": {"annotations": {CANCELLED: "true"}}}
    cluster.patch(cluster.path(JOBS, run), {**marked, "spec": {"activeDeadlineSeconds": 1}})
    return f"{run} is stopping; tita jobs delete {run} clears it away"


def delete(
    cluster: Cluster, run: str, *, wait: bool = True, tell: Callable[[str], None] = say
) -> None:
    """Delete the Job and, with it, its pods; `wait` until they have saved and ended."""
    job = _get(cluster, run)
    cluster.delete(cluster.path(JOBS, run))
    began, told = time.monotonic(), False
    while wait and _is_there(cluster, job):
        if not told and time.monotonic() - began > 2.0:
            tell(
                f"{run} goes once its pods have saved and ended (see tita jobs status {run}); "
                "Ctrl-C does not keep it"
            )
            told = True
        time.sleep(0.5)


def _is_there(cluster: Cluster, job: Object) -> bool:
    try:
        found = cluster.get(cluster.path(JOBS, job["metadata"]["name"]))
    except ApiError as error:
        if error.status != 404:
            raise
        return False
    return bool(found["metadata"]["uid"] == job["metadata"]["uid"])


def run_not_found(cluster: Cluster, run: str) -> TitaError:
    """What to say where there is no such run."""
    where = f"namespace {cluster.namespace}"
    return TitaError(f"no run {run!r}", where=where, remedy="see `tita jobs list`")


def _get(cluster: Cluster, run: str) -> Object:
    try:
        return cluster.get(cluster.path(JOBS, run))
    except ApiError as error:
        if error.status != 404:
            raise
        raise run_not_found(cluster, run) from None


def _find(cluster: Cluster, *, job: str | None = None) -> list[Object]:
    selector = f"{JOB_LABEL}={job}" if job else JOB_LABEL
    found, _ = cluster.list(cluster.path(JOBS), labelSelector=selector)
    return sorted(found, key=lambda item: item["metadata"].get("creationTimestamp") or "")


def _state(job: Object, *, pods: Sequence[Object], events: Sequence[Object]) -> RunState:
    state = RunState(run=job["metadata"]["name"])
    for kind, items in ((JOBS, [job]), (PODS, pods), (EVENTS, events)):
        state.apply(ListEvent(kind=kind, items=tuple(items)))
    return state


def _row(state: RunState) -> dict[str, Any]:
    job, snapshot = state.job or {}, state.snapshot()
    ready = (job.get("status") or {}).get("ready") or 0
    return {
        "run": snapshot.run,
        "job": snapshot.job,
        "phase": str(snapshot.phase),
        "pods": f"{ready}/{job['spec'].get('parallelism', 1)}",
        "created": job["metadata"].get("creationTimestamp"),
        "why": failure_reason(job) if snapshot.phase is RunPhase.FAILED else "",
    }
