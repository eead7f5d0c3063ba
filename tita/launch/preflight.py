"""Checks before a launch: each says in a line what it found, and what to do if it is bad."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from tita.errors import TitaError, Unreachable
from tita.launch.cluster import ApiError, Cluster
from tita.launch.objects import QUEUE_LABEL, Object, main_container
from tita.launch.submit import submit
from tita.launch.template import JobTemplate
from tita.terminal import counted

OLDEST = (1, 28)


class CheckStatus(StrEnum):
    """The outcome of a check."""

    OK = "ok"
    UNKNOWN = "?"
    """It could not be looked at; the launch goes on."""
    BAD = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One line of the list that `tita doctor` prints."""

    check: str
    mark: CheckStatus
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.mark:3} {self.check}: {self.text}" + (
            f"; {self.remedy}" if self.remedy else ""
        )


Check = Callable[[], CheckResult]


def check_api(cluster: Cluster) -> CheckResult:
    """The API answers, and is not too old for the chart.

    Raises:
        Unreachable: no answer.
    """
    said = cluster.get("/version")
    version = tuple(int(re.sub(r"\D.*", "", said[part]) or 0) for part in ("major", "minor"))
    text = f"Kubernetes {said['gitVersion']} at {cluster.access.server}"
    if version < OLDEST:
        return CheckResult(
            check="api", mark=CheckStatus.BAD, text=text, remedy="the chart needs 1.28 or later"
        )
    return CheckResult(check="api", mark=CheckStatus.OK, text=text)


def check_rights(cluster: Cluster) -> CheckResult:
    """The user may do what launching and watching takes."""
    with ThreadPoolExecutor(len(_NEEDED)) as pool:
        allowed = list(pool.map(lambda need: _may(cluster, *need), _NEEDED))
    missing = [
        f"{verb} {resource}"
        for (verb, resource), may in zip(_NEEDED, allowed, strict=True)
        if not may
    ]
    if missing:
        return CheckResult(
            check="rights",
            mark=CheckStatus.BAD,
            text=f"may not {', '.join(missing)} in namespace {cluster.namespace}",
            remedy="have your user put into the release's rbac.subjects",
        )
    return CheckResult(
        check="rights",
        mark=CheckStatus.OK,
        text=f"may launch and watch in namespace {cluster.namespace}",
    )


def _may(cluster: Cluster, verb: str, resource: str) -> bool:
    plural, _, group = resource.partition(".")
    plural, _, sub = plural.partition("/")
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {
            "resourceAttributes": {
                "namespace": cluster.namespace,
                "verb": verb,
                "group": group,
                "resource": plural,
                "subresource": sub,
            }
        },
    }
    path = cluster.path("selfsubjectaccessreviews.authorization.k8s.io")
    return bool(cluster.create(path, review)["status"].get("allowed"))


_NEEDED = (
    ("list", "cronjobs.batch"),
    ("create", "jobs.batch"),
    ("watch", "jobs.batch"),
    ("watch", "pods"),
    ("get", "pods/log"),
)


def check_job(cluster: Cluster, template: JobTemplate, manifest: Object) -> list[Check]:
    """All that a Job needs and that can be seen beforehand, ending with the API's own dry run."""
    pod = manifest["spec"]["template"]["spec"]
    looks: dict[str, Check] = {
        "nodes": lambda: _nodes(cluster, template, manifest),
        "service account": lambda: _account(cluster, pod),
        "secrets": lambda: _secrets(cluster, pod),
        "claims": lambda: _claims(cluster, pod),
    }
    if pod.get("priorityClassName"):
        looks["priority class"] = lambda: _priority(cluster, pod["priorityClassName"])
    queue = (manifest["metadata"].get("labels") or {}).get(QUEUE_LABEL)
    if queue:
        looks["queue"] = lambda: _queue(cluster, queue)
    guarded = [partial(_guarded, check, look) for check, look in looks.items()]
    return [*guarded, lambda: _dry_run(cluster, manifest)]


