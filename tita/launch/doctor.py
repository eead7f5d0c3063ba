"""The checks of `tita doctor` and of every launch, and the health of the release's components."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from tita.errors import TitaError
from tita.jobspec import job_names
from tita.launch.cluster import ApiError, Cluster
from tita.launch.objects import (
    INSTANCE_LABEL,
    Object,
    condition,
    main_container,
    node_is_lost,
    plain_environment,
)
from tita.launch.preflight import (
    Check,
    CheckResult,
    CheckStatus,
    check_api,
    check_job,
    check_rights,
    check_store,
    run_checks,
)
from tita.launch.reasons import CLAIM_EVENTS
from tita.launch.remedies import plain, remedy_for
from tita.launch.submit import LaunchRequest, find_template, plan
from tita.launch.template import JobTemplate
from tita.terminal import counted

COMPONENTS = STORE, INFERENCE = "s3", "inference"


_COMPONENT = "app.kubernetes.io/component"


# Where the chart's values speak of each.
_VALUES = {STORE: "s3.embedded", INFERENCE: "inference"}


_CLAIM_VALUES = {STORE: "s3.embedded.persistence", INFERENCE: "inference.cache.persistence"}


_NAMES = {STORE: "embedded store", INFERENCE: "inference"}


_USUAL = ("", "ContainerCreating", "PodInitializing")


def check_component(cluster: Cluster, release: str, component: str) -> CheckResult:
    """Whether the pods of this component are ready; it may also be no part of the release.

    It stands on one ready pod: what keeps others is told, but marked as unknown.
    """
    check = _NAMES[component]
    selector = f"{INSTANCE_LABEL}={release},{_COMPONENT}={component}"
    try:
        found, _ = cluster.list(cluster.path("pods"), labelSelector=selector)
        pods = [pod for pod in found if _counts(pod)]
        waiting = [pod for pod in pods if not condition(pod, "Ready")]
        events = cluster.list(cluster.path("events"))[0] if waiting else []
    except ApiError as error:
        if error.status != 403:
            raise
        return CheckResult(check=check, mark=CheckStatus.UNKNOWN, text="no right to look")
    if not pods:
        return CheckResult(check=check, mark=CheckStatus.OK, text="no part of the release")
    ready = f"{len(pods) - len(waiting)} of {counted(len(pods), 'pod')} ready"
    if not waiting:
        return CheckResult(check=check, mark=CheckStatus.OK, text=ready)
    mark = CheckStatus.BAD if len(waiting) == len(pods) else CheckStatus.UNKNOWN
    for pod in waiting:
        if words := _claim_words(cluster, pod, events):
            remedy = _claim_remedy(words, _CLAIM_VALUES[component])
            return CheckResult(check=check, mark=mark, text=f"{ready}: {words}", remedy=remedy)
        if words := _pod_words(pod):
            text = f"{ready}: {pod['metadata']['name']}: {words}"
            return CheckResult(check=check, mark=mark, text=text, remedy=_remedy(words, component))
    return CheckResult(check=check, mark=CheckStatus.UNKNOWN, text=f"{ready} so far")


def _counts(pod: Mapping[str, Any]) -> bool:
    """Not one that leaves, nor one that was evicted and only lies there."""
    over = (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded")
    return not over and not pod["metadata"].get("deletionTimestamp")


def _remedy(words: str, component: str) -> str:
    if component == INFERENCE and re.search(r"Insufficient \S*gpu", words):
        return "free a GPU, or let upgrades end the old pod first: inference.strategy.type=Recreate"
    return remedy_for(words).replace("jobs.", f"{_VALUES[component]}.")


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
            plain(str(event.get("message", "")))
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
    if node_is_lost(pod):
        return f"node {pod['spec'].get('nodeName')} is silent"
    for found in status.get("conditions") or []:
        if found["type"] == "PodScheduled" and found["status"] == "False":
            return plain(str(found.get("message") or "not scheduled"))
    for container in status.get("containerStatuses") or []:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason", "") not in _USUAL:
            return ": ".join(filter(None, (waiting["reason"], waiting.get("message"))))
        last = (container.get("lastState") or {}).get("terminated")
        if last:
            times = counted(container["restartCount"], "restart")
            return f"{times}, the last after exit code {last['exitCode']}"
    return ""


Tell = Callable[[CheckResult], None]


def examine(cluster: Cluster, template: JobTemplate, manifest: Object, *, tell: Tell) -> bool:
    """Whether nothing speaks against this launch; every finding is told."""
    release = CheckResult(
        check="release", mark=CheckStatus.OK, text=f"{template.release} ({template.name})"
    )
    first: list[Check] = [
        lambda: check_api(cluster),
        lambda: check_rights(cluster),
        lambda: release,
    ]
    good = True
    store = partial(check_component, cluster, template.release, STORE)
    for finding in run_checks([*first, store, *check_job(cluster, template, manifest)]):
        tell(finding)
        good &= finding.mark is not CheckStatus.BAD
    return good


def doctor(cluster: Cluster, *, release: str | None, tell: Tell) -> bool:
    """Whether all jobs could be launched here, and whether the store does what they need."""
    good = True
    for finding in (check_api(cluster), check_rights(cluster)):
        tell(finding)
        good &= finding.mark is not CheckStatus.BAD
    store, releases = "", set[str]()
    for job in job_names():
        try:
            template = find_template(cluster, job, release=release)
            request = LaunchRequest(job=job, run=f"doctor-{job}", recipe={})
            manifest, shape = plan(request, template)
        except TitaError as error:
            tell(
                CheckResult(
                    check=job, mark=CheckStatus.BAD, text=error.what, remedy=error.remedy or ""
                )
            )
            good = False
            continue
        size = f"{shape.nodes} x {counted(shape.gpus_per_node, 'GPU')}"
        tell(CheckResult(check=job, mark=CheckStatus.OK, text=f"{template.name}, {size}"))
        for finding in run_checks(check_job(cluster, template, manifest)):
            tell(finding)
            good &= finding.mark is not CheckStatus.BAD
        releases.add(template.release)
        store = plain_environment(main_container(manifest["spec"]["template"])).get(
            "TITA_STORE", store
        )
    for name in sorted(releases):
        for finding in run_checks([partial(check_component, cluster, name, c) for c in COMPONENTS]):
            tell(finding)
            good &= finding.mark is not CheckStatus.BAD
    if store:
        finding = _store(store)
        tell(finding)
        good &= finding.mark is not CheckStatus.BAD
    return good


def _store(uri: str) -> CheckResult:
    """A laptop often has no credentials for the store: that is no fault of the cluster."""
    if uri.startswith("s3://"):
        import boto3

        if boto3.Session().get_credentials() is None:
            return CheckResult(
                check="store",
                mark=CheckStatus.UNKNOWN,
                text=f"{uri}: no credentials here to look with",
            )
    return check_store(uri)
