"""The Job of one run: its name, its shape, and its manifest made from the chart's CronJob."""

import copy
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tita.errors import TitaError
from tita.jobspec import merge
from tita.launch.objects import (
    GPU_ANNOTATION,
    INSTANCE_LABEL,
    LAUNCHED_BY,
    MADE_FROM,
    QUEUE_LABEL,
    Object,
    main_container,
    plain_environment,
)
from tita.terminal import counted

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


# A pod's host is <run>-<index> and ends at 63 characters; Kubernetes refuses Jobs that leave less.
MAX_LENGTH = 57


def new_run_name(job: str) -> str:
    """A fresh name that sorts by time: `train-dpo-20261124-093015-k3f`."""
    letters = "abcdefghijkmnpqrstuvwxyz23456789"
    tail = "".join(secrets.choice(letters) for _ in range(3))
    return f"{job}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{tail}"


def check_run_name(name: str) -> str:
    """`name`, if it can be a Job, a host and a folder.

    Raises:
        TitaError: it cannot.
    """
    if len(name) > MAX_LENGTH:
        raise TitaError(
            f"{len(name)} characters", where=f"name {name!r}", remedy=f"use at most {MAX_LENGTH}"
        )
    if not _LABEL.fullmatch(name):
        raise TitaError(
            "not a name for a run",
            where=repr(name),
            remedy="use a-z, 0-9 and -, with a letter or digit at both ends",
        )
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class JobShape:
    """The gang of one run; `gpus_per_node` is 0 for a job that needs none."""

    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def procs_per_node(self) -> int:
        """WorkerStatus processes of one node: one a GPU, and one where there is none."""
        return max(1, self.gpus_per_node)


def resolve_shape(
    template: JobShape, *, gpus: int | None = None, nodes: int | None = None
) -> JobShape:
    """The template's shape with the user's wishes laid over it.

    Args:
        template: nodes and GPUs per node as the job has them by itself.
        gpus: GPUs in total. Without `nodes` as few nodes as hold them, each with at most the
            template's GPUs per node.
        nodes: nodes; without `gpus` each has the template's GPUs.

    Raises:
        TitaError: GPUs that do not divide; the two nearest numbers that do are named.
    """
    per_node = template.gpus_per_node
    if gpus is None:
        return JobShape(nodes=nodes or template.nodes, gpus_per_node=per_node)
    if gpus == 0:
        return JobShape(nodes=nodes or template.nodes, gpus_per_node=0)
    if per_node == 0:
        raise TitaError("this job uses no GPUs", where=f"--gpus {gpus}", remedy="leave it out")
    if nodes is not None:
        return JobShape(
            nodes=nodes, gpus_per_node=_divide(gpus, nodes, what=counted(nodes, "node"))
        )
    if gpus <= per_node:
        return JobShape(nodes=1, gpus_per_node=gpus)
    nodes = _divide(gpus, per_node, what=f"nodes of {counted(per_node, 'GPU')}")
    return JobShape(nodes=nodes, gpus_per_node=per_node)


def _divide(gpus: int, by: int, *, what: str) -> int:
    if gpus % by:
        below, above = gpus // by * by, -(-gpus // by) * by
        nearest = f"{below} or {above}" if below else f"{above}"
        raise TitaError(
            f"does not divide over {what}", where=f"--gpus {gpus}", remedy=f"ask for {nearest}"
        )
    return gpus // by


@dataclass(frozen=True, kw_only=True)
class JobTemplate:
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
    def shape(self) -> JobShape:
        spec = self.cron_job["spec"]["jobTemplate"]["spec"]
        limits = main_container(spec["template"])["resources"].get("limits") or {}
        return JobShape(
            nodes=spec.get("parallelism", 1), gpus_per_node=int(limits.get(self.gpu_resource, 0))
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """What the release lays over the job's default recipe."""
        spec = self.cron_job["spec"]["jobTemplate"]["spec"]
        text = plain_environment(main_container(spec["template"])).get("TITA_RECIPE") or "{}"
        found: dict[str, Any] = json.loads(text)
        return found


def make_job(
    template: JobTemplate,
    *,
    run: str,
    shape: JobShape,
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
    container = main_container(spec["template"])
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
