"""Between a run's tries and at its end: what ended the last try, and what is waited for now."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tita.errors import UNCOUNTED
from tita.launch.cluster import Object
from tita.launch.states import (
    Reason,
    condition,
    current_pods,
    epoch,
    is_cancelled,
    is_ending,
    is_over,
    node_is_away,
    terminated,
)
from tita.launch.verdict import culprit_of, has_failed, told_of, why_over

# The Job's controller waits so long after one failed pod, and twice as long after each more.
# https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-backoff-failure-policy
_FIRST_DELAY_S, _LONGEST_DELAY_S = 10.0, 600.0


def next_try(job: Mapping[str, Any] | None, pods: Iterable[Object]) -> Reason | None:
    """What ended the last try while the Job waits to begin the next; None when it does not wait."""
    if job is None or is_over(job) or is_ending(job) or job["spec"].get("suspend"):
        return None
    # A queue that threw the run out and took it in again began it anew: no try is left of before.
    began = (job.get("status") or {}).get("startTime") or ""
    pods = [pod for pod in pods if (pod["metadata"].get("creationTimestamp") or "") >= began]
    newest = current_pods(pods)
    culprit = culprit_of([pod for pod in newest if has_failed(pod)])
    if culprit is None or not all(has_failed(pod) or _has_succeeded(pod) for pod in newest):
        return None
    num_counted, limit = sum(map(_is_counted, pods)), job["spec"].get("backoffLimit", 0)
    if num_counted > ((job.get("status") or {}).get("failed") or 0):
        return None  # The Job's controller has not weighed the last one yet: it may give up.
    count = f"failure {num_counted}, of {limit} allowed" if num_counted else "not counted"
    return Reason(
        key=f"again {culprit['metadata']['name']}",
        text=f"{told_of(culprit)}; the next try begins {_begins(pods)} ({count})",
    )


def lost_pods(job: Mapping[str, Any] | None, pods: Iterable[Object]) -> list[Reason]:
    """What befell some pods while others go on.

    Told are nodes that fell silent, pods that the cluster took, and of those that failed the one
    that tells most.
    """
    if job is None or is_over(job):
        return []
    newest = current_pods(pods)
    by_node: dict[str, list[Object]] = {}
    failed = []
    for pod in newest:
        taken = condition(pod, "DisruptionTarget") and not _has_succeeded(pod)
        if node_is_away(pod) or (taken and not is_ending(job)):
            by_node.setdefault(pod["spec"].get("nodeName") or "", []).append(pod)
        elif has_failed(pod):
            failed.append(pod)
    told = [_loss(node, gone) for node, gone in by_node.items()]
    culprit = culprit_of(failed)
    if culprit and not is_ending(job) and any(terminated(pod) is None for pod in newest):
        told.append(Reason(key=f"ended {culprit['metadata']['name']}", text=told_of(culprit)))
    return told


def why_ending(job: Mapping[str, Any] | None, pods: Iterable[Object]) -> Reason | None:
    """Why a run whose fate is sealed is not over yet; None where no pod keeps it."""
    pods = list(pods)
    if job is None or not is_ending(job) or all(terminated(pod) for pod in pods):
        return None
    seconds = job["spec"]["template"]["spec"].get("terminationGracePeriodSeconds", 30)
    wait = f"its pods have {seconds} s to save and end"
    if is_cancelled(job):
        return Reason(key="cancelling", text=f"cancelled; {wait}")
    if job["metadata"].get("deletionTimestamp"):
        return Reason(key="deleting", text=f"deleted; {wait}")
    if condition(job, "SuccessCriteriaMet"):
        return Reason(key="finishing", text=f"rank 0 is done; {wait}")
    culprit = culprit_of([pod for pod in pods if has_failed(pod)])
    told = f" ({told_of(culprit)})" if culprit else ""
    return Reason(key="failing", text=f"failed: {why_over(job)}{told}; {wait}")


def _loss(node: str, pods: Sequence[Object]) -> Reason:
    first, more = pods[0], len(pods) - 1
    others = f" and {more} more there" if more else ""
    if node_is_away(first):
        # The Job makes no new pod, and is not over, before the old one is known to have ended.
        return Reason(
            key=f"away {node}",
            text=f"node {node}, which runs pod {first['metadata']['name']}{others}, is silent; "
            f"it must come back or, if it is off for good: kubectl delete node {node}",
        )
    names = " ".join(sorted(pod["metadata"]["name"] for pod in pods))
    return Reason(key=f"lost {names}", text=f"{told_of(first)}{others}; a new pod takes its place")


def _begins(pods: Sequence[Object]) -> str:
    """When, as far as the pods that are left tell; never more than the delay: clocks differ."""
    ends = [(_ended_at(pod), has_failed(pod)) for pod in pods]
    succeeded = max((end for end, failed in ends if not failed and end), default=0.0)
    since = [end for end, failed in ends if failed and end > succeeded]
    if not since:
        return f"within {_LONGEST_DELAY_S:.0f} s"
    delay = min(_FIRST_DELAY_S * 2 ** min(len(since) - 1, 10), _LONGEST_DELAY_S)
    left = min(max(since) + delay - time.time(), delay)
    return f"in about {left:.0f} s" if left >= 1.0 else "at any moment"


def _ended_at(pod: Object) -> float:
    """Seconds since 1970, as the Job's controller reckons; 0 where nothing tells.

    Of a pod whose node went nobody saw the end: it counts from when the node fell silent.
    """
    stamp = (terminated(pod) or {}).get("finishedAt")
    if stamp is None and has_failed(pod):
        conditions = (pod.get("status") or {}).get("conditions") or []
        stamp = next(
            (c.get("lastTransitionTime") for c in conditions if c["type"] == "Ready"), None
        )
    return epoch(stamp) if stamp else 0.0


def _is_counted(pod: Object) -> bool:
    ended = terminated(pod) or {}
    excused = condition(pod, "DisruptionTarget") or ended.get("exitCode") in UNCOUNTED
    return has_failed(pod) and not excused


def _has_succeeded(pod: Mapping[str, Any]) -> bool:
    return (pod.get("status") or {}).get("phase") == "Succeeded"
