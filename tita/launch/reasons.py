"""Why a run waits, what ended its attempts, and how it ended."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tita.errors import UNCOUNTED, ExitCode
from tita.gang.torchrun import decisive_exit_code
from tita.launch.objects import (
    JOB_LABEL,
    QUEUE_LABEL,
    Object,
    condition,
    container_status,
    current_pods,
    epoch,
    has_failed,
    is_cancelled,
    is_ending,
    is_over,
    main_container,
    node_is_lost,
    rank_of,
    terminated,
)
from tita.launch.remedies import describe_exit_code, plain, remedy_for


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReason:
    """One cause of a wait, told once: `key` stays the same while only numbers change."""

    key: str
    text: str


# Of these the scheduler, which waits for the claim, says nothing.
CLAIM_EVENTS = ("FailedBinding", "ProvisioningFailed")


_STUCK_EVENTS = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")


_USUAL = ("ContainerCreating", "PodInitializing", "")


def waiting_reasons(
    job: Mapping[str, Any] | None,
    pods: Iterable[Object],
    events: Iterable[Object],
    *,
    workload: Mapping[str, Any] | None = None,
    position: int | None = None,
) -> list[RunReason]:
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
) -> RunReason:
    queue = (job["metadata"].get("labels") or {}).get(QUEUE_LABEL)
    if not queue:
        return _reason(
            "the Job is suspended and in no queue", remedy="resume it with kubectl patch"
        )
    where = f"waits in queue {queue}" + (f" at position {position}" if position else "")
    told = dict.fromkeys(filter(None, (_condition_words(workload, kind) for kind in _KUEUE_TELLS)))
    text = ": ".join([where, *told])
    # A new place in the queue is news; other amounts of what is lacking are none.
    return RunReason(key=where + re.sub(r"\d+", "#", " ".join(told)), text=text)


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


def _reason(words: str, *, who: str = "", remedy: str | None = None) -> RunReason:
    words = plain(words)
    # Back-off, retry and node counts, and the names of pods that could not be made, change all the
    # time, the cause does not.
    key = re.sub(r"\d+", "#", re.sub(r'pods "[^"]*"', "a pod", words))
    remedy = remedy_for(words) if remedy is None else remedy
    text = f"{who}: {words}" if who else words
    return RunReason(key=key, text=f"{text}; {remedy}" if remedy else text)


# The Job's controller waits so long after one failed pod, and twice as long after each more.
# https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-backoff-failure-policy
_FIRST_DELAY_S, _LONGEST_DELAY_S = 10.0, 600.0


def retry_reason(job: Mapping[str, Any] | None, pods: Iterable[Object]) -> RunReason | None:
    """What ended the last try while the Job waits to begin the next; None when it does not wait."""
    if job is None or is_over(job) or is_ending(job) or job["spec"].get("suspend"):
        return None
    # A queue that threw the run out and took it in again began it anew: no try is left of before.
    began = (job.get("status") or {}).get("startTime") or ""
    pods = [pod for pod in pods if (pod["metadata"].get("creationTimestamp") or "") >= began]
    newest = current_pods(pods)
    culprit = root_cause_pod([pod for pod in newest if has_failed(pod)])
    if culprit is None or not all(has_failed(pod) or _has_succeeded(pod) for pod in newest):
        return None
    num_counted, limit = sum(map(_is_counted, pods)), job["spec"].get("backoffLimit", 0)
    if num_counted > ((job.get("status") or {}).get("failed") or 0):
        return None  # The Job's controller has not weighed the last one yet: it may give up.
    count = f"failure {num_counted}, of {limit} allowed" if num_counted else "not counted"
    return RunReason(
        key=f"again {culprit['metadata']['name']}",
        text=f"{describe_pod_end(culprit)}; the next try begins {_begins(pods)} ({count})",
    )


def disruption_reasons(job: Mapping[str, Any] | None, pods: Iterable[Object]) -> list[RunReason]:
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
        if node_is_lost(pod) or (taken and not is_ending(job)):
            by_node.setdefault(pod["spec"].get("nodeName") or "", []).append(pod)
        elif has_failed(pod):
            failed.append(pod)
    told = [_loss(node, gone) for node, gone in by_node.items()]
    culprit = root_cause_pod(failed)
    if culprit and not is_ending(job) and any(terminated(pod) is None for pod in newest):
        told.append(
            RunReason(key=f"ended {culprit['metadata']['name']}", text=describe_pod_end(culprit))
        )
    return told


def termination_reason(job: Mapping[str, Any] | None, pods: Iterable[Object]) -> RunReason | None:
    """Why a run whose fate is sealed is not over yet; None where no pod keeps it."""
    pods = list(pods)
    if job is None or not is_ending(job) or all(terminated(pod) for pod in pods):
        return None
    seconds = job["spec"]["template"]["spec"].get("terminationGracePeriodSeconds", 30)
    wait = f"its pods have {seconds} s to save and end"
    if is_cancelled(job):
        return RunReason(key="cancelling", text=f"cancelled; {wait}")
    if job["metadata"].get("deletionTimestamp"):
        return RunReason(key="deleting", text=f"deleted; {wait}")
    if condition(job, "SuccessCriteriaMet"):
        return RunReason(key="finishing", text=f"rank 0 is done; {wait}")
    culprit = root_cause_pod([pod for pod in pods if has_failed(pod)])
    told = f" ({describe_pod_end(culprit)})" if culprit else ""
    return RunReason(key="failing", text=f"failed: {failure_reason(job)}{told}; {wait}")


def _loss(node: str, pods: Sequence[Object]) -> RunReason:
    first, more = pods[0], len(pods) - 1
    others = f" and {more} more there" if more else ""
    if node_is_lost(first):
        # The Job makes no new pod, and is not over, before the old one is known to have ended.
        return RunReason(
            key=f"away {node}",
            text=f"node {node}, which runs pod {first['metadata']['name']}{others}, is silent; "
            f"it must come back or, if it is off for good: kubectl delete node {node}",
        )
    names = " ".join(sorted(pod["metadata"]["name"] for pod in pods))
    return RunReason(
        key=f"lost {names}", text=f"{describe_pod_end(first)}{others}; a new pod takes its place"
    )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """The end of a run, for people (`lines`) and for scripts (`code`)."""

    code: ExitCode
    lines: Sequence[str]
    pod: str | None = None
    """The pod whose log says why."""
    exit_code: int | None = None
    """Its container's exit code."""
    remedies: Sequence[str] = field(default=())


