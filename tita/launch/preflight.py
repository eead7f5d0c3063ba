"""Checks before a launch: each is one line, with a remedy if it fails."""

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from tita.errors import StoreUnavailable, TitaError, Unreachable
from tita.launch.cluster import ApiError, Cluster
from tita.launch.objects import (
    JOB_LABEL,
    QUEUE_LABEL,
    Object,
    main_container,
    plain_environment,
)
from tita.launch.submit import submit
from tita.launch.template import JobTemplate
from tita.recipe_sources import parse_recipe_variable
from tita.recipes import RECIPES, data_names, load_recipe
from tita.settings import settings
from tita.storage import open_store
from tita.storage.locate import check_exists, store_command
from tita.terminal import counted

OLDEST_KUBERNETES = (1, 28)
PERMISSIONS = (
    ("list", "cronjobs.batch"),
    ("create", "jobs.batch"),
    ("watch", "jobs.batch"),
    ("watch", "pods"),
    ("get", "pods/log"),
)
"""Verbs and resources that launching and watching need."""


class CheckStatus(StrEnum):
    """The outcome of a check."""

    OK = "ok"
    UNKNOWN = "?"
    """Not permitted to look; the launch continues."""
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of `tita doctor`."""

    check: str
    mark: CheckStatus
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.mark:3} {self.check}: {self.text}{remedy}"


Check = Callable[[], CheckResult]
OK, UNKNOWN, BAD = CheckStatus.OK, CheckStatus.UNKNOWN, CheckStatus.BAD


def run_checks(checks: Sequence[Check]) -> Iterator[CheckResult]:
    """The results in order; all checks run at once, because each waits for the network."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        yield from pool.map(lambda check: check(), checks)


def check_api(cluster: Cluster) -> CheckResult:
    """The API answers and is recent enough for the chart.

    Raises:
        Unreachable: it does not answer.
    """
    answer = cluster.get("/version")
    version = tuple(int(re.sub(r"\D.*", "", answer[part]) or 0) for part in ("major", "minor"))
    text = f"Kubernetes {answer['gitVersion']} at {cluster.access.server}"
    if version < OLDEST_KUBERNETES:
        return CheckResult("api", BAD, text, "the chart needs 1.28 or later")
    return CheckResult("api", OK, text)


def is_allowed(cluster: Cluster, verb: str, resource: str, *, name: str = "") -> bool:
    """Whether the user may do `verb` to the namespace's objects of a kind, or to the one `name`."""
    plural, _, group = resource.partition(".")
    plural, _, sub = plural.partition("/")
    attributes = {"namespace": cluster.namespace, "verb": verb, "group": group, "name": name}
    attributes |= {"resource": plural, "subresource": sub}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    path = cluster.path("selfsubjectaccessreviews.authorization.k8s.io")
    return bool(cluster.create(path, review)["status"].get("allowed"))


def check_rights(cluster: Cluster) -> CheckResult:
    """The user has the permissions for launching and watching."""
    with ThreadPoolExecutor(len(PERMISSIONS)) as pool:
        allowed = list(pool.map(lambda permission: is_allowed(cluster, *permission), PERMISSIONS))
    missing = [" ".join(p) for p, ok in zip(PERMISSIONS, allowed, strict=True) if not ok]
    namespace = f"in namespace {cluster.namespace}"
    if missing:
        text = f"may not {', '.join(missing)} {namespace}"
        remedy = "have your user added to the release's rbac.subjects"
        return CheckResult("rights", BAD, text, remedy)
    return CheckResult("rights", OK, f"may launch and watch {namespace}")


