"""Why a run waits, what ended its attempts, and how it ended."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tita.errors import ExitCode
from tita.gang.torchrun import decisive_exit_code
from tita.launch.objects import (
    JOB_LABEL,
    LAUNCH_OPTIONS,
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
    main_container,
    node_is_lost,
    plain_environment,
    rank_of,
    terminated,
)
from tita.launch.remedies import (
    EXIT_CODE_REMEDIES,
    FAILURE_REASONS,
    describe_exit_code,
    one_line,
    remedy_for,
)
from tita.launch.scope import CommandScope
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReason:
    """A message about a run. `key` stays the same while only numbers in the text change."""

    key: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """The end of a run, for people (`lines`) and for scripts (`code`)."""

    code: ExitCode
    lines: Sequence[str]
    pod: str | None = None
    """The pod whose log shows the cause."""
    exit_code: int | None = None
    """Its container's exit code."""
    remedies: Sequence[str] = ()


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


# The end.


def run_outcome(
    job: Object | None, pods: Iterable[Object], *, run: str, scope: CommandScope
) -> RunOutcome:
    """The outcome of a run that is over or was deleted (`job` is None)."""
    if job is None:
        return RunOutcome(
            code=ExitCode.FAILED,
            lines=[f"{run} was deleted while it ran"],
            remedies=[f"see `{scope.kubectl('get', 'events')}`; launch again with --name {run}"],
        )
    if condition(job, "Complete"):
        return RunOutcome(code=ExitCode.OK, lines=[f"{run} is done"])
    if is_cancelled(job):
        return RunOutcome(code=ExitCode.FAILED, lines=[f"{run} was cancelled"])
    template, pods = job["spec"].get("template"), list(pods)
    if template:
        scope = scope.on_store(plain_environment(main_container(template)).get("TITA_STORE", ""))
    lines = [f"{run} failed: {failure_reason(job)}"]
    used = sum(incident.is_try for incident in incidents_of(pods))
    allowed = counted(allowed_tries(job), "incident")
    counts = [f"{counted(used, 'incident')}; a run survives {allowed}"] if used > 1 else []
    failed = [pod for pod in pods if has_failed(pod)]
    last = [pod for pod in failed if _exit_code(pod) == ExitCode.OUT_OF_TRIES]
    # The pod that found no tries left, and what used them up.
    before = root_cause_pod([pod for pod in failed if pod not in last]) if last else None
    cause = last[-1] if last else root_cause_pod(failed)
    if cause is None:
        return RunOutcome(code=ExitCode.FAILED, lines=lines + counts)
    code = _exit_code(cause)
    ends = [scope.fill(describe_pod_end(pod)) for pod in (cause, before) if pod is not None]
    return RunOutcome(
        code=ExitCode.USER if code == ExitCode.USER else ExitCode.FAILED,
        lines=[*lines, *ends, *counts],
        pod=cause["metadata"]["name"],
        exit_code=code,
        remedies=[scope.fill(remedy) for remedy in _exit_code_remedy(job, cause, code)],
    )


def _exit_code(pod: Object) -> int | None:
    code: int | None = (terminated(pod) or {}).get("exitCode")
    return code


def failure_reason(job: Object) -> str:
    """Why the Job controller gave up."""
    failed = condition(job, "Failed") or condition(job, "FailureTarget") or {}
    reason: str = failed.get("reason", "")
    # https://github.com/kubernetes/kubernetes/blob/v1.36.0/pkg/controller/job/pod_failure_policy.go
    if f"exit code {ExitCode.OUT_OF_TRIES} " in failed.get("message", ""):
        return FAILURE_REASONS["BackoffLimitExceeded"]
    return FAILURE_REASONS.get(reason) or failed.get("message") or reason or "no reason given"


def root_cause_pod(failed: Sequence[Object]) -> Object | None:
    """The failed pod with the most significant exit code; others end as its lost peers."""
    if not failed:
        return None
    codes = {
        pod["metadata"]["name"]: (terminated(pod) or {}).get("exitCode") or 0 for pod in failed
    }
    if not any(codes.values()):
        return failed[-1]
    decisive = decisive_exit_code(codes.values())
    oldest_first = sorted(failed, key=lambda pod: pod["metadata"].get("creationTimestamp") or "")
    return next(pod for pod in reversed(oldest_first) if codes[pod["metadata"]["name"]] == decisive)