_REMEDIES: Mapping[int, str] = {
    ExitCode.OUT_OF_MEMORY: "halve the batch: --set batch_size=..., or --set deepspeed=zero3",
    ExitCode.HUNG: "the last line of each rank says where it hung",
    ExitCode.RETRY: "tita doctor checks the store",
    ExitCode.LOST_PEER: "look at the other pods, and at networkPolicy in the values",
    135: "raise jobs.shmSize in the release's values",
}


_OVER: Mapping[str, str] = {
    "BackoffLimitExceeded": "no tries are left",
    "DeadlineExceeded": "its deadline passed, waiting included",
    "PodFailurePolicy": "another try would end the same way",
    "FailedIndexes": "some ranks failed for good",
    "MaxFailedIndexesExceeded": "too many ranks failed for good",
}


def failure_reason(job: Mapping[str, Any]) -> str:
    """Why the cluster gave the Job up."""
    why = condition(job, "Failed") or condition(job, "FailureTarget") or {}
    reason: str = why.get("reason", "")
    return _OVER.get(reason) or why.get("message") or reason or "no reason given"


def run_outcome(
    job: Mapping[str, Any] | None, pods: Iterable[Object], *, run: str, has_logs: bool
) -> RunOutcome:
    """The verdict on a run that is over, or on one that was deleted (`job` is None)."""
    if job is None:
        return RunOutcome(
            code=ExitCode.FAILED,
            lines=[f"{run} was deleted while it ran, from outside"],
            remedies=[f"see who in `kubectl get events`; launch again with --name {run}"],
        )
    if condition(job, "Complete"):
        return RunOutcome(code=ExitCode.OK, lines=[f"{run} is done"])
    next_steps = _next_steps(job, run, has_logs=has_logs)
    if is_cancelled(job):
        return RunOutcome(code=ExitCode.FAILED, lines=[f"{run} was cancelled"], remedies=next_steps)
    head = f"{run} failed: {failure_reason(job)}"
    failed = [pod for pod in pods if has_failed(pod)]
    culprit = root_cause_pod(failed)
    if culprit is None:
        return RunOutcome(code=ExitCode.FAILED, lines=[head, *_tried(job)], remedies=next_steps)
    code = (terminated(culprit) or {}).get("exitCode")
    user = code == ExitCode.USER
    return RunOutcome(
        code=ExitCode.USER if user else ExitCode.FAILED,
        lines=[head, describe_pod_end(culprit), *_tried(job)],
        pod=culprit["metadata"]["name"],
        exit_code=code,
        remedies=[*_code_remedy(job, culprit, code), *next_steps],
    )


