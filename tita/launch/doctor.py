"""`tita doctor`, the preflight of a launch, and the health of the release's components."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from tita.errors import TitaError
from tita.jobspec import job_names
from tita.launch.cluster import ApiError, Cluster
from tita.launch.objects import (
    INSTANCE_LABEL,
    STARTING_REASONS,
    Object,
    condition,
    main_container,
    node_is_lost,
    plain_environment,
)
from tita.launch.preflight import (
    BAD,
    OK,
    UNKNOWN,
    CheckResult,
    check_api,
    check_job,
    check_rights,
    check_store,
    run_checks,
)
from tita.launch.reasons import CLAIM_EVENTS
from tita.launch.remedies import one_line, remedy_for
from tita.launch.submit import LaunchRequest, find_template, plan
from tita.launch.template import JobTemplate
from tita.terminal import counted

COMPONENTS = STORE, INFERENCE = "s3", "inference"
_NAMES = {STORE: "embedded store", INFERENCE: "inference"}
# The chart values of each component, and of its claim.
_VALUES = {STORE: "s3.embedded", INFERENCE: "inference"}
_CLAIM_VALUES = {STORE: "s3.embedded.persistence", INFERENCE: "inference.cache.persistence"}

Report = Callable[[CheckResult], None]


def run_preflight(
    cluster: Cluster, template: JobTemplate, manifest: Object, *, report: Report
) -> bool:
    """Report the checks of one launch; whether none is bad."""
    release = CheckResult("release", OK, f"{template.release} ({template.name})")
    results = run_checks(
        [
            partial(check_api, cluster),
            partial(check_rights, cluster),
            lambda: release,
            partial(component_health, cluster, template.release, STORE),
            *check_job(cluster, template, manifest),
        ]
    )
    return _report_all(cluster, results, report)


def run_doctor(cluster: Cluster, *, release: str | None, report: Report) -> bool:
    """Report the checks of the cluster, of every job and of the store; whether none is bad."""
    good = _report_all(cluster, (check_api(cluster), check_rights(cluster)), report)
    store, releases = "", set[str]()
    for job in job_names():
        try:
            template = find_template(cluster, job, release=release)
            request = LaunchRequest(job=job, run=f"doctor-{job}", recipe={})
            manifest, shape = plan(request, template)
        except TitaError as error:
            report(CheckResult(job, BAD, error.what, error.remedy or ""))
            good = False
            continue
        size = f"{shape.nodes} x {counted(shape.gpus_per_node, 'GPU')}"
        report(CheckResult(job, OK, f"{template.name}, {size}"))
        good &= _report_all(cluster, run_checks(check_job(cluster, template, manifest)), report)
        releases.add(template.release)
        container = main_container(manifest["spec"]["template"])
        store = plain_environment(container).get("TITA_STORE", store)
    for name in sorted(releases):
        health = [partial(component_health, cluster, name, part) for part in COMPONENTS]
        good &= _report_all(cluster, run_checks(health), report)
    return good & _report_all(cluster, [_check_store_from_here(store)] if store else [], report)


def _report_all(cluster: Cluster, results: Iterable[CheckResult], report: Report) -> bool:
    good = True
    for result in results:
        report(replace(result, remedy=cluster.scope.fill(result.remedy)))
        good &= result.mark is not BAD
    return good


def _check_store_from_here(uri: str) -> CheckResult:
    """Check the store if this machine has credentials; a laptop often has none."""
    if uri.startswith("s3://"):
        import boto3  # 0.2 s, for commands that open an s3 store only

        if boto3.Session().get_credentials() is None:
            return CheckResult("store", UNKNOWN, f"{uri}: no credentials on this machine")
    return check_store(uri)


def component_health(cluster: Cluster, release: str, component: str) -> CheckResult:
    """Whether the component has a ready pod; `?` if only some of its pods are ready."""
    check = _NAMES[component]
    selector = f"{INSTANCE_LABEL}={release},app.kubernetes.io/component={component}"
    try:
        found, _ = cluster.list(cluster.path("pods"), labelSelector=selector)
        pods = [pod for pod in found if _is_active(pod)]
        waiting = [pod for pod in pods if not condition(pod, "Ready")]
        events = cluster.list(cluster.path("events"))[0] if waiting else []
    except ApiError as error:
        if error.status != 403:
            raise
        return CheckResult(check, UNKNOWN, "no permission to look")
    if not pods:
        return CheckResult(check, OK, "not part of the release")
    ready = f"{len(pods) - len(waiting)} of {counted(len(pods), 'pod')} ready"
    if not waiting:
        return CheckResult(check, OK, ready)
    mark = BAD if len(waiting) == len(pods) else UNKNOWN
    for pod in waiting:
        if problem := _claim_problem(cluster, pod, events):
            remedy = _claim_remedy(problem, _CLAIM_VALUES[component])
            return CheckResult(check, mark, f"{ready}: {problem}", remedy)
        if problem := _pod_problem(pod):
            remedy = remedy_for(problem).replace("jobs.", f"{_VALUES[component]}.")
            if component == INFERENCE and re.search(r"Insufficient \S*gpu", problem):
                strategy = "inference.strategy.type=Recreate"
                remedy = f"free a GPU, or let upgrades end the old pod first: {strategy}"
            return CheckResult(
                check, mark, f"{ready}: {pod['metadata']['name']}: {problem}", remedy
            )
    return CheckResult(check, UNKNOWN, f"{ready} so far")


def _is_active(pod: Object) -> bool:
    """Neither ended, evicted nor being deleted."""
    over = (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded")
    return not over and not pod["metadata"].get("deletionTimestamp")


def _claim_problem(cluster: Cluster, pod: Object, events: Iterable[Object]) -> str:
    """Why a claim of the pod is not bound, in the cluster's words; empty if all are."""
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
        messages = [
            one_line(str(event.get("message", "")))
            for event in sorted(events, key=lambda event: event.get("lastTimestamp") or "")
            if event["involvedObject"].get("kind") == "PersistentVolumeClaim"
            and event["involvedObject"].get("name") == name
            and event.get("reason") in CLAIM_EVENTS
        ]
        if messages:
            return f"claim {name} is not bound: {messages[-1]}"
        if not claim["spec"].get("storageClassName"):
            return f"claim {name} is not bound: no storage class is set, and there is no default"
    return ""


def _claim_remedy(problem: str, value: str) -> str:
    if "no claim" in problem:
        return f"run the last `helm upgrade` again, which creates it, or fix {value}.existingClaim"
    if re.search(r"no storage class|storageclass\S* \S+ not found", problem):
        known = "one of `{kubectl} get storageclass`"
        return f"set {value}.storageClass to {known}, or {value}.enabled=false"
    return f"see `{{kubectl}} describe pvc`; {value} in the release's values sets class and size"


def _pod_problem(pod: Object) -> str:
    """What is wrong with a pod; empty while it starts normally."""
    if node_is_lost(pod):
        return f"node {pod['spec'].get('nodeName')} does not report"
    if unscheduled := condition(pod, "PodScheduled", status="False"):
        return one_line(str(unscheduled.get("message") or "not scheduled"))
    for container in (pod.get("status") or {}).get("containerStatuses") or []:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason", "") not in STARTING_REASONS:
            return ": ".join(filter(None, (waiting["reason"], waiting.get("message"))))
        if last := (container.get("lastState") or {}).get("terminated"):
            times = counted(container["restartCount"], "restart")
            return f"{times}, the last after exit code {last['exitCode']}"
    return ""
