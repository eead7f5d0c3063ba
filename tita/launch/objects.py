"""Kubernetes objects as plain dicts: tita's labels, accessors for Jobs and pods, change events."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tita.errors import TitaError

Object = dict[str, Any]


JOB_LABEL = "tita.dev/job"


INSTANCE_LABEL = "app.kubernetes.io/instance"


QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


GPU_ANNOTATION = "tita.dev/gpu-resource"


LAUNCHED_BY = "tita.dev/launch-id"


MADE_FROM = "tita.dev/template"


CANCELLED = "tita.dev/cancelled"


CONTAINER = "tita"


INDEX = "batch.kubernetes.io/job-completion-index"


JOB_NAME = "batch.kubernetes.io/job-name"


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


def node_is_lost(pod: Mapping[str, Any]) -> bool:
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


def has_failed(pod: Mapping[str, Any]) -> bool:
    """Whether it ended, and not well."""
    ended = terminated(pod)
    return (pod.get("status") or {}).get("phase") == "Failed" or bool(ended and ended["exitCode"])


def main_container(pod_template: Mapping[str, Any]) -> Object:
    """The container that does the work."""
    containers: Sequence[Object] = pod_template["spec"]["containers"]
    for container in containers:
        if container["name"] == CONTAINER:
            return container
    raise TitaError(
        f"the template has no container {CONTAINER!r}", remedy="upgrade the release's chart"
    )


def plain_environment(container: Mapping[str, Any]) -> dict[str, str]:
    """Variables with plain values."""
    return {e["name"]: e["value"] for e in container.get("env") or [] if "value" in e}


@dataclass(frozen=True, slots=True, kw_only=True)
class ListEvent:
    """All there is, as of now."""

    kind: str
    items: tuple[Object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchEvent:
    """One object came, changed or went."""

    kind: str
    item: Object
    gone: bool = False
