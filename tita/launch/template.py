"""The Job of one run: its name, its shape, and its manifest, made from the chart's CronJob.

The chart is the only author of manifests. A run copies its release's CronJob, as `kubectl create
job --from=cronjob/...` does, and sets the name, replicas, GPUs, image, queue and recipe.
"""

import copy
import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tita.errors import TitaError
from tita.jobspec import merge
from tita.launch.objects import (
    GPU_RESOURCE,
    INSTANCE_LABEL,
    LAUNCH_ID,
    LAUNCH_OPTIONS,
    MADE_FROM,
    QUEUE_LABEL,
    TRACKERS,
    Object,
    main_container,
    plain_environment,
)
from tita.terminal import counted

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
# A pod's host name is <run>-<index>, at most 63 characters long.
MAX_LENGTH = 57


def new_run_name(job: str) -> str:
    """A new name that sorts by time: `train-dpo-20261124-093015-k3f`."""
    letters = "abcdefghijkmnpqrstuvwxyz23456789"
    suffix = "".join(secrets.choice(letters) for _ in range(3))
    return f"{job}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{suffix}"


def check_run_name(name: str) -> str:
    """`name`, if it is valid as the name of a Job, a host and a folder.

    Raises:
        TitaError: it is not.
    """
    where = f"run name {name!r}"
    if len(name) > MAX_LENGTH:
        remedy = f"use at most {MAX_LENGTH} characters"
        raise TitaError(f"has {len(name)} characters", where=where, remedy=remedy)
    if not _LABEL.fullmatch(name):
        remedy = "use a-z, 0-9 and -, with a letter or digit at both ends"
        raise TitaError("not a valid name", where=where, remedy=remedy)
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class JobShape:
    """Nodes of a run and GPUs per node; 0 GPUs for a job that runs on CPUs."""

    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def procs_per_node(self) -> int:
        """Worker processes per node: one per GPU, at least one."""
        return max(1, self.gpus_per_node)


def resolve_shape(
    template: JobShape,
    *,
    gpus: int | None = None,
    nodes: int | None = None,
    one_node: bool = False,
) -> JobShape:
    """The template's shape with `--gpus` and `--nodes` applied.

    Args:
        template: the job's default shape.
        gpus: GPUs in total. Without `nodes`, the smallest number of nodes that holds them, each
            with at most the template's GPUs per node.
        nodes: nodes; without `gpus`, each has the template's GPUs per node.
        one_node: whether the job runs on one node, which then has all GPUs.

    Raises:
        TitaError: the GPUs do not divide evenly; the message names the two nearest numbers. Or the
            job does not run on several nodes.
    """
    if one_node:
        if nodes not in (None, 1):
            raise TitaError("this job runs on one node", where=f"--nodes {nodes}", remedy="omit it")
        nodes = 1
    per_node = template.gpus_per_node
    if not gpus:
        per_node = per_node if gpus is None else 0
        return JobShape(nodes=nodes or template.nodes, gpus_per_node=per_node)
    if per_node == 0:
        raise TitaError("this job uses no GPUs", where=f"--gpus {gpus}", remedy="omit it")
    if nodes is not None:
        per_node = _divide(gpus, nodes, what=counted(nodes, "node"))
        return JobShape(nodes=nodes, gpus_per_node=per_node)
    if gpus <= per_node:
        return JobShape(nodes=1, gpus_per_node=gpus)
    nodes = _divide(gpus, per_node, what=f"nodes of {counted(per_node, 'GPU')}")
    return JobShape(nodes=nodes, gpus_per_node=per_node)


def _divide(gpus: int, by: int, *, what: str) -> int:
    if gpus % by:
        below, above = gpus // by * by, -(-gpus // by) * by
        nearest = f"{below} or {above}" if below else f"{above}"
        raise TitaError(
            f"does not divide over {what}", where=f"--gpus {gpus}", remedy=f"use {nearest}"
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
        return str(annotations.get(GPU_RESOURCE, "nvidia.com/gpu"))

    @property
    def trackers(self) -> list[str] | None:
        """Experiment trackers of the release's image; None if the chart does not say."""
        found = (self.cron_job["metadata"].get("annotations") or {}).get(TRACKERS)
        return None if found is None else [name for name in str(found).split(",") if name]

    @property
    def shape(self) -> JobShape:
        spec = self.cron_job["spec"]["jobTemplate"]["spec"]
        limits = main_container(spec["template"])["resources"].get("limits") or {}
        gpus = int(limits.get(self.gpu_resource, 0))
        return JobShape(nodes=spec.get("parallelism", 1), gpus_per_node=gpus)

    @property
    def recipe(self) -> dict[str, Any]:
        """The release's overrides of the job's default recipe."""
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
    gang_timeout: int | None = None,
    options: Sequence[str] = (),
) -> Object:
    """The manifest of one run.

    `options` are those of `tita launch` that repeat this run, for its messages.

    It has no owner reference: the CronJob's history limits would delete finished runs, and
    uninstalling the release would delete running ones.
    """
    source = copy.deepcopy(template.cron_job["spec"]["jobTemplate"])
    metadata, spec = source.get("metadata") or {}, source["spec"]
    metadata["name"] = run
    annotations = metadata.setdefault("annotations", {})
    annotations |= {LAUNCH_ID: launch_id, MADE_FROM: template.name}
    annotations[LAUNCH_OPTIONS] = json.dumps(list(options))
    if queue:
        metadata.setdefault("labels", {})[QUEUE_LABEL] = queue
        spec["suspend"] = True  # until Kueue admits it
    spec["parallelism"] = spec["completions"] = shape.nodes
    container = main_container(spec["template"])
    if image:
        container["image"] = image
    resources = container.setdefault("resources", {})
    if shape.gpus_per_node:
        limits = resources["limits"] = resources.get("limits") or {}
        limits[template.gpu_resource] = shape.gpus_per_node
    for kind in ("requests",) if shape.gpus_per_node else ("limits", "requests"):
        (resources.get(kind) or {}).pop(template.gpu_resource, None)
    values = {
        "TITA_NUM_NODES": str(shape.nodes),
        "TITA_PROCS_PER_NODE": str(shape.procs_per_node),
        "TITA_GPUS": str(shape.gpus_per_node),
        "TITA_RECIPE": json.dumps(merge(template.recipe, recipe), sort_keys=True),
    }
    if gang_timeout is not None:
        values["TITA_RENDEZVOUS_TIMEOUT_S"] = str(gang_timeout)
    if (tries := plain_environment(container).get("TITA_TRIES")) is not None:
        spec["backoffLimit"] = int(tries) * shape.nodes
    # In place: a variable may refer to the ones before it.
    env = container.setdefault("env", [])
    entries = {entry["name"]: entry for entry in env}
    for name, value in values.items():
        if name in entries:
            entries[name].pop("valueFrom", None)
            entries[name]["value"] = value
        else:
            env.append({"name": name, "value": value})
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
