"""How a run ended, and what to do next, as commands to copy."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tita.errors import ExitCode
from tita.gang.torchrun import decisive_exit_code
from tita.launch.objects import (
    JOB_LABEL,
    LAUNCH_OPTIONS,
    Object,
    condition,
    has_failed,
    is_cancelled,
    main_container,
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
from tita.launch.tries import allowed_tries, incidents_of
from tita.terminal import counted


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
        return _with_remedy(f"{where} was evicted: ", status.get("message") or "")
    if disrupted:
        message = disrupted.get("message") or ""
        if disrupted.get("reason") == "DeletionByTaintManager":
            return f"{where} was lost with its node: {message}".rstrip(": ")
        return f"{where} was disrupted: {message or disrupted.get('reason') or ''}".rstrip(": ")
    if status.get("reason") == "NodeLost":
        return f"{where} was lost with its node"
    if ended is None:
        # The kubelet did not start it.
        message = status.get("message") or status.get("reason") or "no reason"
        return _with_remedy(f"{where} failed: ", message)
    code = ended["exitCode"]
    meaning = _own_words(ended) or describe_exit_code(code, reason=ended.get("reason", ""))
    return f"{where} ended with exit code {code}: {meaning}"


def _with_remedy(what: str, message: str) -> str:
    message = one_line(message)
    return "; ".join(filter(None, (f"{what}{message}", remedy_for(message))))


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


_KEPT = {"build-pairs": "the batches that are finished", "benchmark": "the answers so far"}
"""What a job without checkpoints keeps of an attempt."""


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
    elif name in _KEPT:
        what = f"launch it again; it keeps {_KEPT[name]}"
    elif checkpoint:
        what = "resume from its last checkpoint"
    elif checkpoint is None:
        what = "launch it again; it resumes from its last checkpoint if it has one"
    else:
        what = "launch it again; it has no checkpoint and starts from the beginning"
    return [*steps, f"{what}: {again}"]