def check_job(cluster: Cluster, template: JobTemplate, manifest: Object) -> list[Check]:
    """Checks of what a Job needs, the API's dry run last."""
    pod = manifest["spec"]["template"]["spec"]
    account = pod.get("serviceAccountName", "default")
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod.get("volumes") or []
        if "persistentVolumeClaim" in volume
    ]
    priority = pod.get("priorityClassName")
    queue = (manifest["metadata"].get("labels") or {}).get(QUEUE_LABEL)
    objects: list[tuple[str, str, list[str], str]] = [
        ("service account", "serviceaccounts", [account],
         "set serviceAccount.create in the release's values"),
        ("secrets", "secrets", sorted(_required_secrets(pod)),
         "create it with `{kubectl} create secret generic`, or fix its name in the values"),
        ("claims", "persistentvolumeclaims", claims,
         "create the claim, or fix its name in the release's values"),
    ]  # fmt: skip
    if priority:
        remedy = "fix jobs.priorityClassName in the release's values"
        resource = "priorityclasses.scheduling.k8s.io"
        objects.append(("priority class", resource, [priority], remedy))
    if queue:
        remedy = "see `{kubectl} get localqueues`, or omit --queue"
        objects.append(("queue", "localqueues.kueue.x-k8s.io", [queue], remedy))
    checks: list[Check] = [
        partial(_guarded, "nodes", partial(_check_nodes, cluster, template, manifest))
    ]
    checks += [
        partial(_guarded, entry[0], partial(_check_exist, cluster, *entry)) for entry in objects
    ]
    return [*checks, partial(_check_dry_run, cluster, manifest)]


def check_data(manifest: Object) -> CheckResult:
    """The data that the recipe names is in the store, if this machine can read the job's store."""
    container = main_container(manifest["spec"]["template"])
    variables = plain_environment(container)
    uri, job = variables.get("TITA_STORE", ""), manifest["metadata"]["labels"][JOB_LABEL]
    recipe = load_recipe(RECIPES[job], parse_recipe_variable(variables.get("TITA_RECIPE")))
    # Other names are paths in the image or in volumes of the pod.
    names = {k: n for k, n in data_names(recipe).items() if not n.startswith(("/", ".", "~"))}
    if not names or not _is_readable_here(uri, variables):
        return CheckResult("data", OK, "checked by the first pod")
    store = open_store(uri)
    for key, name in names.items():
        try:
            check_exists(name, store=store)
        except StoreUnavailable:
            return CheckResult("data", OK, "checked by the first pod")
        except TitaError as error:
            command = store_command("data push", "FOLDER", name, store=store.uri)
            remedy = f"push it with `{command}`, or correct --set {key}=..."
            return CheckResult("data", BAD, f"{key}: {error.where}: {error.what}", remedy)
    return CheckResult("data", OK, ", ".join(names.values()))


def _is_readable_here(uri: str, variables: Mapping[str, str]) -> bool:
    """Whether this machine has credentials for the store, and reaches it as the pods do."""
    here = settings()
    if not uri.startswith("s3://") or (
        here.s3_endpoint_url != variables.get("TITA_S3_ENDPOINT_URL")
    ):
        return False
    if variables.get("TITA_S3_REQUESTER_PAYS") == "true" and not here.s3_requester_pays:
        return False
    from tita.storage.s3_client import has_credentials  # it imports boto3: 0.2 s

    try:
        return has_credentials()
    except TitaError:
        return False  # `tita doctor` reports it


def _guarded(name: str, check: Check) -> CheckResult:
    """The check's result; `?` where the user has no permission to look."""
    try:
        return check()
    except ApiError as error:
        if error.status == 403:
            return CheckResult(name, UNKNOWN, "no permission to look")
        return CheckResult(name, BAD, error.what)


def _check_exist(
    cluster: Cluster, check: str, resource: str, names: Iterable[str], remedy: str
) -> CheckResult:
    for name in names:
        try:
            cluster.get(cluster.path(resource, name))
        except ApiError as error:
            if error.status != 404:
                raise
            return CheckResult(check, BAD, f"there is no {name!r}", remedy)
    return CheckResult(check, OK, ", ".join(names) or "none needed")


def _required_secrets(pod: Object) -> set[str]:
    names = {ref["name"] for ref in pod.get("imagePullSecrets") or []}
    refs = [
        *((entry.get("valueFrom") or {}).get("secretKeyRef")
          for container in pod["containers"] for entry in container.get("env") or []),
        *(source.get("secretRef")
          for container in pod["containers"] for source in container.get("envFrom") or []),
    ]  # fmt: skip
    names |= {ref["name"] for ref in refs if ref and not ref.get("optional")}
    volumes = [volume.get("secret") for volume in pod.get("volumes") or []]
    return names | {ref["secretName"] for ref in volumes if ref and not ref.get("optional")}


