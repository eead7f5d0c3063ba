"""Why a run waits, and what ended its attempts."""

import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tita.launch.objects import (
    CONTAINER,
    QUEUE_LABEL,
    STARTING_REASONS,
    Object,
    condition,
    container_status,
    current_pods,
    has_failed,
    is_cancelled,
    is_ending,
    is_over,
    node_is_lost,
    terminated,
)
from tita.launch.outcome import describe_pod_end, failure_reason, root_cause_pod
from tita.launch.remedies import one_line, remedy_for
from tita.launch.tries import (
    allowed_tries,
    describe_tries,
    ended_at_s,
    incidents_of,
    is_counted_by_job,
)
from tita.terminal import counted

# Events of a claim; the scheduler, which waits for the claim, does not repeat them.
CLAIM_EVENTS = ("FailedBinding", "ProvisioningFailed")
_VOLUME_EVENTS = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")
# The Job controller's delay after the first failed pod, doubled for each further one.
# https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-backoff-failure-policy
_FIRST_DELAY_S, _LONGEST_DELAY_S = 10.0, 600.0
_SIDECAR_S = 60.0
"""A sidecar that knows when a pod ends takes less; clocks may differ a little, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReason:
    """A message about a run. `key` stays the same while only numbers in the text change."""

    key: str
    text: str


# Waiting.


def waiting_reasons(
    job: Object | None,
    pods: Iterable[Object],
    events: Iterable[Object],
    *,
    workload: Object | None = None,
    position: int | None = None,
) -> list[RunReason]:
    """What keeps the run from starting; pods with the same cause share one reason.

    Args:
        job: the Job, None if it was deleted.
        pods: its pods.
        events: events of the Job, its pods and their claims, oldest first.
        workload: Kueue's Workload of the Job.
        position: the workload's position in its queue.
    """
    if job is None:
        return []
    if job["spec"].get("suspend"):
        return [_queue_reason(job, workload, position)]
    pods, events = list(pods), list(events)
    found = []
    if len(pods) < job["spec"].get("parallelism", 1):
        creates = [
            event["message"]
            for event in events
            if event.get("reason") == "FailedCreate"
            and event["involvedObject"].get("kind") == "Job"
            and event["involvedObject"].get("name") == job["metadata"]["name"]
        ]
        found += [_reason(message) for message in creates[-1:]]
    counts = Counter(filter(None, (_pod_message(pod, events) for pod in pods)))
    for message, count in counts.items():
        subject = "a pod waits" if count == 1 else f"{count} pods wait"
        found.append(_reason(message, subject=subject))
    return found


def queue_position(workload: Object, others: Iterable[Object]) -> int | None:
    """The workload's position among the waiting ones of its queue, from 1; None if admitted.

    Kueue orders by priority, then by age.
    """
    queue = workload["spec"].get("queueName")
    admitted = ("QuotaReserved", "Admitted", "Finished")
    waiting = sorted(
        (
            -(other["spec"].get("priority") or 0),
            other["metadata"]["creationTimestamp"],
            other["metadata"]["name"],
        )
        for other in others
        if other["spec"].get("queueName") == queue
        and not any(condition(other, kind) for kind in admitted)
    )
    names = [name for _, _, name in waiting]
    name = workload["metadata"]["name"]
    return names.index(name) + 1 if name in names else None


def _queue_reason(job: Object, workload: Object | None, position: int | None) -> RunReason:
    queue = (job["metadata"].get("labels") or {}).get(QUEUE_LABEL)
    if not queue:
        return _reason(
            "the Job is suspended and in no queue",
            remedy=f"resume it with `{{kubectl}} patch job {job['metadata']['name']} --patch "
            """'{"spec": {"suspend": false}}'`""",
        )
    where = f"waits in queue {queue}" + (f" at position {position}" if position else "")
    # Why it was evicted, and why it is not admitted: https://kueue.sigs.k8s.io/docs/concepts/workload
    conditions = (
        condition(workload, kind, status=status) or {}
        for kind, status in (("Evicted", "True"), ("QuotaReserved", "False"))
    )
    messages = (
        " ".join(str(c.get("message") or c.get("reason") or "").split()) for c in conditions
    )
    unique = dict.fromkeys(filter(None, messages))
    # A new position is a new reason; other amounts of missing quota are not.
    key = where + re.sub(r"\d+", "#", " ".join(unique))
    return RunReason(key=key, text=": ".join([where, *unique]))


def _pod_message(pod: Object, events: Sequence[Object]) -> str:
    """Why a pod is pending, in the cluster's words; empty if it starts normally."""
    if (pod.get("status") or {}).get("phase") not in (None, "Pending"):
        return ""
    name = pod["metadata"]["name"]
    if unscheduled := condition(pod, "PodScheduled", status="False"):
        message = unscheduled.get("message") or unscheduled.get("reason") or "not scheduled yet"
        claim = _claim_message(name, events) if "PersistentVolumeClaim" in message else ""
        return claim or str(message)
    waiting = (container_status(pod).get("state") or {}).get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason not in STARTING_REASONS:
        return f"{reason}: {message}" if message else str(reason)
    for event in reversed(events):
        if event["involvedObject"].get("name") == name and event.get("reason") in _VOLUME_EVENTS:
            return f"{event['reason']}: {event.get('message', '')}"
    return ""


def _claim_message(pod: str, events: Sequence[Object]) -> str:
    """Why an ephemeral claim, which is named after its pod, is not bound."""
    for event in reversed(events):
        about = event["involvedObject"]
        claim = about.get("name") or ""
        if about.get("kind") == "PersistentVolumeClaim" and claim.startswith(f"{pod}-"):
            volume = claim.removeprefix(f"{pod}-")
            return f"no volume for its {volume}: {event.get('message', '')}"
    return ""


def _reason(message: str, *, subject: str = "", remedy: str | None = None) -> RunReason:
    message = one_line(message)
    # Counts of back-offs, retries and nodes change all the time, as do names of refused pods.
    key = re.sub(r"\d+", "#", re.sub(r'pods "[^"]*"', "a pod", message))
    remedy = remedy_for(message) if remedy is None else remedy
    text = f"{subject}: {message}" if subject else message
    return RunReason(key=key, text=f"{text}; {remedy}" if remedy else text)


# Between attempts, and while pods terminate.


def retry_reason(job: Object | None, pods: Iterable[Object]) -> RunReason | None:
    """What ended the last attempt, while the Job waits to start the next one; else None."""
    if job is None or is_over(job) or is_ending(job) or job["spec"].get("suspend"):
        return None
    # Kueue resets the retries of a run that it evicts and admits again.
    status = job.get("status") or {}
    started = status.get("startTime") or ""
    pods = [pod for pod in pods if (pod["metadata"].get("creationTimestamp") or "") >= started]
    newest = current_pods(pods)
    cause = root_cause_pod([pod for pod in newest if has_failed(pod)])
    if cause is None or not all(has_failed(pod) or _has_succeeded(pod) for pod in newest):
        return None
    if sum(map(is_counted_by_job, pods)) > (status.get("failed") or 0):
        return None  # the Job controller has not processed the last failure: it may give up
    used = describe_tries(incidents_of(pods), allowed=allowed_tries(job))
    return RunReason(
        key=f"retry {cause['metadata']['name']}",
        text=f"{describe_pod_end(cause)}; the next attempt starts {_retry_time(pods)} ({used})",
    )


def disruption_reasons(job: Object | None, pods: Iterable[Object]) -> list[RunReason]:
    """Pods that were lost while others continue: per lost node, and the root cause of failures."""
    if job is None or is_over(job):
        return []
    newest, ending = current_pods(pods), is_ending(job)
    by_node: dict[str, list[Object]] = {}
    failed = []
    for pod in newest:
        evicted = condition(pod, "DisruptionTarget") and not _has_succeeded(pod)
        if node_is_lost(pod) or (evicted and not ending):
            by_node.setdefault(pod["spec"].get("nodeName") or "", []).append(pod)
        elif has_failed(pod):
            failed.append(pod)
    found = [_disruption(node, lost) for node, lost in by_node.items()]
    cause = root_cause_pod(failed)
    if cause and not ending and any(terminated(pod) is None for pod in newest):
        key = f"ended {cause['metadata']['name']}"
        found.append(RunReason(key=key, text=describe_pod_end(cause)))
    return found


def termination_reason(job: Object | None, pods: Iterable[Object]) -> RunReason | None:
    """Why a run whose outcome is decided is not over yet; None if no pod is left."""
    pods = list(pods)
    if job is None or not is_ending(job) or all(terminated(pod) for pod in pods):
        return None
    seconds = job["spec"]["template"]["spec"].get("terminationGracePeriodSeconds", 30)
    wait = f"its pods have {seconds} s to save and exit"
    if is_cancelled(job):
        return RunReason(key="cancelling", text=f"cancelled; {wait}")
    if job["metadata"].get("deletionTimestamp"):
        return RunReason(key="deleting", text=f"deleted; {wait}")
    if condition(job, "SuccessCriteriaMet"):
        return RunReason(key="finishing", text=f"rank 0 is done; {wait}")
    cause = root_cause_pod([pod for pod in pods if has_failed(pod)])
    detail = f" ({describe_pod_end(cause)})" if cause else ""
    return RunReason(key="failing", text=f"failed: {failure_reason(job)}{detail}; {wait}")


def sidecar_reasons(job: Object | None, pods: Iterable[Object]) -> list[RunReason]:
    """Containers that a service mesh added, and that keep pods of the run from ending."""
    if job is None or is_over(job):
        return []
    kept: dict[str, list[str]] = {}
    for pod in pods:
        status = pod.get("status") or {}
        since = ended_at_s(pod) if terminated(pod) else 0.0
        if not since or status.get("phase") != "Running" or time.time() - since < _SIDECAR_S:
            continue
        for container in status.get("containerStatuses") or []:
            if container["name"] != CONTAINER and "running" in (container.get("state") or {}):
                kept.setdefault(container["name"], []).append(pod["metadata"]["name"])
    return [
        RunReason(
            key=f"sidecar {name}",
            text=f"the job's container has ended, and the container {name} keeps "
            f"{counted(len(names), 'pod')} running ({names[0]}), so that the run neither ends nor "
            "is retried; cancel it, and disable sidecars in jobs.podLabels of the release's values "
            '(Istio: sidecar.istio.io/inject: "false")',
        )
        for name, names in kept.items()
    ]


def _disruption(node: str, pods: Sequence[Object]) -> RunReason:
    first, others = pods[0], len(pods) - 1
    more = f" and {others} more there" if others else ""
    if node_is_lost(first):
        # The Job creates no new pod, and is not over, before the old one is known to have ended.
        return RunReason(
            key=f"lost node {node}",
            text=f"node {node}, which runs pod {first['metadata']['name']}{more}, does not report; "
            f"if it will not come back: {{kubectl}} delete node {node}",
        )
    names = " ".join(sorted(pod["metadata"]["name"] for pod in pods))
    return RunReason(key=f"lost {names}", text=f"{describe_pod_end(first)}{more}; it is replaced")


def _retry_time(pods: Sequence[Object]) -> str:
    """When the next attempt starts at the latest, from the remaining pods; clocks may differ.

    The delay doubles for each failed pod since the last success. Failures that the Job ignores
    count only if the controller sees them together with others, which nobody else can know.
    """
    ends = [(ended_at_s(pod), has_failed(pod)) for pod in pods]
    succeeded = max((end for end, failed in ends if not failed and end), default=0.0)
    since = [end for end, failed in ends if failed and end > succeeded]
    if not since:
        return f"within {_LONGEST_DELAY_S:.0f} s"
    delay = min(_FIRST_DELAY_S * 2 ** min(len(since) - 1, 10), _LONGEST_DELAY_S)
    left = min(max(since) + delay - time.time(), delay)
    return f"within {left:.0f} s" if left >= 1.0 else "at any moment"


def _has_succeeded(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") == "Succeeded"
