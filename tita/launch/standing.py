"""The release's own pods, the embedded store and inference: whether they stand, and if not, why."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tita.launch.cluster import ApiError, Cluster, Object
from tita.launch.preflight import Finding, Mark
from tita.launch.states import condition, node_is_away
from tita.launch.template import INSTANCE_LABEL
from tita.launch.waiting import CLAIM_EVENTS, plain, remedy_for
from tita.terminal import counted

COMPONENTS = STORE, INFERENCE = "s3", "inference"
_COMPONENT = "app.kubernetes.io/component"
# Where the chart's values speak of each.
_VALUES = {STORE: "s3.embedded", INFERENCE: "inference"}
_CLAIM_VALUES = {STORE: "s3.embedded.persistence", INFERENCE: "inference.cache.persistence"}
_NAMES = {STORE: "embedded store", INFERENCE: "inference"}
_USUAL = ("", "ContainerCreating", "PodInitializing")


def check_standing(cluster: Cluster, release: str, component: str) -> Finding:
    """Whether the pods of this component are ready; it may also be no part of the release.

    It stands on one ready pod: what keeps others is told, but marked as unknown.
    """
    check = _NAMES[component]
    selector = f"{INSTANCE_LABEL}={release},{_COMPONENT}={component}"
    try:
        found, _ = cluster.list(cluster.path("pods"), labelSelector=selector)
        pods = [pod for pod in found if _counts(pod)]
        waiting = [pod for pod in pods if not condition(pod, "Ready")]
        events = cluster.list(cluster.path("events"))[0] if waiting else []
    except ApiError as error:
        if error.status != 403:
            raise
        return Finding(check=check, mark=Mark.UNKNOWN, text="no right to look")
    if not pods:
        return Finding(check=check, mark=Mark.OK, text="no part of the release")
    ready = f"{len(pods) - len(waiting)} of {counted(len(pods), 'pod')} ready"
    if not waiting:
        return Finding(check=check, mark=Mark.OK, text=ready)
    mark = Mark.BAD if len(waiting) == len(pods) else Mark.UNKNOWN
    for pod in waiting:
        if words := _claim_words(cluster, pod, events):
            remedy = _claim_remedy(words, _CLAIM_VALUES[component])
            return Finding(check=check, mark=mark, text=f"{ready}: {words}", remedy=remedy)
        if words := _pod_words(pod):
            text = f"{ready}: {pod['metadata']['name']}: {words}"
            return Finding(check=check, mark=mark, text=text, remedy=_remedy(words, component))
    return Finding(check=check, mark=Mark.UNKNOWN, text=f"{ready} so far")


def _counts(pod: Mapping[str, Any]) -> bool:
    """Not one that leaves, nor one that was evicted and only lies there."""
    over = (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded")
    return not over and not pod["metadata"].get("deletionTimestamp")


def _remedy(words: str, component: str) -> str:
    if component == INFERENCE and re.search(r"Insufficient \S*gpu", words):
        return "free a GPU, or let upgrades end the old pod first: inference.strategy.type=Recreate"
    return remedy_for(words).replace("jobs.", f"{_VALUES[component]}.")


def _claim_words(cluster: Cluster, pod: Mapping[str, Any], events: Iterable[Object]) -> str:
    """What keeps a claim of the pod from being bound, in the cluster's words."""
    for volume in pod["spec"].get("volumes") or []:
        name = (volume.get("persistentVolumeClaim") or {}).get("claimName")
        if not name:
            continue
        try:
            claim = cluster.get(cluster.path("persistentvolumeclaims", name))
        except ApiError as error:
            if error.status == 404:
                return f"there is no claim {name!r}"
            continue
        if (claim.get("status") or {}).get("phase") != "Pending":
            continue
        told = [
            plain(str(event.get("message", "")))
            for event in sorted(events, key=lambda event: event.get("lastTimestamp") or "")
            if event["involvedObject"].get("kind") == "PersistentVolumeClaim"
            and event["involvedObject"].get("name") == name
            and event.get("reason") in CLAIM_EVENTS
        ]
        if told:
            return f"claim {name} is not bound: {told[-1]}"
        if not claim["spec"].get("storageClassName"):
            return f"claim {name} is not bound: no storage class is set, and none is the default"
    return ""


def _claim_remedy(words: str, value: str) -> str:
    if "no claim" in words:
        return f"make it, or mend {value}.existingClaim"
    if re.search(r"no storage class|storageclass\S* \S+ not found", words):
        known = "one of `kubectl get storageclass`"
        return f"name {known} in {value}.storageClass, or set {value}.enabled=false"
    return f"see `kubectl describe pvc`; {value} in the release's values chooses class and size"


def _pod_words(pod: Mapping[str, Any]) -> str:
    """What is wrong with a pod; empty while it only takes its time."""
    status = pod.get("status") or {}
    if node_is_away(pod):
        return f"node {pod['spec'].get('nodeName')} is silent"
    for found in status.get("conditions") or []:
        if found["type"] == "PodScheduled" and found["status"] == "False":
            return plain(str(found.get("message") or "not scheduled"))
    for container in status.get("containerStatuses") or []:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason", "") not in _USUAL:
            return ": ".join(filter(None, (waiting["reason"], waiting.get("message"))))
        last = (container.get("lastState") or {}).get("terminated")
        if last:
            times = counted(container["restartCount"], "restart")
            return f"{times}, the last after exit code {last['exitCode']}"
    return ""