def _check_nodes(cluster: Cluster, template: JobTemplate, manifest: Object) -> CheckResult:
    resource = template.gpu_resource
    pod = manifest["spec"]["template"]["spec"]
    limits = main_container(manifest["spec"]["template"])["resources"].get("limits") or {}
    wanted, count = int(limits.get(resource, 0)), manifest["spec"]["parallelism"]
    nodes, _ = cluster.list(cluster.path("nodes"))
    admitting = [node for node in nodes if _admits(node, pod)]
    # A node that has just joined does not say yet what it has.
    offers = [(node.get("status") or {}).get("allocatable") or {} for node in admitting]
    sizes = [int(offer.get(resource, 0)) for offer in offers]
    fits = sum(size >= wanted for size in sizes)
    text = f"{fits} of {counted(len(nodes), 'node')} can hold a pod"
    if wanted:
        text += f" with {counted(wanted, 'GPU')}"
    if fits:
        together = sum(size // wanted for size in sizes) if wanted else count
        if together >= count:
            return CheckResult("nodes", OK, text)
        text += f", but not {count} at the same time"
        return CheckResult("nodes", BAD, text, f"use at most --gpus {together * wanted}")
    if wanted and sizes:
        text += f"; the largest has {max(sizes)}"
    if excluded := len(nodes) - len(admitting):
        text += f"; taints, labels or cordons exclude {excluded} of them"
    remedy = "check jobs.nodeSelector and jobs.tolerations in the release's values"
    if wanted and sizes:
        remedy = "use fewer GPUs per node"
    remedy += ", or --no-preflight if the cluster adds nodes on demand"
    return CheckResult("nodes", BAD, text, remedy)


def _admits(node: Object, pod: Object) -> bool:
    if node["spec"].get("unschedulable"):
        return False
    labels = node["metadata"].get("labels") or {}
    if any(labels.get(name) != value for name, value in (pod.get("nodeSelector") or {}).items()):
        return False
    taints = [t for t in node["spec"].get("taints") or [] if t["effect"] != "PreferNoSchedule"]
    return all(any(_tolerates(t, taint) for t in pod.get("tolerations") or []) for taint in taints)


def _tolerates(toleration: Object, taint: Object) -> bool:
    """https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/"""
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    same = toleration.get("value", "") == taint.get("value", "")
    return bool(toleration.get("key") == taint["key"] and same)


def _check_dry_run(cluster: Cluster, manifest: Object) -> CheckResult:
    try:
        submit(cluster, manifest, dry_run=True)
    except Unreachable:
        raise
    except TitaError as error:
        return CheckResult("dry run", BAD, error.what, error.remedy or "")
    return CheckResult("dry run", OK, "the API accepts the Job")


def check_store(uri: str) -> CheckResult:
    """The store can be listed and written, and rejects a second conditional write."""
    key, denied = f".tita-doctor-{secrets.token_hex(6)}", ""
    try:
        store = open_store(uri)
        next(iter(store.list("runs/")), None)
        store.put(key, b"1", if_absent=True)
        try:
            second = store.put(key, b"2", if_absent=True)
            first_kept = store.get(key) == b"1"
        finally:
            try:
                store.delete(key)
            except StoreUnavailable:
                raise
            except TitaError as error:
                denied = error.what
    except TitaError as error:
        return CheckResult("store", BAD, str(error))
    except OSError as error:
        return CheckResult("store", BAD, f"{uri}: {error.strerror or error}")
    if second or not first_kept:
        text = f"{uri} ignores If-None-Match: two runs could overwrite each other's objects"
        return CheckResult("store", BAD, text, "use an S3 server with conditional writes")
    text = f"{uri}: list, write, conditional write"
    if denied:
        # Pushes and pulls work without this right.
        remedy = "grant the right to delete, without which old checkpoints and content stay"
        return CheckResult("store", UNKNOWN, f"{text}, but not delete ({denied})", remedy)
    return CheckResult("store", OK, text)
