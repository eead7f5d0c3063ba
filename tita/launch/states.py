"""What Job and pod objects say, in our words; pure functions on plain dicts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from tita.launch.cluster import Object
from tita.launch.template import CANCELLED, CONTAINER, QUEUE_LABEL
from tita.records import TrainProgress

INDEX = "batch.kubernetes.io/job-completion-index"
JOB_NAME = "batch.kubernetes.io/job-name"


class Phase(StrEnum):
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


OVER = (Phase.DONE, Phase.FAILED, Phase.CANCELLED, Phase.DELETED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One pod, or with `--local` one process that stands for a node."""

    name: str
    rank: int
    state: str
    node: str = ""
    restarts: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """One cause of a wait, told once: `key` stays the same while only numbers change."""

    key: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that there is to say of a run at one moment."""

    run: str
    job: str
    phase: Phase
    workers: Sequence[Worker] = ()
    progress: TrainProgress | None = None
    elapsed_s: float = 0.0
    reasons: Sequence[Reason] = ()


def condition(thing: Mapping[str, Any] | None, kind: str) -> Object | None:
    """The condition of this type that holds, else None."""
    for found in ((thing or {}).get("status") or {}).get("conditions") or []:
        if found.get("type") == kind and found.get("status") == "True":
            hit: Object = found
            return hit
    return None


def is_cancelled(job: Mapping[str, Any]) -> bool:
    """Whether somebody asked for its end; until its pods are gone it is not over."""
    return CANCELLED in (job["metadata"].get("annotations") or {})


def is_over(job: Mapping[str, Any]) -> bool:
    """Whether the Job has ended, its pods with it."""
    return any(condition(job, kind) for kind in ("Complete", "Failed"))


def is_ending(job: Mapping[str, Any]) -> bool:
    """Whether its fate is sealed, and only pods that still end keep it from being over."""
    decided = any(condition(job, kind) for kind in ("FailureTarget", "SuccessCriteriaMet"))
    leaving = job["metadata"].get("deletionTimestamp") is not None
    return not is_over(job) and (decided or leaving or is_cancelled(job))


def in_queue(job: Mapping[str, Any]) -> bool:
    """Whether Kueue holds it back."""
    held = job["spec"].get("suspend") and QUEUE_LABEL in (job["metadata"].get("labels") or {})
    return bool(held)


def ended_at(job: Mapping[str, Any] | None) -> str | None:
    """When the Job ended; one that failed has no `completionTime`."""
    ended = condition(job, "Complete") or condition(job, "Failed") or {}
    done: str | None = ((job or {}).get("status") or {}).get("completionTime")
    return done or ended.get("lastTransitionTime")


def epoch(stamp: str) -> float:
    """Seconds since 1970 of a time as the API writes it."""
    return datetime.fromisoformat(stamp).timestamp()


def rank_of(pod: Mapping[str, Any]) -> int:
    """Completion index of the pod: the rank of its node."""
    metadata = pod["metadata"]
    for place in ("annotations", "labels"):
        if (index := (metadata.get(place) or {}).get(INDEX)) is not None:
            return int(index)
    return 0


def container_status(pod: Mapping[str, Any]) -> Object:
    """The status of the container that does the work; empty before the kubelet has seen it."""
    for status in (pod.get("status") or {}).get("containerStatuses") or []:
        if status.get("name") == CONTAINER:
            found: Object = status
            return found
    return {}


def terminated(pod: Mapping[str, Any]) -> Object | None:
    """How the container ended, if it did: `exitCode`, `reason`, `message`."""
    state = container_status(pod).get("state") or {}
    return state.get("terminated")


def current_pods(pods: Iterable[Object]) -> list[Object]:
    """The newest pod of each rank: older ones are attempts that failed."""
    newest: dict[int, Object] = {}
    for pod in sorted(pods, key=lambda p: p["metadata"].get("creationTimestamp") or ""):
        newest[rank_of(pod)] = pod
    return [newest[rank] for rank in sorted(newest)]


def workers_of(pods: Iterable[Object], *, pulling: frozenset[str] = frozenset()) -> list[Worker]:
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
            Worker(
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
    if node_is_away(pod):
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
    workers: Sequence[Worker],
    *,
    progress: TrainProgress | None = None,
    retrying: bool = False,
) -> Phase:
    """How far the run is: as far as its slowest pod; `retrying` between two tries."""
    if job is None:
        return Phase.DELETED
    if condition(job, "Complete"):
        return Phase.DONE
    if condition(job, "Failed"):
        return Phase.CANCELLED if is_cancelled(job) else Phase.FAILED
    if is_ending(job):
        return Phase.CANCELLING if is_cancelled(job) else Phase.ENDING
    if job["spec"].get("suspend"):
        return Phase.QUEUED
    if retrying:
        return Phase.RETRYING
    states = {worker.state for worker in workers}
    if len(workers) < job["spec"].get("parallelism", 1) or "pending" in states:
        return Phase.SCHEDULING
    if "pulling" in states:
        return Phase.PULLING
    if states & {"starting", "stuck"}:
        return Phase.STARTING
    if progress is None:
        return Phase.RUNNING
    return Phase.TRAINING if progress.step < progress.steps else Phase.UPLOADING


def _scheduled(pod: Mapping[str, Any]) -> bool:
    return bool((pod.get("spec") or {}).get("nodeName") or condition(pod, "PodScheduled"))


def node_is_away(pod: Mapping[str, Any]) -> bool:
    """Whether the node's own controller, not its kubelet, says that the pod is not ready.

    It changes `Ready` alone, and gives no reason.
    """
    status = pod.get("status") or {}
    if status.get("phase") != "Running":
        return False
    found = {c["type"]: c for c in status.get("conditions") or []}
    ready, containers = found.get("Ready", {}), found.get("ContainersReady", {})
    silent = ready.get("status") == "False" and not ready.get("reason")
    return silent and containers.get("status") == "True" and terminated(pod) is None