def root_cause_pod(failed: Sequence[Object]) -> Object | None:
    """The pod that tells most: a dying gang also leaves lost peers and SIGTERMs."""
    codes = {
        pod["metadata"]["name"]: (terminated(pod) or {}).get("exitCode") or 0 for pod in failed
    }
    if not failed:
        return None
    if not any(codes.values()):
        return failed[-1]
    most = decisive_exit_code(codes.values())
    # Of several the newest: what was mended since is of no interest.
    newest = sorted(failed, key=lambda p: p["metadata"].get("creationTimestamp") or "")
    return next(pod for pod in reversed(newest) if codes[pod["metadata"]["name"]] == most)


def describe_pod_end(pod: Mapping[str, Any]) -> str:
    """What became of a pod that ended or is taken away, in one clause."""
    status = pod.get("status") or {}
    node = (pod.get("spec") or {}).get("nodeName")
    where = f"pod {pod['metadata']['name']} (rank {rank_of(pod)}{f', {node}' if node else ''})"
    disrupted = condition(pod, "DisruptionTarget")
    ended = terminated(pod)
    if status.get("reason") == "Evicted":
        words = plain(str(status.get("message") or ""))
        return "; ".join(filter(None, (f"{where} was evicted: {words}", remedy_for(words))))
    if disrupted and disrupted.get("reason") == "DeletionByTaintManager":
        return f"{where} went with its node: {disrupted.get('message', '')}".rstrip(": ")
    if disrupted:
        words = disrupted.get("message") or disrupted.get("reason") or ""
        return f"{where} was disrupted: {words}".rstrip(": ")
    if status.get("reason") == "NodeLost":
        return f"{where} was lost with its node"
    if ended is None:
        return f"{where} failed: {status.get('message') or status.get('reason') or 'no reason'}"
    code = ended["exitCode"]
    meaning = describe_exit_code(code, reason=ended.get("reason", ""))
    return f"{where} ended with exit code {code}: {meaning}"


def _tried(job: Mapping[str, Any]) -> list[str]:
    failed = (job.get("status") or {}).get("failed") or 0
    limit = job["spec"].get("backoffLimit", 0)
    return [f"{failed} pods failed; up to {limit} are replaced"] if failed > 1 else []


def _code_remedy(job: Mapping[str, Any], pod: Mapping[str, Any], code: int | None) -> list[str]:
    ended = terminated(pod) or {}
    if code == 137 and ended.get("reason") == "OOMKilled":
        limits = main_container(job["spec"]["template"]).get("resources", {}).get("limits", {})
        now = f" (now {limits['memory']})" if "memory" in limits else ""
        return [f"raise jobs.resources.limits.memory{now} in the release's values"]
    return [_REMEDIES[code]] if code is not None and code in _REMEDIES else []


def _next_steps(job: Mapping[str, Any], run: str, *, has_logs: bool) -> list[str]:
    name = (job["metadata"].get("labels") or {}).get(JOB_LABEL, "JOB")
    # A cancelled run's deadline was moved to now: no one set it, so it is nothing to raise.
    reason = (condition(job, "Failed") or {}).get("reason")
    late = reason == "DeadlineExceeded" and not is_cancelled(job)
    deadline = f"jobs.perJob.{name}.activeDeadlineSeconds"
    now = job["spec"].get("activeDeadlineSeconds")
    return [
        *([f"raise {deadline} (now {now}) in the release's values"] if late else []),
        f"all of its log: tita jobs logs {run} --all-ranks"
        if has_logs
        else "its pods are gone, and with them their logs",
        f"go on from its last checkpoint: tita jobs delete {run} && "
        f"tita launch {name} --name {run} ...",
    ]
