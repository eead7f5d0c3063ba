"""Health of a release's embedded store and inference: workloads, pods, claims, containers."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tita.jobspec import chart_path
from tita.launch.cluster import ApiError, Cluster
from tita.launch.objects import (
    INSTANCE_LABEL,
    STARTING_REASONS,
    Object,
    condition,
    node_is_lost,
)
from tita.launch.preflight import BAD, OK, UNKNOWN, CheckResult, CheckStatus
from tita.launch.reasons import CLAIM_EVENTS
from tita.launch.remedies import describe_exit_code, one_line, remedy_for
from tita.launch.template import JobTemplate
from tita.terminal import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """A part of the release with pods of its own.

    Its workload is named by an annotation of the release's CronJobs, which the launcher may always
    read, so that a part that is missing or has no pods differs from one that was not asked for.
    """

    check: str
    label: str
    """Value of `app.kubernetes.io/component`."""
    kind: str
    resource: str
    """The workload's kind and resource."""
    annotation: str
    """Annotation of the CronJobs with the workload's name."""
    values: str
    """Prefix of its chart values."""
    claim_values: str
    """Prefix of the chart values of its claim."""


EMBEDDED_STORE = Component(
    check="embedded store",
    label="s3",
    kind="StatefulSet",
    resource="statefulsets.apps",
    annotation="tita.dev/store",
    values="s3.embedded",
    claim_values="s3.embedded.persistence",
)
INFERENCE = Component(
    check="inference",
    label="inference",
    kind="Deployment",
    resource="deployments.apps",
    annotation="tita.dev/inference",
    values="inference",
    claim_values="inference.cache.persistence",
)
COMPONENTS = (EMBEDDED_STORE, INFERENCE)


@dataclass(frozen=True, slots=True)
class _Problem:
    text: str
    remedy: str = ""


def component_health(cluster: Cluster, template: JobTemplate, component: Component) -> CheckResult:
    """Whether the component has a ready pod; `?` if only some of its pods are ready.

    Args:
        cluster: the cluster and namespace.
        template: any CronJob of the release.
        component: which part to look at.
    """
    name = (template.cron_job["metadata"].get("annotations") or {}).get(component.annotation)
    selector = f"{INSTANCE_LABEL}={template.release},app.kubernetes.io/component={component.label}"
    try:
        found, _ = cluster.list(cluster.path("pods"), labelSelector=selector)
        pods = [pod for pod in found if _is_active(pod)]
        waiting = [pod for pod in pods if not condition(pod, "Ready")]
        events = cluster.list(cluster.path("events"))[0] if waiting or not pods else []
    except ApiError as error:
        if error.status != 403:
            raise
        return CheckResult(component.check, UNKNOWN, "no permission to look")
    if not pods and not name:
        return CheckResult(component.check, OK, "not part of the release")
    workload = _workload(cluster, component, name) if name else None
    again = f"`{{helm}} upgrade {template.release} {chart_path()} --reset-then-reuse-values`"
    absent = _missing_pods(component, name, workload, len(pods), events, again) if name else None
    if not pods:
        absent = absent or _Problem("no pods")
        return CheckResult(component.check, BAD, absent.text, absent.remedy)
    ready = f"{len(pods) - len(waiting)} of {counted(len(pods), 'pod')} ready"
    if not waiting:
        mark, text = (UNKNOWN, f"{ready}: {absent.text}") if absent else (OK, ready)
        return CheckResult(component.check, mark, text, absent.remedy if absent else "")
    mark = BAD if len(waiting) == len(pods) else UNKNOWN
    for pod in waiting:
        if problem := _claim_problem(cluster, pod, events, component, again):
            return _result(component, mark, ready, problem)
        if problem := _pod_problem(pod, component):
            problem = _Problem(f"{pod['metadata']['name']}: {problem.text}", problem.remedy)
            return _result(component, mark, ready, problem)
    return CheckResult(component.check, UNKNOWN, f"{ready} so far")


def _result(component: Component, mark: CheckStatus, ready: str, problem: _Problem) -> CheckResult:
    return CheckResult(component.check, mark, f"{ready}: {problem.text}", problem.remedy)


