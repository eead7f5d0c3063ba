"""The release's own pods, the embedded store and inference: whether they stand, and if not, why."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tita.launch.cluster import ApiError, Cluster, Object
from tita.launch.preflight import Finding, Mark
from tita.launch.states import condition
from tita.launch.template import INSTANCE_LABEL
from tita.launch.waiting import CLAIM_EVENTS, remedy_for
from tita.terminal import counted

COMPONENTS = STORE, INFERENCE = "s3", "inference"
_COMPONENT = "app.kubernetes.io/component"
# Where the chart's values speak of the claim of each.
_PERSISTENCE = {STORE: "s3.embedded.persistence", INFERENCE: "inference.cache.persistence"}
_NAMES = {STORE: "embedded store", INFERENCE: "inference"}
_USUAL = ("", "ContainerCreating", "PodInitializing")


def check_standing(cluster: Cluster, release: str, component: str) -> Finding:
    """Whether a pod of this component is ready; it may also be no part of the release."""
    check = _NAMES[component]
    selector = f"{INSTANCE_LABEL}={release},{_COMPONENT}={component}"
    try:
        pods, _ = cluster.list(cluster.path("pods"), labelSelector=selector)
        num_ready = sum(condition(pod, "Ready") is not None for pod in pods)
        if not pods:
            return Finding(check=check, mark=Mark.OK, text="no part of the release")
        if num_ready:
            return Finding(check=check, mark=Mark.OK, text=f"{num_ready} of {len(pods)} pods ready")
        events, _ = cluster.list(cluster.path("events"))
    except ApiError as error:
        if error.status != 403:
            raise
        return Finding(check=check, mark=Mark.UNKNOWN, text="no right to look")
    for pod in pods:
        if words := _claim_words(cluster, pod, events):
            remedy = _claim_remedy(words, _PERSISTENCE[component])
            return Finding(check=check, mark=Mark.BAD, text=words, remedy=remedy)
        if words := _pod_words(pod):
            text = f"pod {pod['metadata']['name']}: {words}"
            return Finding(check=check, mark=Mark.BAD, text=text, remedy=remedy_for(words))
    name = pods[0]["metadata"]["name"]
    return Finding(check=check, mark=Mark.UNKNOWN, text=f"pod {name} still starts")


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
            " ".join(str(event.get("message", "")).split())
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
    for found in status.get("conditions") or []:
        if found["type"] == "PodScheduled" and found["status"] == "False":
            return " ".join(str(found.get("message") or "not scheduled").split())
    for container in status.get("containerStatuses") or []:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason", "") not in _USUAL:
            return ": ".join(filter(None, (waiting["reason"], waiting.get("message"))))
        last = (container.get("lastState") or {}).get("terminated")
        if last:
            times = counted(container["restartCount"], "restart")
            return f"{times}, the last after exit code {last['exitCode']}"
    return ""
