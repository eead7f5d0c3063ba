"""Kubernetes objects as plain dicts: labels, accessors for Jobs and pods, and watch events."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tita.errors import TitaError

Object = dict[str, Any]

JOB_LABEL = "tita.dev/job"
INSTANCE_LABEL = "app.kubernetes.io/instance"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
JOB_NAME = "batch.kubernetes.io/job-name"
INDEX = "batch.kubernetes.io/job-completion-index"
# Annotations.
GPU_RESOURCE = "tita.dev/gpu-resource"
TRACKERS = "tita.dev/trackers"
"""Experiment trackers that the image of a release has, separated by commas."""
LAUNCH_ID = "tita.dev/launch-id"
MADE_FROM = "tita.dev/template"
CANCELLED = "tita.dev/cancelled"
LAUNCH_OPTIONS = "tita.dev/launch-options"

CONTAINER = "tita"
"""Name of the container that runs the job."""
STARTING_REASONS = ("", "ContainerCreating", "PodInitializing")
"""Waiting reasons of containers that start normally."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListEvent:
    """All objects of a kind, from a list request."""

    kind: str
    items: tuple[Object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchEvent:
    """One object that was added, modified or deleted."""

    kind: str
    item: Object
    deleted: bool = False


def condition(thing: Object | None, kind: str, *, status: str = "True") -> Object | None:
    """The condition of type `kind` if it has this status."""
    for found in ((thing or {}).get("status") or {}).get("conditions") or []:
        if found.get("type") == kind and found.get("status") == status:
            hit: Object = found
            return hit
    return None


def is_cancelled(job: Object) -> bool:
    """Whether `tita jobs cancel` was called; the Job is not over before its pods have ended."""
    return CANCELLED in (job["metadata"].get("annotations") or {})


def is_over(job: Object) -> bool:
    """Whether the Job and its pods have ended."""
    return any(condition(job, kind) for kind in ("Complete", "Failed"))


def is_ending(job: Object) -> bool:
    """Whether the Job's outcome is decided while pods are still terminating."""
    decided = any(condition(job, kind) for kind in ("FailureTarget", "SuccessCriteriaMet"))
    deleted = job["metadata"].get("deletionTimestamp") is not None
    return not is_over(job) and (decided or deleted or is_cancelled(job))


def in_queue(job: Object) -> bool:
    """Whether the Job waits for Kueue's admission."""
    labels = job["metadata"].get("labels") or {}
    return bool(job["spec"].get("suspend") and QUEUE_LABEL in labels)


def ended_at(job: Object | None) -> str | None:
    """When the Job ended; a failed Job has no `completionTime`."""
    ended = condition(job, "Complete") or condition(job, "Failed") or {}
    completed: str | None = ((job or {}).get("status") or {}).get("completionTime")
    return completed or ended.get("lastTransitionTime")


def epoch(timestamp: str) -> float:
    """Seconds since 1970 of an API timestamp."""
    return datetime.fromisoformat(timestamp).timestamp()


def rank_of(pod: Object) -> int:
    """The pod's completion index, which is its node rank."""
    for field in ("annotations", "labels"):
        if (index := (pod["metadata"].get(field) or {}).get(INDEX)) is not None:
            return int(index)
    return 0


def container_status(pod: Object) -> Object:
    """The status of the job's container; empty before the kubelet reports it."""
    for status in (pod.get("status") or {}).get("containerStatuses") or []:
        if status.get("name") == CONTAINER:
            found: Object = status
            return found
    return {}


def terminated(pod: Object) -> Object | None:
    """`exitCode`, `reason` and `message` of the container if it has terminated."""
    return (container_status(pod).get("state") or {}).get("terminated")


def has_started(pod: Object) -> bool:
    """Whether the container runs, or has run: it may have a log."""
    status = container_status(pod)
    states = {**(status.get("state") or {}), **(status.get("lastState") or {})}
    return bool(status.get("restartCount") or "running" in states or "terminated" in states)


def has_failed(pod: Object) -> bool:
    """Whether the pod or its container ended with a failure."""
    ended = terminated(pod)
    return (pod.get("status") or {}).get("phase") == "Failed" or bool(ended and ended["exitCode"])


def current_pods(pods: Iterable[Object]) -> list[Object]:
    """The newest pod of each rank; older pods are failed attempts."""
    newest: dict[int, Object] = {}
    for pod in sorted(pods, key=lambda pod: pod["metadata"].get("creationTimestamp") or ""):
        newest[rank_of(pod)] = pod
    return [newest[rank] for rank in sorted(newest)]


def node_is_lost(pod: Object) -> bool:
    """Whether the node stopped reporting.

    The node lifecycle controller then sets only `Ready` to False, without a reason; a kubelet sets
    `ContainersReady`, too.
    """
    status = pod.get("status") or {}
    if status.get("phase") != "Running":
        return False
    found = {c["type"]: c for c in status.get("conditions") or []}
    ready, containers = found.get("Ready", {}), found.get("ContainersReady", {})
    silent = ready.get("status") == "False" and not ready.get("reason")
    return silent and containers.get("status") == "True" and terminated(pod) is None


def main_container(pod_template: Object) -> Object:
    """The container that runs the job."""
    for container in pod_template["spec"]["containers"]:
        if container["name"] == CONTAINER:
            found: Object = container
            return found
    raise TitaError(
        f"the template has no container {CONTAINER!r}", remedy="upgrade the release's chart"
    )


def plain_environment(container: Object) -> dict[str, str]:
    """Environment variables with literal values."""
    return {e["name"]: e["value"] for e in container.get("env") or [] if "value" in e}