def _is_active(pod: Object) -> bool:
    """Neither ended, evicted nor being deleted."""
    over = (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded")
    return not over and not pod["metadata"].get("deletionTimestamp")


def _workload(cluster: Cluster, component: Component, name: str) -> Object | None:
    """The workload; None if it does not exist; empty without the permission to look."""
    try:
        return cluster.get(cluster.path(component.resource, name))
    except ApiError as error:
        if error.status == 404:
            return None
        if error.status == 403:
            return {}
        raise


def _missing_pods(
    component: Component,
    name: str,
    workload: Object | None,
    num_pods: int,
    events: Iterable[Object],
    again: str,
) -> _Problem | None:
    """Why a workload has fewer pods than it should have; None if it has enough.

    Args:
        again: the command that creates the objects of the release that are missing.
    """
    what = f"{component.kind} {name}"
    if workload is None:
        return _Problem(f"{what} does not exist", f"{again} creates it")
    spec = workload.get("spec") or {}
    wanted = spec.get("replicas", 1)
    if wanted == 0:
        command = f"`{{kubectl}} scale {component.kind.lower()} {name} --replicas 1`"
        return _Problem(f"{what} is scaled to 0", f"start it with {command}")
    if num_pods >= wanted:
        return None
    text = f"{what} has {num_pods} of {counted(wanted, 'pod')}"
    if spec.get("paused"):
        return _Problem(f"{text}: it is paused", f"`{{kubectl}} rollout resume deployment {name}`")
    failure = condition(workload, "ReplicaFailure") or {}
    # A StatefulSet has no such condition, only events.
    messages = [str(failure.get("message") or "")] + [
        str(event.get("message") or "")
        for event in sorted(
            events, key=lambda event: event.get("lastTimestamp") or "", reverse=True
        )
        if event.get("reason") == "FailedCreate"
        and re.fullmatch(
            rf"{re.escape(name)}(-[a-z0-9]+)?", event["involvedObject"].get("name", "")
        )
    ]
    message = one_line(next(filter(None, messages), ""))
    if not message:
        command = f"{{kubectl}} describe {component.kind.lower()} {name}"
        return _Problem(text, f"see `{command}`")
    return _Problem(f"{text}: {message}", _remedy(component, message))


def _remedy(component: Component, message: str) -> str:
    """What to do about a message of the cluster about the component's pods."""
    if component is INFERENCE and re.search(r"Insufficient \S+/\S+", message):
        strategy = "inference.strategy.type=Recreate"
        return f"free a GPU, or let upgrades end the old pod first: {strategy}"
    return remedy_for(message).replace("jobs.", f"{component.values}.")


def _claim_problem(
    cluster: Cluster, pod: Object, events: Sequence[Object], component: Component, again: str
) -> _Problem | None:
    """Why a claim of the pod is not bound, in the cluster's words; None if all are."""
    values = component.claim_values
    for volume in pod["spec"].get("volumes") or []:
        name = (volume.get("persistentVolumeClaim") or {}).get("claimName")
        if not name:
            continue
        try:
            claim = cluster.get(cluster.path("persistentvolumeclaims", name))
        except ApiError as error:
            if error.status == 404:
                remedy = f"{again} creates it, or fix {values}.existingClaim"
                return _Problem(f"there is no claim {name!r}", remedy)
            continue
        if claim["metadata"].get("deletionTimestamp"):
            command = f"`{{kubectl}} get pvc {name}`"
            remedy = f"when {command} no longer shows it: {again}"
            return _Problem(f"claim {name} is being deleted", remedy)
        if (claim.get("status") or {}).get("phase") != "Pending":
            continue
        messages = [
            one_line(str(event.get("message", "")))
            for event in sorted(events, key=lambda event: event.get("lastTimestamp") or "")
            if event["involvedObject"].get("kind") == "PersistentVolumeClaim"
            and event["involvedObject"].get("name") == name
            and event.get("reason") in CLAIM_EVENTS
        ]
        if not messages and not claim["spec"].get("storageClassName"):
            messages = ["no storage class is set, and there is no default"]
        if messages:
            remedy = f"see `{{kubectl}} describe pvc {name}`; {values} sets its class and size"
            if re.search(r"no storage class|storageclass\S* \S+ not found", messages[-1]):
                # The class of a claim cannot be changed; one that is not bound holds no data.
                remedy = (
                    f"`{{kubectl}} delete pvc {name}`, then set {values}.storageClass to one of "
                    f"`{{kubectl}} get storageclass`, or {values}.enabled=false"
                )
            return _Problem(f"claim {name} is not bound: {messages[-1]}", remedy)
    return None


def _pod_problem(pod: Object, component: Component) -> _Problem | None:
    """What is wrong with a pod; None while it starts normally."""
    if node_is_lost(pod):
        return _Problem(f"node {pod['spec'].get('nodeName')} does not report")
    if unscheduled := condition(pod, "PodScheduled", status="False"):
        message = one_line(str(unscheduled.get("message") or "not scheduled"))
        return _Problem(message, _remedy(component, message))
    for container in (pod.get("status") or {}).get("containerStatuses") or []:
        if problem := _container_problem(pod, container, component):
            return problem
    return None


def _container_problem(pod: Object, container: Object, component: Component) -> _Problem | None:
    state = container.get("state") or {}
    ended = state.get("terminated") or (container.get("lastState") or {}).get("terminated")
    if ended:
        # The kubelet's own message, "back-off 5m0s restarting failed container", says nothing.
        times = counted(container.get("restartCount", 0), "restart")
        code, reason = ended["exitCode"], ended.get("reason", "")
        text = (
            f"{times}, the last after exit code {code}: {describe_exit_code(code, reason=reason)}"
        )
        if last_words := _last_line(ended.get("message")):
            return _Problem(f"{text}: {last_words}")
        if reason == "OOMKilled":
            return _Problem(text, f"raise {component.values}.resources.limits.memory")
        arguments = f"{pod['metadata']['name']} --container {container['name']} --previous"
        return _Problem(text, f"see `{{kubectl}} logs {arguments}`")
    waiting = state.get("waiting") or {}
    if waiting.get("reason", "") in STARTING_REASONS:
        return None
    message = ": ".join(filter(None, (waiting["reason"], waiting.get("message"))))
    return _Problem(message, _remedy(component, message))


def _last_line(message: str | None) -> str:
    """The last line that a container wrote; `FallbackToLogsOnError` reports the end of its log."""
    lines = [line.strip() for line in (message or "").splitlines() if line.strip()]
    return lines[-1] if lines else ""
