"""Jobs in the cluster: what `tita jobs` lists, shows, cancels and deletes."""

from typing import Any

from tita.errors import TitaError
from tita.launch.cluster import ApiError, Cluster, Object
from tita.launch.feed import Listed
from tita.launch.runstate import EVENTS, JOBS, PODS, RunState
from tita.launch.states import OVER, Phase, condition
from tita.launch.template import CANCELLED, JOB_LABEL
from tita.launch.verdict import judge


def list_jobs(cluster: Cluster, *, job: str | None = None) -> list[dict[str, Any]]:
    """All runs in the namespace, oldest first."""
    selector = f"{JOB_LABEL}={job}" if job else JOB_LABEL
    found, _ = cluster.list(cluster.path(JOBS), labelSelector=selector)
    found.sort(key=lambda item: item["metadata"].get("creationTimestamp") or "")
    return [_row(item) for item in found]


def read_status(cluster: Cluster, run: str) -> dict[str, Any]:
    """A run as it is now: phase, pods, and what there is to say about it.

    Raises:
        TitaError: there is no such run.
    """
    state = RunState(run=run)
    state.apply(Listed(kind=JOBS, items=(_get(cluster, run),)))
    selector = f"batch.kubernetes.io/job-name={run}"
    pods, _ = cluster.list(cluster.path(PODS), labelSelector=selector)
    events, _ = cluster.list(cluster.path(EVENTS))
    state.apply(Listed(kind=PODS, items=tuple(pods)))
    state.apply(Listed(kind=EVENTS, items=tuple(events)))
    snapshot = state.snapshot()
    told = [text for _, text in state.reasons()]
    if snapshot.phase in OVER:
        verdict = judge(state.job, state.pods.values(), run=run)
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


def cancel(cluster: Cluster, run: str) -> str:
    """End the pods and keep the Job; what was done is told in a sentence.

    Its deadline is moved to now: suspending it would leave a run that looks as if it waited. A
    suspended Job's deadline does not run; it has nothing to keep and is deleted.
    """
    job = _get(cluster, run)
    if condition(job, "Complete") or condition(job, "Failed"):
        raise TitaError(f"{run} is over", remedy=f"tita jobs delete {run} clears it away")
    if job["spec"].get("suspend"):
        cluster.delete(cluster.path(JOBS, run))
        return f"{run} had not begun and is deleted"
    marked = {"metadata": {"annotations": {CANCELLED: "true"}}}
    cluster.patch(cluster.path(JOBS, run), {**marked, "spec": {"activeDeadlineSeconds": 1}})
    return f"{run} is stopping; tita jobs delete {run} clears it away"


def delete(cluster: Cluster, run: str) -> None:
    """Delete the Job and, with it, its pods."""
    _get(cluster, run)
    cluster.delete(cluster.path(JOBS, run))


def no_run(cluster: Cluster, run: str) -> TitaError:
    """What to say where there is no such run."""
    where = f"namespace {cluster.namespace}"
    return TitaError(f"no run {run!r}", where=where, remedy="see `tita jobs list`")


def _get(cluster: Cluster, run: str) -> Object:
    try:
        return cluster.get(cluster.path(JOBS, run))
    except ApiError as error:
        if error.status != 404:
            raise
        raise no_run(cluster, run) from None


def _row(job: Object) -> dict[str, Any]:
    status = job.get("status") or {}
    if condition(job, "Complete"):
        phase = str(Phase.DONE)
    elif failed := condition(job, "Failed"):
        cancelled = (job["metadata"].get("annotations") or {}).get(CANCELLED)
        phase = "cancelled" if cancelled else f"{Phase.FAILED} ({failed.get('reason', '')})"
    elif job["spec"].get("suspend"):
        phase = str(Phase.QUEUED)
    else:
        phase = "running" if status.get("ready") else "waiting"
    return {
        "run": job["metadata"]["name"],
        "job": (job["metadata"].get("labels") or {}).get(JOB_LABEL),
        "phase": phase,
        "pods": f"{status.get('ready') or 0}/{job['spec'].get('parallelism', 1)}",
        "created": job["metadata"].get("creationTimestamp"),
    }
