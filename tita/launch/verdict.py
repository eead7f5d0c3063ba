"""How a run ended and why: which pod, by what code, what was tried, and what to do next."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tita.errors import ExitCode
from tita.gang.torchrun import decisive_exit_code
from tita.launch.cluster import Object
from tita.launch.states import condition, is_cancelled, rank_of, terminated
from tita.launch.template import JOB_LABEL, container_of
from tita.launch.waiting import plain, remedy_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The end of a run, for people (`lines`) and for scripts (`code`)."""

    code: ExitCode
    lines: Sequence[str]
    pod: str | None = None
    """The pod whose log says why."""
    exit_code: int | None = None
    """Its container's exit code."""
    remedies: Sequence[str] = field(default=())


_WORDS: Mapping[int, str] = {
    ExitCode.FAILED: "the job failed",
    ExitCode.USER: "a mistake in the recipe or the data",
    ExitCode.OUT_OF_MEMORY: "out of device memory",
    ExitCode.HUNG: "a rank hung and its watchdog ended it",
    ExitCode.RETRY: "preempted, or the store or network was away",
    ExitCode.LOST_PEER: "lost the connection to another rank",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.TERMINATED: "ended by SIGTERM",
    126: "the image's command cannot be executed",
    127: "the image has no such command",
    134: "aborted (SIGABRT)",
    135: "bus error: /dev/shm may be full",
    137: "killed (SIGKILL)",
    139: "segmentation fault",
}
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


def words_for(code: int, *, reason: str = "") -> str:
    """What an exit code means. OOMKilled says so only with 137: that reason also comes with 0."""
    if code == 137 and reason == "OOMKilled":
        return "out of memory: the container's limit was reached"
    if code in _WORDS:
        return _WORDS[code]
    if code > 128:
        return f"killed by signal {code - 128}"
    return "failed"


def why_over(job: Mapping[str, Any]) -> str:
    """Why the cluster gave the Job up."""
    why = condition(job, "Failed") or condition(job, "FailureTarget") or {}
    reason: str = why.get("reason", "")
    return _OVER.get(reason) or why.get("message") or reason or "no reason given"


def judge(
    job: Mapping[str, Any] | None, pods: Iterable[Object], *, run: str, has_logs: bool
) -> Verdict:
    """The verdict on a run that is over, or on one that was deleted (`job` is None)."""
    if job is None:
        return Verdict(
            code=ExitCode.FAILED,
            lines=[f"{run} was deleted while it ran, from outside"],
            remedies=[f"see who in `kubectl get events`; launch again with --name {run}"],
        )
    if condition(job, "Complete"):
        return Verdict(code=ExitCode.OK, lines=[f"{run} is done"])
    next_steps = _next_steps(job, run, has_logs=has_logs)
    if is_cancelled(job):
        return Verdict(code=ExitCode.FAILED, lines=[f"{run} was cancelled"], remedies=next_steps)
    head = f"{run} failed: {why_over(job)}"
    failed = [pod for pod in pods if has_failed(pod)]
    culprit = culprit_of(failed)
    if culprit is None:
        return Verdict(code=ExitCode.FAILED, lines=[head, *_tried(job)], remedies=next_steps)
    code = (terminated(culprit) or {}).get("exitCode")
    user = code == ExitCode.USER
    return Verdict(
        code=ExitCode.USER if user else ExitCode.FAILED,
        lines=[head, told_of(culprit), *_tried(job)],
        pod=culprit["metadata"]["name"],
        exit_code=code,
        remedies=[*_code_remedy(job, culprit, code), *next_steps],
    )


def has_failed(pod: Mapping[str, Any]) -> bool:
    """Whether it ended, and not well."""
    ended = terminated(pod)
    return (pod.get("status") or {}).get("phase") == "Failed" or bool(ended and ended["exitCode"])


def culprit_of(failed: Sequence[Object]) -> Object | None:
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


def told_of(pod: Mapping[str, Any]) -> str:
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
    return f"{where} ended with exit code {code}: {words_for(code, reason=ended.get('reason', ''))}"


def _tried(job: Mapping[str, Any]) -> list[str]:
    failed = (job.get("status") or {}).get("failed") or 0
    limit = job["spec"].get("backoffLimit", 0)
    return [f"{failed} pods failed; up to {limit} are replaced"] if failed > 1 else []


def _code_remedy(job: Mapping[str, Any], pod: Mapping[str, Any], code: int | None) -> list[str]:
    ended = terminated(pod) or {}
    if code == 137 and ended.get("reason") == "OOMKilled":
        limits = container_of(job["spec"]["template"]).get("resources", {}).get("limits", {})
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