def describe_pod_end(pod: Object) -> str:
    """How a pod ended or was removed, in one clause."""
    status = pod.get("status") or {}
    node = (pod.get("spec") or {}).get("nodeName")
    where = f"pod {pod['metadata']['name']} (rank {rank_of(pod)}{f', {node}' if node else ''})"
    disrupted, ended = condition(pod, "DisruptionTarget"), terminated(pod)
    if status.get("reason") == "Evicted":
        message = one_line(str(status.get("message") or ""))
        return "; ".join(filter(None, (f"{where} was evicted: {message}", remedy_for(message))))
    if disrupted:
        message = disrupted.get("message") or ""
        if disrupted.get("reason") == "DeletionByTaintManager":
            return f"{where} was lost with its node: {message}".rstrip(": ")
        return f"{where} was disrupted: {message or disrupted.get('reason') or ''}".rstrip(": ")
    if status.get("reason") == "NodeLost":
        return f"{where} was lost with its node"
    if ended is None:
        return f"{where} failed: {status.get('message') or status.get('reason') or 'no reason'}"
    code = ended["exitCode"]
    meaning = _own_words(ended) or describe_exit_code(code, reason=ended.get("reason", ""))
    return f"{where} ended with exit code {code}: {meaning}"


def _own_words(ended: Object) -> str:
    """The error that the process wrote to its termination message; empty without one.

    It names what was missing, such as the server that a benchmark waited for, where the exit code
    only says that something was.
    """
    try:
        message = json.loads(ended.get("message") or "")
    except ValueError:
        return ""
    error = message.get("error") if isinstance(message, dict) else None
    text = one_line(error) if isinstance(error, str) else ""
    return text.replace("tita doctor", "{tita doctor}")


def _exit_code_remedy(job: Object, pod: Object, code: int | None) -> list[str]:
    ended = terminated(pod) or {}
    is_oom = ended.get("reason") == "OOMKilled" or "memory limit" in _own_words(ended)
    if code == 137 and is_oom:
        limits = main_container(job["spec"]["template"]).get("resources", {}).get("limits", {})
        now = f" (now {limits['memory']})" if "memory" in limits else ""
        return [f"raise jobs.resources.limits.memory{now} in the release's values"]
    remedy = EXIT_CODE_REMEDIES.get(code or 0)
    return [remedy] if remedy and not _own_words(terminated(pod) or {}) else []


def next_steps(
    job: Object,
    outcome: RunOutcome,
    *,
    has_logs: bool,
    scope: CommandScope,
    checkpoint: str | None = None,
) -> list[str]:
    """What to do about a run that did not end well, as commands to copy.

    Args:
        job: the Job.
        outcome: its outcome.
        has_logs: whether a pod is left whose log can be read.
        scope: the options of this command.
        checkpoint: the last complete checkpoint; empty if there is none, None if unknown.
    """
    metadata, steps = job["metadata"], []
    run, name = metadata["name"], (metadata.get("labels") or {}).get(JOB_LABEL, "JOB")
    # Cancelling a run moves its deadline to now.
    failed = condition(job, "Failed") or {}
    if failed.get("reason") == "DeadlineExceeded" and not is_cancelled(job):
        now = job["spec"].get("activeDeadlineSeconds")
        deadline = f"jobs.perJob.{name}.activeDeadlineSeconds (now {now})"
        steps.append(f"raise {deadline} in the release's values")
    logs = f"read its whole log: {scope.tita('jobs logs', run, '--all-ranks')}"
    steps.append(logs if has_logs else "its pods are deleted, and their logs with them")
    options = json.loads((metadata.get("annotations") or {}).get(LAUNCH_OPTIONS) or "[]")
    again = f"{scope.tita('jobs delete', run)} && "
    again += scope.tita("launch", name, "--name", run, *options)
    if outcome.exit_code == ExitCode.USER:
        what = "launch it again when the cause is fixed, with a corrected --set if it is the recipe"
    elif checkpoint:
        what = "resume from its last checkpoint"
    elif checkpoint is None:
        what = "launch it again; it resumes from its last checkpoint if it has one"
    else:
        what = "launch it again; it has no checkpoint and starts from the beginning"
    return [*steps, f"{what}: {again}"]
