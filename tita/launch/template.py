"""The chart's CronJob of a job, and the Job that one run makes of it.

The chart is the only author of manifests: here the facts of one run are laid over its template, as
`kubectl create job --from=cronjob/...` would take it, and nothing else is written.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tita.errors import TitaError
from tita.jobspec import merge
from tita.launch.cluster import Cluster, Object
from tita.launch.shape import Shape

JOB_LABEL = "tita.dev/job"
INSTANCE_LABEL = "app.kubernetes.io/instance"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
GPU_ANNOTATION = "tita.dev/gpu-resource"
LAUNCHED_BY = "tita.dev/launch-id"
MADE_FROM = "tita.dev/template"
CANCELLED = "tita.dev/cancelled"
CONTAINER = "tita"


@dataclass(frozen=True, kw_only=True)
class Template:
    """A release's CronJob of one job."""

    cron_job: Object

    @property
    def name(self) -> str:
        return str(self.cron_job["metadata"]["name"])

    @property
    def release(self) -> str:
        return str(self.cron_job["metadata"]["labels"][INSTANCE_LABEL])

    @property
    def gpu_resource(self) -> str:
        annotations = self.cron_job["metadata"].get("annotations") or {}
        return str(annotations.get(GPU_ANNOTATION, "nvidia.com/gpu"))

    @property
    def shape(self) -> Shape:
        spec = self.cron_job["spec"]["jobTemplate"]["spec"]
        limits = container_of(spec["template"])["resources"].get("limits") or {}
        return Shape(
            nodes=spec.get("parallelism", 1), gpus_per_node=int(limits.get(self.gpu_resource, 0))
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """What the release lays over the job's default recipe."""
        spec = self.cron_job["spec"]["jobTemplate"]["spec"]
        text = environment_of(container_of(spec["template"])).get("TITA_RECIPE") or "{}"
        found: dict[str, Any] = json.loads(text)
        return found


def find_template(cluster: Cluster, job: str, *, release: str | None = None) -> Template:
    """The CronJob that the chart made of `job`.

    Raises:
        TitaError: there is none, or several releases have one and none is named.
    """
    selector = f"{JOB_LABEL}={job}" + (f",{INSTANCE_LABEL}={release}" if release else "")
    found, _ = cluster.list(cluster.path("cronjobs.batch"), labelSelector=selector)
    here = f"namespace {cluster.namespace}"
    if len(found) == 1:
        return Template(cron_job=found[0])
    what = f"{len(found)} releases have a job {job!r}"
    if not found:
        what = f"no release {f'{release!r} ' if release else ''}of the tita chart has a job {job!r}"
        found, _ = cluster.list(cluster.path("cronjobs.batch"), labelSelector=f"{JOB_LABEL}={job}")
    names = sorted(item["metadata"]["labels"].get(INSTANCE_LABEL, "?") for item in found)
    remedy = f"give --release {' or --release '.join(names)}"
    if not names:
        remedy = "give --namespace, or install one: helm install tita charts/tita"
    raise TitaError(what, where=here, remedy=remedy)


def make_job(
    template: Template,
    *,
    run: str,
    shape: Shape,
    recipe: Mapping[str, Any],
    launch_id: str,
    queue: str | None = None,
    image: str | None = None,
) -> Object:
    """The Job of one run; everything about the run stands in it.

    It has no owner: the CronJob's history limits would take a finished run away, and an uninstalled
    release its running ones.
    """
    source = copy.deepcopy(template.cron_job["spec"]["jobTemplate"])
    metadata, spec = source.get("metadata") or {}, source["spec"]
    metadata["name"] = run
    metadata.setdefault("annotations", {}).update(
        {LAUNCHED_BY: launch_id, MADE_FROM: template.name}
    )
    if queue:
        metadata.setdefault("labels", {})[QUEUE_LABEL] = queue
        spec["suspend"] = True  # until Kueue admits it
    spec["parallelism"] = spec["completions"] = shape.nodes
    container = container_of(spec["template"])
    if image:
        container["image"] = image
    _lay_gpus(container, template.gpu_resource, shape.gpus_per_node)
    values = {
        "TITA_NUM_NODES": str(shape.nodes),
        "TITA_PROCS_PER_NODE": str(shape.procs_per_node),
        "TITA_RECIPE": json.dumps(merge(template.recipe, recipe), sort_keys=True),
    }
    _lay_environment(container.setdefault("env", []), values)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def container_of(pod_template: Mapping[str, Any]) -> Object:
    """The container that does the work."""
    containers: Sequence[Object] = pod_template["spec"]["containers"]
    for container in containers:
        if container["name"] == CONTAINER:
            return container
    raise TitaError(
        f"the template has no container {CONTAINER!r}", remedy="upgrade the release's chart"
    )


def environment_of(container: Mapping[str, Any]) -> dict[str, str]:
    """Variables with plain values."""
    return {e["name"]: e["value"] for e in container.get("env") or [] if "value" in e}


def _lay_gpus(container: Object, resource: str, count: int) -> None:
    resources = container.setdefault("resources", {})
    for kind in ("limits", "requests"):
        amounts = resources.get(kind) or {}
        if count and kind == "limits":
            resources.setdefault(kind, amounts)[resource] = count
        else:
            amounts.pop(resource, None)


def _lay_environment(env: list[Object], values: Mapping[str, str]) -> None:
    """In place: a variable may refer to those before it."""
    entries = {entry["name"]: entry for entry in env}
    for name, value in values.items():
        if name in entries:
            entries[name].pop("valueFrom", None)
            entries[name]["value"] = value
        else:
            env.append({"name": name, "value": value})