def run_checks(checks: Sequence[Check]) -> Iterator[CheckResult]:
    """The findings in order; all are looked for at once, because each waits for the network."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        yield from pool.map(lambda look: look(), checks)


def _guarded(check: str, look: Callable[[], CheckResult]) -> CheckResult:
    """A check that must not be made says so; one that finds nothing there is bad."""
    try:
        return look()
    except ApiError as error:
        if error.status == 403:
            return CheckResult(check=check, mark=CheckStatus.UNKNOWN, text="no right to look")
        return CheckResult(check=check, mark=CheckStatus.BAD, text=error.what)


def _nodes(cluster: Cluster, template: JobTemplate, manifest: Object) -> CheckResult:
    resource = template.gpu_resource
    pod = manifest["spec"]["template"]["spec"]
    limits = main_container(manifest["spec"]["template"])["resources"].get("limits") or {}
    wanted = int(limits.get(resource, 0))
    count = manifest["spec"]["parallelism"]
    nodes, _ = cluster.list(cluster.path("nodes"))
    open_nodes = [node for node in nodes if _admits(node, pod)]
    sizes = [int(node["status"]["allocatable"].get(resource, 0)) for node in open_nodes]
    fits = sum(size >= wanted for size in sizes)
    of = f"{fits} of {counted(len(nodes), 'node')} can hold a pod"
    if wanted:
        of += f" with {counted(wanted, 'GPU')}"
    if fits:
        together = sum(size // wanted for size in sizes) if wanted else count
        if together < count:
            return CheckResult(
                check="nodes", mark=CheckStatus.BAD, text=f"{of}, and {count} at once find no room",
                remedy=f"ask for at most --gpus {together * wanted}",
            )  # fmt: skip
        return CheckResult(check="nodes", mark=CheckStatus.OK, text=of)
    largest = f"; the largest has {max(sizes)}" if wanted and sizes else ""
    closed = len(nodes) - len(open_nodes)
    taints = f"; taints, labels or cordon close {closed} of them to it" if closed else ""
    return CheckResult(
        check="nodes", mark=CheckStatus.BAD, text=f"{of}{largest}{taints}",
        remedy="ask for fewer GPUs a node, or --no-preflight where nodes are added on demand",
    )  # fmt: skip


def _admits(node: Mapping[str, Any], pod: Mapping[str, Any]) -> bool:
    if node["spec"].get("unschedulable"):
        return False
    labels = node["metadata"].get("labels") or {}
    if any(labels.get(name) != value for name, value in (pod.get("nodeSelector") or {}).items()):
        return False
    taints = [t for t in node["spec"].get("taints") or [] if t["effect"] != "PreferNoSchedule"]
    return all(any(_bears(t, taint) for t in pod.get("tolerations") or []) for taint in taints)


def _bears(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    """https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/"""
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    same = toleration.get("value", "") == taint.get("value", "")
    return bool(toleration.get("key") == taint["key"] and same)


def _account(cluster: Cluster, pod: Mapping[str, Any]) -> CheckResult:
    name = pod.get("serviceAccountName", "default")
    return _there(
        cluster, "serviceaccounts", [name], check="service account",
        remedy="set serviceAccount.create in the release's values",
    )  # fmt: skip


def _secrets(cluster: Cluster, pod: Mapping[str, Any]) -> CheckResult:
    names = {ref["name"] for ref in pod.get("imagePullSecrets") or []}
    for container in pod["containers"]:
        for entry in container.get("env") or []:
            if ref := (entry.get("valueFrom") or {}).get("secretKeyRef"):
                names |= set() if ref.get("optional") else {ref["name"]}
        for source in container.get("envFrom") or []:
            if ref := source.get("secretRef"):
                names |= set() if ref.get("optional") else {ref["name"]}
    for volume in pod.get("volumes") or []:
        if (ref := volume.get("secret")) and not ref.get("optional"):
            names.add(ref["secretName"])
    return _there(
        cluster, "secrets", sorted(names), check="secrets",
        remedy="make it with `kubectl create secret generic`, or mend its name in the values",
    )  # fmt: skip


def _claims(cluster: Cluster, pod: Mapping[str, Any]) -> CheckResult:
    names = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod.get("volumes") or []
        if "persistentVolumeClaim" in volume
    ]
    return _there(
        cluster, "persistentvolumeclaims", names, check="claims",
        remedy="make the claim, or mend its name in the release's values",
    )  # fmt: skip


def _priority(cluster: Cluster, name: str) -> CheckResult:
    return _there(
        cluster, "priorityclasses.scheduling.k8s.io", [name], check="priority class",
        remedy="mend jobs.priorityClassName in the release's values",
    )  # fmt: skip


def _queue(cluster: Cluster, name: str) -> CheckResult:
    return _there(
        cluster, "localqueues.kueue.x-k8s.io", [name], check="queue",
        remedy="see `kubectl get localqueues`, or leave --queue out",
    )  # fmt: skip


def _there(
    cluster: Cluster, resource: str, names: list[str], *, check: str, remedy: str
) -> CheckResult:
    for name in names:
        try:
            cluster.get(cluster.path(resource, name))
        except ApiError as error:
            if error.status != 404:
                raise
            text = f"there is no {name!r}"
            return CheckResult(check=check, mark=CheckStatus.BAD, text=text, remedy=remedy)
    return CheckResult(check=check, mark=CheckStatus.OK, text=", ".join(names) or "none needed")


def _dry_run(cluster: Cluster, manifest: Object) -> CheckResult:
    try:
        submit(cluster, manifest, dry_run=True)
    except Unreachable:
        raise
    except TitaError as error:
        return CheckResult(
            check="dry run", mark=CheckStatus.BAD, text=error.what, remedy=error.remedy or ""
        )
    return CheckResult(check="dry run", mark=CheckStatus.OK, text="the API would take the Job")


def check_store(uri: str) -> CheckResult:
    """The store can be listed and written, and keeps the first of two writers' objects."""
    import secrets

    from tita.storage import open_store

    key = f".tita-doctor-{secrets.token_hex(6)}"
    try:
        store = open_store(uri)
        next(iter(store.list("runs/")), None)
        store.put(key, b"1", if_absent=True)
        try:
            second = store.put(key, b"2", if_absent=True)
            whole = store.get(key) == b"1"
        finally:
            store.delete(key)
    except TitaError as error:
        return CheckResult(check="store", mark=CheckStatus.BAD, text=str(error))
    except OSError as error:
        return CheckResult(
            check="store", mark=CheckStatus.BAD, text=f"{uri}: {error.strerror or error}"
        )
    if second or not whole:
        return CheckResult(
            check="store", mark=CheckStatus.BAD,
            text=f"{uri} ignores If-None-Match: two runs could mix",
            remedy="use an S3 server with conditional writes",
        )  # fmt: skip
    return CheckResult(
        check="store", mark=CheckStatus.OK, text=f"{uri}: list, write, conditional write"
    )
