"""From a launch request to a Job in the cluster."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tita.errors import TitaError
from tita.launch.cluster import ApiError, Cluster
from tita.launch.objects import INSTANCE_LABEL, JOB_LABEL, LAUNCHED_BY, Object
from tita.launch.remedies import remedy_for
from tita.launch.template import JobShape, JobTemplate, make_job, resolve_shape
from tita.recipes import RECIPES, load_recipe


def find_template(cluster: Cluster, job: str, *, release: str | None = None) -> JobTemplate:
    """The CronJob that the chart made of `job`.

    Raises:
        TitaError: there is none, or several releases have one and none is named.
    """
    selector = f"{JOB_LABEL}={job}" + (f",{INSTANCE_LABEL}={release}" if release else "")
    found, _ = cluster.list(cluster.path("cronjobs.batch"), labelSelector=selector)
    here = f"namespace {cluster.namespace}"
    if len(found) == 1:
        return JobTemplate(cron_job=found[0])
    what = f"{len(found)} releases have a job {job!r}"
    if not found:
        what = f"no release {f'{release!r} ' if release else ''}of the tita chart has a job {job!r}"
        found, _ = cluster.list(cluster.path("cronjobs.batch"), labelSelector=f"{JOB_LABEL}={job}")
    names = sorted(item["metadata"]["labels"].get(INSTANCE_LABEL, "?") for item in found)
    remedy = f"give --release {' or --release '.join(names)}"
    if not names:
        remedy = "give --namespace, or install one: helm install tita charts/tita"
    raise TitaError(what, where=here, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """What the user asked for, on top of the release's template."""

    job: str
    run: str
    recipe: Mapping[str, Any]
    gpus: int | None = None
    nodes: int | None = None
    queue: str | None = None
    image: str | None = None


def plan(request: LaunchRequest, template: JobTemplate) -> tuple[Object, JobShape]:
    """The Job to create and its shape.

    Raises:
        TitaError: GPUs that do not divide, or a recipe that the pod would refuse.
    """
    shape = resolve_shape(template.shape, gpus=request.gpus, nodes=request.nodes)
    # The recipe as the pod will load it: the job's, the release's, this run's.
    load_recipe(RECIPES[request.job], template.recipe, request.recipe)
    manifest = make_job(
        template,
        run=request.run,
        shape=shape,
        recipe=request.recipe,
        launch_id=secrets.token_hex(8),
        queue=request.queue,
        image=request.image,
    )
    return manifest, shape


def submit(cluster: Cluster, manifest: Object, *, dry_run: bool = False) -> Object:
    """Create the Job; with `dry_run` the API only says whether it would.

    Raises:
        TitaError: the name is taken, or the API refuses; its own words are in it.
    """
    path = cluster.path("jobs.batch")
    name = manifest["metadata"]["name"]
    try:
        return cluster.create(path, manifest, **({"dryRun": "All"} if dry_run else {}))
    except ApiError as error:
        if error.status == 409 and error.reason == "AlreadyExists":
            existing = cluster.get(cluster.path("jobs.batch", name))
            annotations = existing["metadata"].get("annotations") or {}
            # The answer to an earlier try was lost on its way: this is our own Job.
            if annotations.get(LAUNCHED_BY) == manifest["metadata"]["annotations"][LAUNCHED_BY]:
                return existing
            if existing["metadata"].get("deletionTimestamp"):
                raise TitaError(
                    f"the last run {name!r} is deleted, but its pods still end",
                    remedy="launch again once `tita jobs list` has it no more",
                ) from None
            raise TitaError(
                f"there is a run {name!r} already",
                remedy=f"choose another --name, or tita jobs delete {name}",
            ) from None
        remedy = error.remedy or remedy_for(error.what) or None
        raise TitaError(error.what, where=f"job {name}", remedy=remedy) from None
