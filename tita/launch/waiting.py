"""Why a run waits: the cluster's own words, and what to do about them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tita.launch.cluster import Object
from tita.launch.states import Reason, container_status
from tita.launch.template import QUEUE_LABEL

# The first pattern that is found in the cluster's words chooses the remedy.
_REMEDIES = (
    (r"unbound immediate PersistentVolumeClaims|persistentvolumeclaim \S+ not found",
     "see `kubectl get pvc`; check the storage class in the release's values"),
    (r"no storage class is set|storageclass\S* \S+ not found",
     "name one of `kubectl get storageclass` in the release's values"),
    (r"EmptyDir volume \"shm\"", "raise jobs.shmSize in the release's values"),
    (r"EmptyDir volume \"(scratch|cache)\"", "raise its size under jobs in the release's values"),
    (r"low on resource: ephemeral-storage",
     "name a storage class in jobs.scratch and jobs.cache, or take nodes with larger disks"),
    (r"low on resource: memory",
     "raise jobs.resources.requests.memory in the release's values: nodes are filled by requests"),
    (r"Insufficient \S*(gpu|rdma)", "ask for fewer with --gpus, or wait until others are done"),
    (r"Insufficient (cpu|memory|ephemeral-storage)",
     "wait, or lower jobs.resources in the release's values"),
    (r"untolerated taint", "add the taint to jobs.tolerations in the release's values"),
    (r"didn't match Pod's node affinity/selector", "check jobs.nodeSelector and jobs.affinity"),
    (r"exceeded quota", "ask for less, or have the namespace's ResourceQuota raised"),
    (r"failed quota: .*must specify",
     "set them in jobs.resources in the release's values, as the namespace's quota demands"),
    (r"(maximum|minimum) \S+ usage per|limit to request ratio",
     "fit jobs.resources in the release's values to the namespace's LimitRange"),
    (r"violates PodSecurity", "check jobs' security values, or the namespace's Pod Security level"),
    (r"serviceaccount \S+ not found", "set serviceAccount.create, or make the account"),
    (r"secret \S+ not found", "create the secret, or mend its name in the release's values"),
    (r"configmap \S+ not found", "create the ConfigMap, or mend its name in the values"),
    (r"InvalidImageName", "mend --image, or image.* in the release's values"),
    (r"unauthorized|denied|authentication required|no basic auth",
     "check imagePullSecrets in the release's values"),
    (r"manifest unknown|not found|NotFound", "check that the image and its tag exist"),
    (r"ErrImage|ImagePullBackOff", "check the image, the registry and imagePullSecrets"),
    (r"Failed(Mount|AttachVolume)", "see `kubectl describe pod`; check the volumes in the values"),
)  # fmt: skip

# Of these the scheduler, which waits for the claim, says nothing.
CLAIM_EVENTS = ("FailedBinding", "ProvisioningFailed")
_STUCK_EVENTS = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")
_USUAL = ("ContainerCreating", "PodInitializing", "")


def why_waiting(
    job: Mapping[str, Any] | None,
    pods: Iterable[Object],
    events: Iterable[Object],
    *,
    workload: Mapping[str, Any] | None = None,
    position: int | None = None,
) -> list[Reason]:
    """All that keeps the run from starting, pods with the same trouble told together."""
    if job is None:
        return []
    if job["spec"].get("suspend"):
        return [_why_queued(job, workload, position)]
    pods, events = list(pods), list(events)
    found = []
    if len(pods) < job["spec"].get("parallelism", 1):
        found += [_reason(e["message"]) for e in _failed_creates(job, events)[-1:]]
    counts: dict[str, int] = {}
    for pod in pods:
        if words := _pod_words(pod, events):
            counts[words] = counts.get(words, 0) + 1
    for words, count in counts.items():
        who = "a pod waits" if count == 1 else f"{count} pods wait"
        found.append(_reason(words, who=who))
    return found


def remedy_for(words: str) -> str:
    """What to do about these words of the cluster; empty if nothing is known."""
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, words):
            return remedy
    return ""


def plain(words: str) -> str:
    """In one line, without what the scheduler adds of its search for victims."""
    words = " ".join(words.split()).partition(" preemption: ")[0]
    return words.removesuffix(" no new claims to deallocate,").rstrip(".")


def queue_position(workload: Mapping[str, Any], others: Iterable[Object]) -> int | None:
    """The workload's place among those of its queue that wait, 1 being next; None if it runs.

    Kueue orders by priority, then by age.
    """
    name = workload["metadata"]["name"]
    queue = workload["spec"].get("queueName")
    waiting = [
        (-(other["spec"].get("priority") or 0), other["metadata"]["creationTimestamp"], other_name)
        for other in others
        if other["spec"].get("queueName") == queue and not _admitted(other)
        if (other_name := other["metadata"]["name"])
    ]
    names = [entry[2] for entry in sorted(waiting)]
    return names.index(name) + 1 if name in names else None


def _admitted(workload: Mapping[str, Any]) -> bool:
    conditions = (workload.get("status") or {}).get("conditions") or []
    return any(
        c["type"] in ("QuotaReserved", "Admitted", "Finished") and c["status"] == "True"
        for c in conditions
    )


def _why_queued(
    job: Mapping[str, Any], workload: Mapping[str, Any] | None, position: int | None
) -> Reason:
    queue = (job["metadata"].get("labels") or {}).get(QUEUE_LABEL)
    if not queue:
        return _reason(
            "the Job is suspended and in no queue", remedy="resume it with kubectl patch"
        )
    where = f"waits in queue {queue}" + (f" at position {position}" if position else "")
    told = dict.fromkeys(filter(None, (_condition_words(workload, kind) for kind in _KUEUE_TELLS)))
    text = ": ".join([where, *told])
    # A new place in the queue is news; other amounts of what is lacking are none.
    return Reason(key=where + re.sub(r"\d+", "#", " ".join(told)), text=text)


# https://kueue.sigs.k8s.io/docs/concepts/workload/ : why it is out, and why it is not in yet.
_KUEUE_TELLS: Mapping[str, str] = {"Evicted": "True", "QuotaReserved": "False"}


def _condition_words(workload: Mapping[str, Any] | None, kind: str) -> str:
    for found in ((workload or {}).get("status") or {}).get("conditions") or []:
        if found["type"] == kind and found["status"] == _KUEUE_TELLS[kind]:
            return " ".join(str(found.get("message") or found.get("reason") or "").split())
    return ""


def _failed_creates(job: Mapping[str, Any], events: Iterable[Object]) -> list[Object]:
    return [
        event
        for event in events
        if event.get("reason") == "FailedCreate"
        and event["involvedObject"].get("kind") == "Job"
        and event["involvedObject"].get("name") == job["metadata"]["name"]
    ]


def _pod_words(pod: Mapping[str, Any], events: Iterable[Object]) -> str:
    status = pod.get("status") or {}
    if status.get("phase") not in (None, "Pending"):
        return ""
    for found in status.get("conditions") or []:
        if found["type"] == "PodScheduled" and found["status"] == "False":
            words = str(found.get("message") or found.get("reason") or "not scheduled yet")
            return (_claim_words(pod, events) if "PersistentVolumeClaim" in words else "") or words
    waiting = (container_status(pod).get("state") or {}).get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason not in _USUAL:
        return f"{reason}: {message}" if message else str(reason)
    for event in reversed(list(events)):
        named = event["involvedObject"].get("name") == pod["metadata"]["name"]
        if named and event.get("reason") in _STUCK_EVENTS:
            return f"{event['reason']}: {event.get('message', '')}"
    return ""


def _claim_words(pod: Mapping[str, Any], events: Iterable[Object]) -> str:
    """Why a claim that was made for the pod, and is named after it, is not bound."""
    name = pod["metadata"]["name"]
    for event in reversed(list(events)):
        about = event["involvedObject"]
        claim = about.get("name") or ""
        if about.get("kind") == "PersistentVolumeClaim" and claim.startswith(f"{name}-"):
            volume = claim.removeprefix(f"{name}-")
            return f"no volume for its {volume}: {event.get('message', '')}"
    return ""


def _reason(words: str, *, who: str = "", remedy: str | None = None) -> Reason:
    words = plain(words)
    # Back-off, retry and node counts, and the names of pods that could not be made, change all the
    # time, the cause does not.
    key = re.sub(r"\d+", "#", re.sub(r'pods "[^"]*"', "a pod", words))
    remedy = remedy_for(words) if remedy is None else remedy
    text = f"{who}: {words}" if who else words
    return Reason(key=key, text=f"{text}; {remedy}" if remedy else text)
